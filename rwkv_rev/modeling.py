"""The language model of RWKV-4 to 7: the base model and a head, in the shape that transformers expects.

Without labels a forward pass is ordinary: logits, and the state to go on from. With labels the loss goes through the
model's gradient strategy (:mod:`rwkv_rev.bptt`), so ``model(input_ids, labels=labels).loss.backward()`` is the exact
gradient of the whole context at any length. Logits are not made then unless asked for (:mod:`rwkv_rev.unmade`).
"""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_rev.arguments import named
from rwkv_rev.autograd.first_order import refuse_transforms
from rwkv_rev.base_model import RwkvRevModel, RwkvRevPreTrainedModel
from rwkv_rev.bptt import choose_strategy
from rwkv_rev.bptt.full import loss_in_one_graph
from rwkv_rev.bptt.leaves import refuse_offloaded
from rwkv_rev.bptt_settings import BpttSettings
from rwkv_rev.cache import CACHE_NAME, RwkvRevCache, handed_over
from rwkv_rev.cells.block import Block
from rwkv_rev.cells.borders import Borders, Mask
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.context_parallel import ContextParallel, refuse_accelerates_ranks, shared_loss, together
from rwkv_rev.distributed.shards import auto_as_others
from rwkv_rev.distributed.taking_part import for_the_head
from rwkv_rev.document_states import beside_a_loss, with_ends
from rwkv_rev.errors import StrategyError
from rwkv_rev.exporting import exporting
from rwkv_rev.foreign.adapters import refuse_carried_state
from rwkv_rev.generation import RwkvRevGenerationMixin
from rwkv_rev.initial_states import activations, initial_states
from rwkv_rev.inputs import loss_inputs, rows_and_tokens
from rwkv_rev.keywords import refuse_replica, refuse_unknown_keywords
from rwkv_rev.loss import wide
from rwkv_rev.loss_weights import refuse_without_labels
from rwkv_rev.mixed_dtypes import naming_mixed_dtypes
from rwkv_rev.outputs import RwkvRevCausalLMOutput
from rwkv_rev.packed_rows import PACKING
from rwkv_rev.set_bptt import BpttSetting
from rwkv_rev.state import ModelState
from rwkv_rev.tied_embeddings import TiedEmbeddings
from rwkv_rev.unmade import loss_and_logits


