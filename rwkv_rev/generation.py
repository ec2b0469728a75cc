"""``generate`` with the state as its cache: every token is read once, on every supported transformers.

The tokens handed to ``generate`` together with a state are those *after* that state. What ``generate`` can be asked for
but a recurrent state cannot do is refused by name.
"""

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import GenerationMode
from transformers.utils import ModelOutput

from rwkv_rev.cache import CACHE_NAME, RwkvRevCache, handed_over, repeated
from rwkv_rev.distributed.shards import blocks_are_sharded
from rwkv_rev.foreign.adapters import refuse_carried_state
from rwkv_rev.inputs import rows_and_tokens, valid_tokens
from rwkv_rev.packed_rows import PACKED, given_borders

MODES = {
    GenerationMode.GREEDY_SEARCH: "greedy",
    GenerationMode.SAMPLE: "sampled",
    GenerationMode.BEAM_SEARCH: "beams",
    GenerationMode.BEAM_SAMPLE: "sampled beams",
    GenerationMode.ASSISTED_GENERATION: "assisted",
}
"""The kinds of generation that work."""

UNCHANGED = "unchanged_past"
"""Where the loops of ``generate`` carry a past that no step may change (``use_cache=False``).

transformers must not know the name: it would reorder, return or replace what it takes for a cache.
"""

_OF_THE_LOOP = ("tokenizer", "assistant_tokenizer")
"""What ``generate`` is given for itself (``stop_strings``), and some of its loops hand on to ``forward``."""


class RwkvRevGenerationMixin(GenerationMixin):
    """transformers' ``generate`` for a model whose ``forward`` takes and gives a :class:`RwkvRevCache`."""

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """What ``generate`` begins with, before anything is counted in it."""
        transformers: Any = super()
        tensor, name, *others = transformers._prepare_model_inputs(*args, **kwargs)
        rows_and_tokens(*((None, tensor) if name == "inputs_embeds" else (tensor, None)))
        return tensor, name, *others

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of the next forward pass: the whole prompt at first, then what was not read yet.

        The past is called ``past_key_values`` among them whatever transformers calls it: peft looks there whether
        its virtual tokens have been read.
        """
        past = kwargs.get(CACHE_NAME)
        if is_first_iteration:
            next_sequence_length = None  # old transformers would cut off as many tokens as the state has read
        elif next_sequence_length is None and past is not None and past.is_croppable:
            # an assistant is called with the whole text again and again
            next_sequence_length = input_ids.shape[1] - past.get_seq_length()
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if inputs.get("borders") is not None:
            inputs["borders"] = _borders_of(inputs, input_ids, inputs_embeds)
        for name in _OF_THE_LOOP:
            inputs.pop(name, None)
        past, unchanged = inputs.pop(CACHE_NAME, None), inputs.pop(UNCHANGED, None)
        inputs["past_key_values"] = unchanged if past is None else past
        return inputs

    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """A copy of each row for each beam; called once, before anything is read.

        What tells of the prompt's documents becomes borders [B, T] first, which are copied as the rows are.
        """
        packed = {name: kwargs.pop(name) for name in PACKED if name in kwargs}
        if packed or kwargs.get("borders") is not None:
            embedded = kwargs.get("inputs_embeds")
            prompt: Tensor = kwargs["input_ids"] if embedded is None else embedded
            rows, length = prompt.shape[:2]
            valid = valid_tokens(kwargs.get("attention_mask"), length, rows)
            borders = kwargs.get("borders")
            # an assistant is handed the borders of the prompt each time, with what was generated behind it
            if borders is None or packed or borders.shape[1:] == (length,):
                kwargs["borders"] = given_borders(packed, borders, valid, rows, length, embedded=True)
        transformers: Any = super()
        return transformers._expand_inputs_for_generation(*args, **kwargs)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Put a cache into ``model_kwargs``: the past handed over, a row for each beam, or an empty one."""
        refuse_settings(generation_config, generation_mode, "inputs_embeds" in model_kwargs)
        refuse_masked_ends(model_kwargs.get("attention_mask"))
        if blocks_are_sharded(cast(Any, self).blocks):
            if not getattr(
                self, "_is_fsdp_managed_module", False
            ):  # by which transformers keeps processes in step
                raise ValueError("the blocks are sharded, and the model is not: call fully_shard(model), too")
            refuse_with_shards(model_kwargs, generation_config, generation_mode)
        generation_config.prefill_chunk_size = None  # forward reads a prompt in chunks of its own
        names = ("state", "past_key_values", "cache")
        state, given = handed_over(**{name: model_kwargs.pop(name, None) for name in names})
        cache = RwkvRevCache(state) if given is None else given
        if generation_config.use_cache is not False:
            refuse_carried_state(cast(nn.Module, self))
        if cache.reordered:
            raise ValueError(
                "this cache holds the beams as they ran, not the sequences that beam search returned; "
                "read a returned sequence again to go on from it"
            )
        if generation_config.is_assistant:  # called for every draft, with the cache of the draft before
            cache.activate_past_recording()
            model_kwargs[CACHE_NAME] = cache
            return
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        if state is not None and copies > 1 and state.batch_size == batch_size:
            state = repeated(state, copies)
            cache = RwkvRevCache(state)
        if generation_config.use_cache is False:
            if state is not None:
                model_kwargs[UNCHANGED] = RwkvRevCache(state)
            return
        cache.start()
        cache._is_user_defined = cache is given  # so that no step too many is taken with it on MPS
        model_kwargs[CACHE_NAME] = cache

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """The cache goes on to the next step; the state beside it does not, which old transformers would carry."""
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, **kwargs
        )
        updated.pop("state", None)
        return updated

    def _get_deprecated_gen_repo(
        self, generation_mode: GenerationMode, *args: Any, **kwargs: Any
    ) -> str | None:
        """Refuse other kinds of generation, before transformers would fetch their code."""
        if generation_mode not in MODES:
            raise ValueError(
                f"{generation_mode.value.replace('_', ' ')} is not supported with a recurrent state; "
                f"use one of: {', '.join(MODES.values())}"
            )
        repository: str | None = super()._get_deprecated_gen_repo(generation_mode, *args, **kwargs)
        return repository

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: it packs keys and values into pages.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "continuous batching (cache_implementation='paged', generate_batch) pages keys and values, which a "
            "recurrent model does not have; call generate with a left-padded batch"
        )


