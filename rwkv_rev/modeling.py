"""The Hugging Face classes: one model for RWKV-4, 5.0, 5.1 and 5.2, built of reversible cells.

Without labels a forward pass is ordinary: logits, and the state to go on from. With labels the loss goes through the
model's gradient strategy (:mod:`rwkv_rev.bptt`), so ``model(input_ids, labels=labels).loss.backward()`` is the exact
gradient of the whole context at any length. Logits are not made then unless asked for: over a long context they
would be the largest tensor of all.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from rwkv_rev.bptt import LossInputs, choose_strategy
from rwkv_rev.cells import ChannelMix, TimeMixRwkv4, TimeMixRwkv5
from rwkv_rev.cells.block import Block
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.configuration import BPTT_STRATEGIES, TAPES, RwkvRevConfig
from rwkv_rev.errors import StrategyError
from rwkv_rev.initialization import initialize_channel_mix, initialize_head, initialize_time_mix
from rwkv_rev.loss import IGNORE, linear_cross_entropy, next_token_targets
from rwkv_rev.state import RwkvRevState


@dataclass
class RwkvRevOutput(ModelOutput):
    """Hidden states after ``ln_out`` [B, T, D], the state after the last token, each layer's residual stream."""

    last_hidden_state: Tensor | None = None
    state: RwkvRevState | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class RwkvRevCausalLMOutput(ModelOutput):
    """Loss (float32 scalar), logits [B, T, V], state after the last token, each layer's residual stream.

    ``report`` tells what the gradient strategy did (name, tape bytes, drift; see :mod:`rwkv_rev.bptt`).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: RwkvRevState | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    report: dict[str, Any] | None = field(default=None)


class RwkvRevPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the two models."""

    config: RwkvRevConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (declared so by the base class)
    _is_stateful = True
    # decays act through a double exponential: half precision would change them
    _keep_in_fp32_modules_strict = ["time_decay", "bonus", "initial_wkv"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers visits every module that owns parameters, children first
        if isinstance(module, TimeMixRwkv4 | TimeMixRwkv5):
            initialize_time_mix(module, self.config)
        elif isinstance(module, ChannelMix):
            initialize_channel_mix(module, self.config)
        elif isinstance(module, nn.ParameterList):
            for state in module:
                init.zeros_(state)
        elif isinstance(module, nn.Embedding):
            init.uniform_(module.weight, a=-1e-4, b=1e-4)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and module is getattr(self, "head", None):
            initialize_head(module)


class RwkvRevModel(RwkvRevPreTrainedModel):
    """The stack: embedding, ``ln0``, L blocks, ``ln_out``."""

    def __init__(self, config: RwkvRevConfig) -> None:
        super().__init__(config)
        self.embeddings: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.ln0 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.ln_out = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.initial_wkv = initial_states(config) if config.has_initial_state else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Input to block 0 [B, C, D]: the normalised embedding."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        return self.ln0(self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds)

    def run(
        self, x: Tensor, state: RwkvRevState, mask: ChunkMask | None, streams: list[Tensor] | None = None
    ) -> tuple[Tensor, RwkvRevState]:
        """All blocks on x [B, C, D] by plain differentiable arithmetic; ``streams`` collects every residual."""
        layers = []
        for index, block in enumerate(self.blocks):
            call: Callable[..., Any] = block
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x, after = checkpoint(call, x, state.layer(index), mask, use_reentrant=False)
            else:
                x, after = call(x, state.layer(index), mask)
            layers.append(after)
            if streams is not None:
                streams.append(x)
        return x, RwkvRevState.stack(layers)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        state: RwkvRevState | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> RwkvRevOutput:
        """Hidden states after ``ln_out``, and the state to go on from.

        Args:
            input_ids: [B, T] int64, or ``inputs_embeds`` [B, T, D] (before ``ln0``).
            attention_mask: [B, T], 0 where a token is padding or a hole; such tokens change nothing.
            state: state after the tokens before these; empty when None.
            output_hidden_states: also return the residual stream before block 0 and after every block.

        With gradients disabled, contexts longer than ``config.chunk_length`` run chunk by chunk.
        """
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None:
            raise ValueError("give either input_ids or inputs_embeds")
        batch, length = tokens.shape[:2]
        valid = valid_tokens(attention_mask, length)
        state = self.initial_state(batch) if state is None else state
        if state.batch_size != batch:
            raise ValueError(f"the state has {state.batch_size} rows, the input {batch}")
        size = length if torch.is_grad_enabled() else self.config.chunk_length
        hidden, streams = [], []
        for start in range(0, length, size):
            part = slice(start, start + size)
            x = self.embed(
                None if input_ids is None else input_ids[:, part],
                None if inputs_embeds is None else inputs_embeds[:, part],
            )
            mask = None if valid is None else ChunkMask.of(valid[:, part])
            collected = [x]
            x, state = self.run(x, state, mask, collected if output_hidden_states else None)
            hidden.append(self.ln_out(x))
            streams.append(collected)
        return RwkvRevOutput(
            last_hidden_state=_joined(hidden),
            state=state,
            hidden_states=tuple(_joined(list(parts)) for parts in zip(*streams, strict=True))
            if output_hidden_states
            else None,
        )

    def initial_state(self, batch_size: int) -> RwkvRevState:
        """What ``batch_size`` rows begin with, on the model's device: empty, or with the tuned WKV state."""
        weight = self.ln0.weight
        state = RwkvRevState.empty(self.config, batch_size, weight.device, weight.dtype)
        if self.initial_wkv is None:
            return state
        tuned = torch.stack(list(self.initial_wkv)).to(state.wkv.dtype)  # [L, H, N, N]
        wkv = tuned[:, None].expand(-1, batch_size, -1, -1, -1).contiguous()
        return replace(state, wkv=wkv)


class RwkvRevForCausalLM(RwkvRevPreTrainedModel, GenerationMixin):
    """RWKV language model with exact gradients over any context length.

    See :meth:`forward` and :meth:`set_bptt`.
    """

    def __init__(self, config: RwkvRevConfig) -> None:
        super().__init__(config)
        self.model = RwkvRevModel(config)
        self.head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = new_embeddings

    # --- what gradient strategies see (rwkv_rev.bptt.strategy.LanguageModel) ------------------------------------

    @property
    def blocks(self) -> list[Block]:
        return cast(list[Block], list(self.model.blocks))

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def checkpoints_blocks(self) -> bool:
        """Whether blocks keep only their inputs inside a chunk (``gradient_checkpointing_enable``)."""
        return self.model.gradient_checkpointing and self.training

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        return self.model.embed(input_ids, inputs_embeds)

    def normalize(self, hidden: Tensor) -> Tensor:
        return self.model.ln_out(hidden)

    def run(self, x: Tensor, state: RwkvRevState, mask: ChunkMask | None) -> tuple[Tensor, RwkvRevState]:
        return self.model.run(x, state, mask)

    def initial_state(self, batch_size: int) -> RwkvRevState:
        """What ``batch_size`` rows begin with when no state is given."""
        return self.model.initial_state(batch_size)

    def add_initial_state(self) -> None:
        """Give the model an initial WKV state to tune, zero at first; one that it has stays.

        Raises:
            ValueError: for RWKV-4.
        """
        if not self.config.has_heads:
            raise ValueError("RWKV-4 has no state of matrices to tune")
        if self.model.initial_wkv is None:
            self.model.initial_wkv = initial_states(self.config).to(self.model.ln0.weight.device)
            self.config.has_initial_state = True

    # --- use --------------------------------------------------------------------------------------------------

    def set_bptt(
        self,
        strategy: str,
        *,
        chunk_length: int | None = None,
        tape: str | None = None,
        tape_dir: str | None = None,
    ) -> "BpttSetting":
        """Choose the gradient strategy; also a context manager that puts the old one back.

        Args:
            strategy: ``auto``, ``full``, ``checkpoint``, ``reversible``, ``reversible-lossy`` or ``truncated``.
            chunk_length: C, tokens per chunk; unchanged when None.
            tape: ``host``, ``device`` or ``disk``; unchanged when None.
            tape_dir: folder of the ``disk`` tape; unchanged when None.

        Raises:
            StrategyError: for a name or length that does not exist.
        """
        if strategy not in BPTT_STRATEGIES:
            raise StrategyError(
                f"bptt = {strategy!r} does not exist; use one of {', '.join(BPTT_STRATEGIES)}"
            )
        if tape is not None and tape not in TAPES:
            raise StrategyError(f"tape = {tape!r} does not exist; use one of {', '.join(TAPES)}")
        if chunk_length is not None and chunk_length < 1:
            raise StrategyError(f"chunk_length = {chunk_length} must be at least 1 token")
        settings = {"bptt": strategy, "chunk_length": chunk_length, "tape": tape, "tape_dir": tape_dir}
        return BpttSetting(
            self.config, {name: value for name, value in settings.items() if value is not None}
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        state: RwkvRevState | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        return_logits: bool = False,
        num_items_in_batch: int | Tensor | None = None,
        final_state_gradient: RwkvRevState | None = None,
        **kwargs: Any,
    ) -> RwkvRevCausalLMOutput | tuple[Any, ...]:
        """Logits, or with ``labels`` the loss.

        Args:
            input_ids: [B, T] int64, or ``inputs_embeds`` [B, T, D] (before ``ln0``).
            attention_mask: [B, T], 0 where a token is padding or a hole; such tokens change nothing. A longer
                mask (as ``generate`` passes) is read from its end.
            state: state after the tokens before these; its tensors may require gradients.
            labels: [B, T] int64, usually ``input_ids``; shifted inside: each valid token predicts the label of the
                row's next valid token. -100 is ignored.
            use_cache: accepted for generation; the state is always returned.
            logits_to_keep: only the last so many positions' logits (0: all), or their indices.
            output_hidden_states: also return the residual stream before block 0 and after every block.
            return_logits: make logits beside the loss; needs a strategy that keeps the whole graph.
            num_items_in_batch: divide the summed loss by this instead of by the number of predicted tokens.
            final_state_gradient: gradient of a further objective by the final state, added to the loss's.

        Returns:
            :class:`RwkvRevCausalLMOutput`. With labels, ``state`` carries no graph.

        Raises:
            StrategyError: if the gradient strategy cannot do what is asked.
        """
        if labels is None:
            hidden = self.model(
                input_ids, attention_mask, inputs_embeds, state, output_hidden_states=output_hidden_states
            )
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            output = RwkvRevCausalLMOutput(
                logits=self.head(hidden.last_hidden_state[:, kept]),
                state=hidden.state,
                hidden_states=hidden.hidden_states,
            )
        else:
            output = self._loss(
                input_ids,
                attention_mask,
                inputs_embeds,
                state,
                labels,
                return_logits,
                num_items_in_batch,
                final_state_gradient,
            )
        return output if return_dict is not False else output.to_tuple()

    def _loss(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        state: RwkvRevState | None,
        labels: Tensor,
        return_logits: bool,
        num_items_in_batch: int | Tensor | None,
        final_state_gradient: RwkvRevState | None,
    ) -> RwkvRevCausalLMOutput:
        batch, length = labels.shape
        valid = valid_tokens(attention_mask, length)
        targets = next_token_targets(labels, valid)
        divisor: float | Tensor = (targets != IGNORE).sum().clamp(min=1)
        if num_items_in_batch is not None:
            divisor = num_items_in_batch
            if isinstance(divisor, Tensor):
                divisor = divisor.to(targets.device)
        if return_logits:
            if self.config.bptt not in ("full", "auto") or length > self.config.chunk_length:
                raise StrategyError("return_logits needs bptt='full' and a context of at most one chunk")
            hidden = self.model(input_ids, attention_mask, inputs_embeds, state)
            last = hidden.last_hidden_state
            loss = linear_cross_entropy(
                last, self.head, targets, scale=1 / divisor, vocab_size=self.config.vocab_size
            )
            return RwkvRevCausalLMOutput(loss=loss, logits=self.head(last), state=hidden.state)
        strategy = choose_strategy(
            self.config.bptt,
            length,
            chunk_length=self.config.chunk_length,
            tape=self.config.tape,
            tape_dir=self.config.tape_dir,
        )
        inputs = LossInputs(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            valid=valid,
            targets=targets,
            divisor=divisor,
            state=self.model.initial_state(batch) if state is None else state,
            final_state_gradient=final_state_gradient,
        )
        result = strategy.loss(self, inputs)
        return RwkvRevCausalLMOutput(loss=result.loss, state=result.state, report=result.report)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        state: RwkvRevState | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Only the newest token once there is a state."""
        inputs: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": use_cache, "state": state}
        if state is not None:
            inputs["input_ids"] = input_ids[:, -1:]
        elif inputs_embeds is not None and input_ids.shape[1] == 0:
            inputs["inputs_embeds"] = inputs_embeds
        else:
            inputs["input_ids"] = input_ids
        inputs["logits_to_keep"] = 1 if logits_to_keep is None else logits_to_keep
        return inputs

    def _reorder_cache(self, state: RwkvRevState, beam_idx: Tensor) -> RwkvRevState:
        """The state of the beams that go on, for beam search."""
        return state.rows(beam_idx)


class BpttSetting:
    """A gradient strategy just set on a config; as a context manager it puts the former one back."""

    def __init__(self, config: RwkvRevConfig, settings: dict[str, Any]) -> None:
        self._config = config
        self._former = {name: getattr(config, name) for name in settings}
        for name, value in settings.items():
            setattr(config, name, value)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, value in self._former.items():
            setattr(self._config, name, value)


def initial_states(config: RwkvRevConfig) -> nn.ParameterList:
    """A WKV state [H, N, N] (key index first) of zeros for each layer, float32."""
    shape = (config.num_attention_heads, config.head_size, config.head_size)
    return nn.ParameterList(torch.zeros(shape) for _ in range(config.num_hidden_layers))


def valid_tokens(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """[B, T] bool, or None when every token counts; a mask longer than the input is read from its end."""
    if attention_mask is None:
        return None
    valid = attention_mask[:, -length:].bool()
    return None if bool(valid.all()) else valid


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
