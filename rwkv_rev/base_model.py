"""The base model: embedding, ``ln0``, a stack of reversible blocks, ``ln_out``; and what both models share.

Without gradients a context is read chunk by chunk. With gradients, one of more than a chunk goes through the two sweeps
(:mod:`rwkv_rev.bptt.any_loss`), whatever is computed from its hidden states; or its whole graph is stored, which is
exact too and said once, where chunks cannot be told apart or more than the last hidden states is asked for.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain, pairwise
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import logging

from rwkv_rev.arguments import named
from rwkv_rev.autograd.first_order import transforms_of
from rwkv_rev.bptt import choose_strategy
from rwkv_rev.bptt.any_loss import hidden_states, tell_of_whole_graph
from rwkv_rev.bptt.layers import by_layer, run_layers
from rwkv_rev.bptt.leaves import refuse_offloaded
from rwkv_rev.bptt.strategy import LanguageModel, LossInputs
from rwkv_rev.bptt.sweeps import TwoSweeps
from rwkv_rev.bptt_settings import BpttSettings
from rwkv_rev.cache import Piece, RwkvRevCache, handed_over
from rwkv_rev.cells.block import Block
from rwkv_rev.cells.borders import Borders, Mask, mask_of, part_of
from rwkv_rev.chunk_length import AutoLength
from rwkv_rev.configuration import MOST_SIZE, RwkvRevConfig
from rwkv_rev.context_parallel import refuse_own_loss
from rwkv_rev.distributed.sharded_reading import reading
from rwkv_rev.document_states import Asked, ends_asked_for
from rwkv_rev.errors import StrategyError
from rwkv_rev.exporting import exportable, exporting
from rwkv_rev.forecast import SMALL_CHUNK, tokens_at_once
from rwkv_rev.foreign.adapters import refuse_recomputing
from rwkv_rev.foreign.quantised import Quantisable, refuse_packed
from rwkv_rev.foreign.search import refuse_unknown_in_packed_rows, strangers
from rwkv_rev.initial_states import activations, document_starts, initial_states, state_of_rows
from rwkv_rev.initialization import initialize
from rwkv_rev.inputs import check_state, embedded, masked_embeds, rows_and_tokens, valid_tokens
from rwkv_rev.keywords import refuse_unknown_keywords
from rwkv_rev.mixed_dtypes import naming_mixed_dtypes
from rwkv_rev.outputs import RwkvRevOutput
from rwkv_rev.packed_rows import given_borders
from rwkv_rev.state import ModelState

logger = logging.get_logger("rwkv_rev.modeling")  # one for both models


class RwkvRevPreTrainedModel(Quantisable, PreTrainedModel):
    """Loading, saving and initialisation shared by the two models."""

    config: RwkvRevConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (declared so by the base class)
    was_called = False
    """Set by ``forward`` without labels; whoever asks whether it runs clears it before (label smoothing)."""

    def post_init(self) -> None:
        """Called when all modules are there: those that loading keeps in float32 are made so in the first place."""
        tuned = ("initial_wkv",) if self.config.has_initial_state else ()
        self._keep_in_fp32_modules_strict = [*self.config.architecture.float32, *tuned]
        for name, parameter in self.named_parameters():
            narrow = parameter.dtype in (torch.float16, torch.bfloat16)
            if narrow and not set(self._keep_in_fp32_modules_strict).isdisjoint(name.split(".")):
                parameter.data = parameter.data.float()
        super().post_init()

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """Let every n-th block keep its inputs alone, and be computed again by the given function."""
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            logger.warning_once(
                "use_reentrant=True is taken as False: the gradient is the same, of the state too"
            )
        for index, block in enumerate(cast(RwkvRevModel, self.base_model).typed_blocks()):
            chosen = enable and index % every_n_layers == 0
            block.recompute = partial(gradient_checkpointing_func, use_reentrant=False) if chosen else None

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Embedding:
        """As in transformers.

        Raises:
            ValueError: for what is no number of tokens.
        """
        whole = isinstance(new_num_tokens, Integral) and not isinstance(new_num_tokens, bool)
        if new_num_tokens is not None and not (whole and 1 <= new_num_tokens <= MOST_SIZE):
            raise ValueError(
                f"new_num_tokens = {new_num_tokens!r} must be a whole number from 1 to {MOST_SIZE}"
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def _by_config(self, output_hidden_states: bool | None, return_dict: bool | None) -> tuple[bool, bool]:
        """The two settings of a call, where None stands for the configuration's."""
        config = self.config
        return (
            bool(config.output_hidden_states if output_hidden_states is None else output_hidden_states),
            bool(config.return_dict if return_dict is None else return_dict),
        )

    def _initialize_weights(self, module: nn.Module, *_: Any, **__: Any) -> None:
        # of code outside of transformers it leaves out modules without parameters of their own: cells of linear maps
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        initialize(module, self, super()._init_weights)  # transformers visits every module, children first