def _borders_of(inputs: dict[str, Any], text: Tensor, prompt: Tensor | None) -> Tensor | None:
    """Those of the tokens that are read now; what is generated begins no document.

    Args:
        inputs: of the next forward pass; its ``borders`` are the prompt's.
        text: ids of all tokens so far, without the prompt where that was ``prompt``, embeddings.
    """
    if prompt is not None and inputs.get("inputs_embeds") is None:
        return None
    borders: Tensor = inputs["borders"]
    length = borders.shape[1]
    told, read = (text.shape[1], inputs["input_ids"].shape[1]) if prompt is None else (length, length)
    if told - read >= length:  # the prompt has been read
        return None
    return F.pad(borders, (0, told - length))[:, told - read :]


def refuse_masked_ends(mask: Tensor | None) -> None:
    """Raise ValueError for a prompt whose last token is masked: what follows would follow padding."""
    if mask is not None and mask.dim() == 2 and not bool(mask[:, -1:].all()):
        raise ValueError(
            "the last token of a prompt is masked, and its text would go on from padding: pad on the left "
            "(tokenizer.padding_side = 'left'), and hand over the mask of a prompt that ends with the pad token"
        )


def refuse_with_shards(kwargs: dict[str, Any], config: GenerationConfig, mode: GenerationMode) -> None:
    """Raise ValueError for what processes that generate sequences of different lengths together cannot do.

    The one that has ended goes on reading, to gather weights for the others: its state is no longer that of its text.
    """
    if mode == GenerationMode.ASSISTED_GENERATION or config.is_assistant:
        raise ValueError(
            "assisted generation by a sharded model: processes would take different numbers of steps"
        )
    handed = any(kwargs.get(name) is not None for name in ("past_key_values", "cache"))
    if (handed or config.return_dict_in_generate) and config.use_cache is not False:
        raise ValueError(
            "a sharded model generates without handing out its cache, which would have read on to the end of the "
            "longest sequence of all processes: give a state (state=...), and leave return_dict_in_generate out"
        )


def refuse_settings(config: GenerationConfig, mode: GenerationMode, has_embeddings: bool) -> None:
    """Raise ValueError for settings that a recurrent state cannot follow, or only wrongly."""
    if config.cache_implementation is not None:
        raise ValueError(
            f"cache_implementation={config.cache_implementation!r} is a store of keys and values; "
            "this model's cache is its state, so leave the argument out"
        )
    if config.output_attentions:
        raise ValueError("output_attentions=True: a recurrent model has no attentions to return")
    assisted = mode == GenerationMode.ASSISTED_GENERATION
    if assisted and config.assistant_early_exit is not None:
        raise ValueError(
            "assistant_early_exit: the first layers alone are no assistant here; use assistant_model"
        )
    if assisted and has_embeddings:
        raise ValueError("assisted generation begins with input_ids, not with inputs_embeds alone")
    guided = config.guidance_scale not in (None, 1)
    if guided and mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            "guidance_scale follows each row token by token, which neither beams nor an assistant do; "
            "use num_beams=1 and no assistant"
        )