class RwkvRevForCausalLM(TiedEmbeddings, RwkvRevPreTrainedModel, RwkvRevGenerationMixin, ContextParallel):
    """RWKV language model with exact gradients over any length: :meth:`forward`, :meth:`set_bptt`."""

    def __init__(self, config: RwkvRevConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # Trainer counts labels by it; transformers goes by the class's name
        self.model = RwkvRevModel(config)
        self.head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    # --- what gradient strategies see (rwkv_rev.bptt.strategy.LanguageModel) ------------------------------------

    def read(
        self,
        input_ids: Tensor | None,
        valid: Tensor | None,
        inputs_embeds: Tensor | None,
        state: ModelState,
        borders: Borders | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Normalised hidden states [B, T, D] and the state after them, by the base model, called as a module."""
        return self._read(input_ids, valid, inputs_embeds, state, borders, streams=False)[:2]

    def read_streams(
        self,
        input_ids: Tensor | None,
        valid: Tensor | None,
        inputs_embeds: Tensor | None,
        state: ModelState,
        borders: Borders | None = None,
    ) -> tuple[Tensor, ModelState, tuple[Tensor, ...]]:
        """:meth:`read`, and the residual stream before block 0 and after every block."""
        return self._read(input_ids, valid, inputs_embeds, state, borders, streams=True)

    def _read(
        self,
        input_ids: Tensor | None,
        valid: Tensor | None,
        inputs_embeds: Tensor | None,
        state: ModelState,
        borders: Borders | None,
        *,
        streams: bool,
    ) -> tuple[Tensor, ModelState, tuple[Tensor, ...]]:
        output = self.model(
            input_ids,
            valid,
            inputs_embeds,
            state,
            output_hidden_states=streams,
            return_dict=True,
            borders=None if borders is None else borders.at,
            return_document_states=False if borders is None or borders.ends is None else borders.ends,
        )
        # they may be handed out in host memory; a loss of ours reads them here
        place = (input_ids if inputs_embeds is None else inputs_embeds).device  # type: ignore[union-attr]
        return output.last_hidden_state.to(place), output.state, output.hidden_states

    @property
    def blocks(self) -> list[Block]:
        return self.model.typed_blocks()

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:  # by resize_token_embeddings
        self.config.vocab_size = size

    @property
    def checkpoints_blocks(self) -> bool:
        """Whether blocks keep only their inputs inside a chunk (``gradient_checkpointing_enable``)."""
        return self.model.checkpoints_blocks

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        return self.model.embed(input_ids, inputs_embeds)

    def normalize(self, hidden: Tensor) -> Tensor:
        return self.model.normalize(hidden)

    def run(self, x: Tensor, state: ModelState, mask: Mask) -> tuple[Tensor, ModelState]:
        return self.model.run(x, state, mask)

    @named
    def initial_state(self, batch_size: int, device: torch.device | None = None) -> ModelState:
        """What ``batch_size`` rows begin with when no state is given."""
        return self.model.initial_state(batch_size, device)

    def add_initial_state(self) -> None:
        """Give the model an initial WKV state to tune, zero at first; one that it has stays.

        Raises:
            ValueError: for a generation whose initial state cannot be tuned.
        """
        if not self.config.architecture.tunes_state:
            raise ValueError(f"{self.config.architecture.called} has no state of matrices to tune")
        if self.model.initial_wkv is None:
            weight = activations(self.model)
            self.model.initial_wkv = initial_states(self.config).to(weight.device, wide(weight.dtype))
            self.config.has_initial_state = True

    # --- use --------------------------------------------------------------------------------------------------

    @property
    def bptt(self) -> BpttSettings:
        """How gradients are made: what :meth:`set_bptt` has set. It is not saved with the model."""
        return self.model.bptt

    @named
    def set_bptt(
        self,
        strategy: str,
        *,
        chunk_length: int | str | None = None,
        tape: str | None = None,
        tape_dir: str | None = None,
        hidden_states: str | None = None,
        remnants: str | None = None,
    ) -> BpttSetting:
        """Choose the gradient strategy; also a context manager that puts the old one back.

        Args:
            strategy: ``auto``, ``full``, ``checkpoint``, ``reversible``, ``reversible-lossy`` or ``truncated``.
            chunk_length: C, tokens per chunk, or ``auto``, which chooses when it is first needed and then keeps to it
                (:mod:`rwkv_rev.chunk_length`); unchanged when None. Chunks of up to 32 tokens are run several at once
                (:func:`rwkv_rev.forecast.tokens_at_once`).
            tape: ``host``, ``device`` or ``disk``; unchanged when None.
            tape_dir: folder of the ``disk`` tape; unchanged when None.
            hidden_states: ``device`` or ``host``, where the hidden states for a loss of your own are, and the gradient
                by them; unchanged when None. Under ``host`` those of ``model.model`` are a CPU tensor wherever they
                have a gradient: cut them with ``split``, and give the head one piece after another, on its device.
            remnants: ``whole`` or ``lifted``, of RWKV-7's states, or ``auto`` (:mod:`rwkv_rev.remnants`); unchanged
                when None.

        Raises:
            StrategyError: for a name or length that does not exist, and ``lifted`` for a model that is no RWKV-7.
        """
        given = {"strategy": strategy, "chunk_length": chunk_length, "tape": tape, "tape_dir": tape_dir}
        given |= {"hidden_states": hidden_states, "remnants": remnants}
        chosen = {name: value for name, value in given.items() if value is not None}
        return BpttSetting(self.model, chosen)

    @naming_mixed_dtypes
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        state: ModelState | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        return_logits: bool = False,
        num_items_in_batch: int | Tensor | None = None,
        loss_weights: Tensor | None = None,
        final_state_gradient: ModelState | None = None,
        past_key_values: ModelState | RwkvRevCache | None = None,
        cache: ModelState | RwkvRevCache | None = None,
        borders: Tensor | None = None,
        return_document_states: bool = False,
        **kwargs: Any,
    ) -> RwkvRevCausalLMOutput | tuple[Any, ...]:
        """Logits, or with ``labels`` the loss.

        Args:
            input_ids: [B, T] int64, or ``inputs_embeds`` [B, T, D] (before ``ln0``).
            attention_mask: [B, T], 0 where a token is padding or a hole; such tokens change nothing. Of a longer
                mask, which tells of tokens before ``state`` too, the end is read.
            state: state after the tokens before these; its tensors may require gradients.
            labels: [B, T] int64, usually ``input_ids``; shifted inside: each valid token predicts the label of the
                row's next valid token. -100 is ignored. In their place ``shift_labels`` (a keyword) gives what each
                position itself predicts; a masked one predicts nothing.
            use_cache: return the state as a cache too, as ``generate`` wants it; the default is as in transformers:
                ``config.use_cache`` out of training (but not in an export, nor for a gradient over more than a chunk,
                whose memory it would cost). The state itself is always returned.
            logits_to_keep: only the last so many positions' logits (0: all), or their indices.
            output_hidden_states: also return the residual stream before block 0 and after every block; the config's
                setting when None, as of ``return_dict``. Beside a loss it needs, as ``return_logits`` does, ``full`` or
                ``auto`` and at most one chunk.
            return_logits: make logits beside the loss. In evaluation they are made at their first use if this is False.
            num_items_in_batch: divide the summed loss by this instead of by the number of predicted tokens.
            loss_weights: [B, T], what each label's token counts in the loss (:mod:`rwkv_rev.loss_weights`): the
                weighted sum is divided by the sum of the weights. They stand where their labels stand, and are shifted
                with them; where there is no label they do not count.
            final_state_gradient: gradient of a further objective by the final state, added to the loss's. That by m,
                the third part of RWKV-4's ``wkv``, is ignored: m is a gauge, on which no output depends.
            past_key_values, cache: other names for ``state``; a :class:`RwkvRevCache` is brought up to date unless
                ``use_cache=False`` or labels are given.
            borders: [B, T] bool, true at the first token of each document packed into a row: state and token shift
                start there anew (from the tuned initial state, where there is one), and its label is not predicted. The
                state that comes back is that of each row's last document. ``cu_seq_lens_q``, ``seq_idx`` and
                ``position_ids`` that restart at 0 say the same of all documents but a row's first
                (:mod:`rwkv_rev.packed_rows`). Targets in ``shift_labels`` are taken as they are.
            return_document_states: also return the state after every document, a row for each, by rows and in order
                (``document_states``). Without labels they have a gradient, beside a loss it is refused.

        Returns:
            :class:`RwkvRevCausalLMOutput`. With labels, ``state`` carries no graph. Tuples are without the state where
            there are labels, or no gradient and nobody who hands over or asks for one (``use_cache=True``).

        Raises:
            StrategyError: if the gradient strategy cannot do what is asked.
            ValueError: for shapes that do not fit, for borders that contradict one another, and for a past that is not
                this model's state.
        """
        output_hidden_states, return_dict = self._by_config(output_hidden_states, return_dict)
        # not a parameter by name: Trainer takes every one with "label" in it for needed in evaluation
        shift_labels = kwargs.pop("shift_labels", None)
        refuse_unknown_keywords(kwargs, RwkvRevForCausalLM)
        refuse_replica(self)
        state, updated = handed_over(state=state, past_key_values=past_key_values, cache=cache)
        if state is not None and updated is None:  # ``generate``, which hands over a cache, has looked once
            refuse_carried_state(self)
        if labels is None and shift_labels is None:
            if not exporting():  # PyTorch 2.9 lets no module be written to then
                self.was_called = True
            refuse_without_labels(final_state_gradient=final_state_gradient, loss_weights=loss_weights)
            by_default = updated is not None or (self.config.use_cache and not (self.training or exporting()))
            if not (by_default if use_cache is None else use_cache):
                updated = None
            elif updated is None and (use_cache or not self._goes_in_sweeps(input_ids, inputs_embeds, state)):
                updated = RwkvRevCache(state)
            if rows_and_tokens(input_ids, inputs_embeds)[2].type != "meta":
                refuse_offloaded(self.head.parameters())  # the rest by the base model
            hidden = self.model(
                input_ids,
                attention_mask,
                inputs_embeds,
                state if updated is None else None,
                cache=updated,
                output_hidden_states=output_hidden_states,
                return_dict=True,
                croppable=logits_to_keep if isinstance(logits_to_keep, int) else 0,
                borders=borders,
                return_document_states=return_document_states,
                **{name: kwargs[name] for name in PACKING if name in kwargs},
            )
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            output = RwkvRevCausalLMOutput(
                logits=self.head(self._for_the_head(hidden.last_hidden_state, kept)),
                state=hidden.state,
                hidden_states=hidden.hidden_states,
                document_states=hidden.document_states,
            )
            if updated is not None:
                output[CACHE_NAME] = updated
        else:
            with together(self.model.context_group):
                output = self._loss(
                    return_logits,
                    output_hidden_states,
                    return_document_states,
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    inputs_embeds=inputs_embeds,
                    state=state,
                    labels=labels,
                    shift_labels=shift_labels,
                    num_items_in_batch=num_items_in_batch,
                    loss_weights=loss_weights,
                    final_state_gradient=final_state_gradient,
                    borders=borders,
                    packed=kwargs,
                )
        if return_dict:
            return output
        asked = use_cache or return_document_states
        reads_on = asked or any(given is not None for given in (state, past_key_values, cache))
        if output.loss is None and (torch.is_grad_enabled() or reads_on):
            return tuple(getattr(output, name) for name in output)
        # trainers take everything behind the loss, and in predicting all of a tuple, for predictions
        ignored = self.config.keys_to_ignore_at_inference
        return tuple(value for name, value in output.items() if name not in ignored)

    def _goes_in_sweeps(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, state: ModelState | None
    ) -> bool:
        """Whether a gradient will be asked for which a cache, that nobody has asked for, would make costly."""
        batch = rows_and_tokens(input_ids, inputs_embeds)
        return self.model.goes_in_sweeps(*batch, inputs_embeds, *(() if state is None else state.tensors()))

    def _for_the_head(self, hidden: Tensor, kept: slice | Tensor) -> Tensor:
        """The chosen positions of hidden states [B, T, D], where the head is.

        Raises:
            StrategyError: where hidden states are kept off the device, and more than a chunk of them would come back.
        """
        chosen = for_the_head(self, hidden[:, kept.to(hidden.device) if isinstance(kept, Tensor) else kept])
        if self.bptt.hidden_states == "device" or not hidden.requires_grad:
            return chosen
        device = activations(self.model).device
        most = self.model.chunk_length(*chosen.shape[:2], device, handed_out=True)
        if chosen.shape[1] > most:
            raise StrategyError(
                f"hidden_states='host' keeps {chosen.shape[1]:,} tokens off the device, where their logits would be: "
                f"ask for logits_to_keep of at most {most:,}, or split model.model(...).last_hidden_state and give "
                "model.head one piece after another"
            )
        return chosen.to(device)

    @torch.compiler.disable  # two sweeps with a tape between them are no graph
    def _loss(
        self, return_logits: bool, output_hidden_states: bool, return_document_states: bool, **arguments: Any
    ) -> RwkvRevCausalLMOutput:
        """``arguments`` are those of :func:`rwkv_rev.inputs.loss_inputs`."""
        state = arguments["state"]
        refuse_accelerates_ranks()
        given = (arguments["inputs_embeds"], *(() if state is None else state.tensors()))
        refuse_transforms(chain(self.parameters(), (tensor for tensor in given if tensor is not None)))
        inputs = loss_inputs(self, dtype=wide(activations(self.model).dtype), **arguments)
        if return_document_states:
            inputs = with_ends(inputs, arguments["packed"], self.model.context_group)
        length, bptt, evaluating = inputs.length, self.bptt, not (self.training or torch.is_grad_enabled())
        size = self.model.chunk_length(*inputs.targets.shape, inputs.targets.device)
        if self.model.context_group is not None:
            return shared_loss(self, inputs, size, return_logits, output_hidden_states)
        if return_logits or output_hidden_states:
            whole = bptt.strategy in ("full", "auto") and length <= size
            if torch.is_grad_enabled() and not whole:
                asked = "return_logits" if return_logits else "output_hidden_states beside a loss"
                raise StrategyError(
                    f"{asked} needs bptt='full' and a context of at most one chunk: {size} tokens "
                    f"here, not {length} under {bptt.strategy!r}"
                )
            read = self.read_streams if output_hidden_states else self.read
            loss, hidden, after, *streams = loss_in_one_graph(self, inputs, read)
            return RwkvRevCausalLMOutput(
                loss=loss,
                logits=self.head(hidden) if return_logits or evaluating else None,
                state=after.detach(),
                hidden_states=streams[0] if streams else None,
                document_states=beside_a_loss(inputs, loss),
            )
        strategy = choose_strategy(
            auto_as_others(bptt.strategy, self.blocks),
            length,
            chunk_length=size,
            tape=bptt.tape,
            tape_dir=bptt.tape_dir,
            remnants=bptt.remnants,
            at_once=self.model.tokens_at_once(size, *inputs.targets.shape),
        )
        result, logits = loss_and_logits(self, inputs, strategy, deferred=evaluating)
        states = beside_a_loss(inputs, result.loss)
        return RwkvRevCausalLMOutput(
            result.loss, logits, result.state, report=result.report, document_states=states
        )