class RwkvRevModel(RwkvRevPreTrainedModel):
    """The stack: embedding, ``ln0``, L blocks, ``ln_out``."""

    def __init__(self, config: RwkvRevConfig) -> None:
        super().__init__(config)
        self.bptt = BpttSettings()
        self.auto_length = AutoLength()
        self.context_group: Any = None  # ranks that share contexts, a ContextGroup
        self.embeddings: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.ln0 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.ln_out = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.initial_wkv = initial_states(config) if config.has_initial_state else None
        self.post_init()

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether blocks keep only their inputs in training, and are computed again when their gradient is taken."""
        return any(getattr(block, "recompute", None) is not None for block in self.blocks)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self._set_gradient_checkpointing(enable)

    def typed_blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Input to block 0 [B, C, D]: the normalised embedding."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        return self.ln0(embedded(self.embeddings, input_ids) if inputs_embeds is None else inputs_embeds)

    def run(
        self, x: Tensor, state: ModelState, mask: Mask, streams: list[Tensor] | None = None
    ) -> tuple[Tensor, ModelState]:
        """All blocks on x [B, C, D] by plain differentiable arithmetic; ``streams`` collects every residual."""
        again = self.training and torch.is_grad_enabled() and self.gradient_checkpointing
        if again:
            refuse_recomputing(self)
        states = [state.layer(index) for index in range(len(self.blocks))]
        x, after = run_layers(self.typed_blocks(), x, states, mask, recompute=again, streams=streams)
        return x, type(state).stack(after)

    @naming_mixed_dtypes
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        state: ModelState | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: ModelState | RwkvRevCache | None = None,
        cache: ModelState | RwkvRevCache | None = None,
        croppable: int = 0,
        return_dict: bool | None = None,
        borders: Tensor | None = None,
        return_document_states: Asked = False,
        **kwargs: Any,
    ) -> RwkvRevOutput | tuple[Any, ...]:
        """Hidden states after ``ln_out``, and the state to go on from.

        Args:
            input_ids: [B, T] int64, or ``inputs_embeds`` [B, T, D] (before ``ln0``).
            attention_mask: [B, T], 0 where a token is padding or a hole; such tokens change nothing.
            state: state after the tokens before these; empty when None.
            output_hidden_states: also return the residual stream before block 0 and after every block; the config's
                setting when None, as of ``return_dict``.
            past_key_values, cache: the same as ``state``; a :class:`RwkvRevCache` is brought up to date.
            croppable: tokens at the end that a recording cache may be asked to forget (0: all).
            borders: [B, T] bool, true at the first token of each document packed into a row; see the model with a head.
            return_document_states: also return the state after every document, by rows and in order; differentiable.

        With gradients disabled, contexts longer than ``set_bptt``'s ``chunk_length`` run chunk by chunk, of 1,024
        tokens under ``auto``. What :meth:`RwkvRevForCausalLM.set_bptt` says of ``hidden_states`` is of the output.
        """
        output_hidden_states, return_dict = self._by_config(output_hidden_states, return_dict)
        if not exporting():  # PyTorch 2.9 lets no module be written to then
            self.was_called = True
        batch, length, device = rows_and_tokens(input_ids, inputs_embeds)
        refuse_unknown_keywords(kwargs, RwkvRevModel)
        if device.type != "meta":  # where a model without weights is looked at
            refuse_offloaded(self.parameters())
        if device.type == "cpu" and torch.is_grad_enabled():
            refuse_packed(self)
        valid = valid_tokens(attention_mask, length, batch)
        inputs_embeds = masked_embeds(inputs_embeds, valid)
        state, updated = handed_over(state=state, past_key_values=past_key_values, cache=cache)
        if state is None:
            state = self.initial_state(batch, device)
        else:
            check_state(self.config, state, batch)
        refuse_own_loss(self.context_group, chain(self.parameters(), [inputs_embeds], state.tensors()))
        at = given_borders(kwargs, borders, valid, batch, length, embedded=inputs_embeds is not None)
        ends = ends_asked_for(return_document_states, self, kwargs, at, valid, (batch, length))
        documents = None if at is None else replace(self.borders(at, valid), ends=ends)
        if (
            updated is None
            and not output_hidden_states
            and ends is None
            and self.goes_in_sweeps(batch, length, device, inputs_embeds, *state.tensors())
        ):
            read = self._in_sweeps(input_ids, inputs_embeds, valid, state, documents)
            if read is not None:
                output = RwkvRevOutput(last_hidden_state=read[0], state=exportable(read[1]))
                return output if return_dict else output.to_tuple()
        # chunk by chunk without gradients; at once where code inside the model might look at positions
        size = self.bptt.read_length
        whole = torch.is_grad_enabled() or length <= size or strangers(self).unknown
        starts = set(range(0, length, length if whole else size))
        if updated is not None and updated.is_croppable:
            if croppable > length:
                raise ValueError(
                    f"assisted generation asks for logits of {croppable} tokens and hands over {length}, as it does "
                    "under peft's prompt learning; generate without an assistant"
                )
            starts.add(length - (croppable or length))
        hidden, streams = [], []
        with reading(self, [*pairwise([*sorted(starts), length])]) as pieces:
            for start, stop in pieces:
                part = slice(start, stop)
                embedded = self.embed(
                    None if input_ids is None else input_ids[:, part],
                    None if inputs_embeds is None else inputs_embeds[:, part],
                )
                flags = None if valid is None else valid[:, part]
                collected = [embedded]
                masked = partial(mask_of, flags, part_of(documents, start, stop), device)
                streams_of = collected if output_hidden_states else None
                x, after = self.run(embedded, state, (mask := masked(stop - start)), streams_of)
                if ends is not None:
                    ends.part(start, stop).take(type(state), mask, by_layer(after, self.typed_blocks()))
                if updated is not None:
                    again = partial(self._read_first, embedded, masked, state)
                    updated.take(after, Piece(state, stop - start, again))
                state = after
                hidden.append(self.ln_out(x))
                streams.append(collected)
        last = _joined(hidden)
        if last.requires_grad:
            if self.training and self._would_be_cut(batch, length, device):
                tell_of_whole_graph(self.bptt)
            if self.bptt.hidden_states == "host":
                last = last.to("cpu")
        output = RwkvRevOutput(
            last_hidden_state=last,
            state=exportable(state),
            document_states=ends.states() if ends is not None and return_document_states is True else None,
            hidden_states=tuple(_joined(list(parts)) for parts in zip(*streams, strict=True))
            if output_hidden_states
            else None,
        )
        return output if return_dict else output.to_tuple()

    def chunk_length(self, rows: int, length: int, device: torch.device, *, handed_out: bool = False) -> int:
        """C of a batch [rows, length], as set or chosen; ``handed_out``: hidden states go to somebody else's loss."""
        if not isinstance(self.bptt.chunk_length, str) or not torch.is_grad_enabled():
            return self.bptt.read_length
        ranks = 1 if self.context_group is None else self.context_group.size
        return ranks * self.auto_length.of(self, rows, length, device, ranks, handed_out=handed_out)

    def tokens_at_once(self, chunk: int, rows: int, length: int) -> int:
        """Tokens in which chunks of ``chunk`` are run, of a batch [rows, length] (:func:`.forecast.tokens_at_once`)."""
        if chunk > SMALL_CHUNK:
            return chunk
        weights = sum(parameter.nbytes for parameter in self.parameters())
        return tokens_at_once(self.config, weights, rows, length, chunk)

    def goes_in_sweeps(self, rows: int, length: int, device: torch.device, *given: Tensor | None) -> bool:
        """Whether the gradient of a loss that somebody else computes is to be had chunk by chunk, too.

        ``given``: what else than the parameters may require one.
        """
        if not torch.is_grad_enabled() or self.bptt.strategy not in ("auto", "reversible", "checkpoint"):
            return False
        if not any(tensor is not None and tensor.requires_grad for tensor in (*self.parameters(), *given)):
            return False
        return length > self.chunk_length(rows, length, device, handed_out=True)

    def _would_be_cut(self, rows: int, length: int, device: torch.device) -> bool:
        """Whether the model's own loss would have cut a context into chunks."""
        asked = self.bptt.strategy != "full" and not torch.compiler.is_compiling()
        return asked and length > self.chunk_length(rows, length, device, handed_out=True)

    @torch.compiler.disable  # as the loss
    def _in_sweeps(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        valid: Tensor | None,
        state: ModelState,
        borders: Borders | None,
    ) -> tuple[Tensor, ModelState] | None:
        """Hidden states and the state after them, differentiable by two sweeps; None where that cannot be."""
        given = [] if inputs_embeds is None else [inputs_embeds]
        if transforms_of(chain(self.parameters(), state.tensors(), given)):
            return None
        batch, length, device = rows_and_tokens(input_ids, inputs_embeds)
        inputs = LossInputs(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            valid=valid,
            targets=torch.zeros(1, dtype=torch.int64, device=device).expand(batch, length),
            divisor=1.0,
            state=state,
            borders=borders,
        )
        bptt, size = self.bptt, self.chunk_length(batch, length, device, handed_out=True)
        strategy = choose_strategy(
            bptt.strategy,
            length,
            chunk_length=size,
            tape=bptt.tape,
            tape_dir=bptt.tape_dir,
            remnants=bptt.remnants,
            at_once=self.tokens_at_once(size, batch, length),
        )
        assert isinstance(strategy, TwoSweeps)
        model = cast(LanguageModel, self)
        try:
            found = strategy.check(model, list(self.parameters()))
        except StrategyError as reason:  # the whole graph is right there, too
            logger.warning_once(
                f"the graph of the whole context is stored, and its memory grows with it: {reason}"
            )
            return None
        return hidden_states(strategy, model, inputs, found, on_host=bptt.hidden_states == "host")

    @property
    def checkpoints_blocks(self) -> bool:
        """Whether blocks keep only their inputs inside a chunk (``gradient_checkpointing_enable``)."""
        return self.gradient_checkpointing and self.training

    def normalize(self, hidden: Tensor) -> Tensor:
        """What the head reads, from the top block's output [B, C, D]."""
        return self.ln_out(hidden)

    @torch.no_grad()
    def _read_first(
        self, embedded: Tensor, masked: Callable[[int], Mask], state: ModelState, count: int
    ) -> ModelState:
        """State after the first ``count`` tokens of a piece [B, C, D] that began with ``state``."""
        return self.run(embedded[:, :count], state, masked(count))[1]

    @named
    def initial_state(self, batch_size: int, device: torch.device | None = None) -> ModelState:
        """What ``batch_size`` rows begin with: empty, or with the tuned WKV state; on the model's device when None."""
        return state_of_rows(self.config, batch_size, device, activations(self), self.initial_wkv)

    def borders(self, at: Tensor, valid: Tensor | None) -> Borders:
        """Borders [B, T], on the host and on valid tokens, with what every document begins with."""
        refuse_unknown_in_packed_rows(strangers(self))
        starts = document_starts(self)
        return Borders(at, None if valid is None else valid.cpu(), starts, self.config.hidden_size)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
