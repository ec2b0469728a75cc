"""Configuration of a model: one class for all architectures (:mod:`rwkv_rev.architectures`).

What one of them needs for itself it declares (:class:`~rwkv_rev.architectures.fields.Field`): such a field is an
attribute, an argument and an entry of ``config.json`` like those of the class.
"""

import math
import warnings
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from rwkv_rev.architectures.registry import architecture, with_tuned_state

if TYPE_CHECKING:
    from rwkv_rev.architectures.architecture import Architecture

MOST_LAYERS = 10_000
"""A hundred times the deepest published model; whatever is more is a damaged file, and would take for ever to make."""
MOST_SIZE = 1 << 31
FORMER_FIELDS = {"bptt": "auto", "chunk_length": 1024, "tape": "host", "tape_dir": None}
"""What configurations saved once, and with which defaults."""
_SIZES = ("vocab_size", "hidden_size", "num_attention_heads", "head_size", "intermediate_size")


@strict
class RwkvRevConfig(PreTrainedConfig):
    """Architecture and numerics of a converted RWKV model.

    Folders written by the first version hold settings of a run, too (``bptt``, ``chunk_length``, ``tape``,
    ``tape_dir``): they are ignored, with a warning where they would have changed anything.

    Further arguments are those that the architecture declares.

    Args:
        rwkv_version: the architecture's name: a generation of RWKV, or another of
            :data:`~rwkv_rev.architectures.registry.ARCHITECTURES`.
        vocab_size: V, entries of the vocabulary.
        hidden_size: D, width of the residual stream.
        num_hidden_layers: L, blocks.
        num_attention_heads: H, heads of the time mix of RWKV-5 to 7; 1 by itself for RWKV-4 and whatever has none.
        head_size: N, so that ``D = H * N``; then D.
        intermediate_size: F, width of the channel mix, or of what another architecture has in its place.
        layer_norm_epsilon: eps of every LayerNorm.
        group_norm_epsilon: eps of the GroupNorm after the recurrence of RWKV-5 to 7. Published models divide by
            ``head_size_divisor = 8`` before a GroupNorm of eps 1e-5, which is 64e-5 without the division.
        bonus_is_exponential: the stored bonus is the logarithm of u (RWKV-5.0 files with ``time_first``).
        has_initial_state: the model holds a tuned initial WKV state (RWKV-5 to 7), with which every context begins.

    Raises:
        ValueError: for a version, a size or a value that does not exist or does not fit the others.
    """

    model_type = "rwkv_rev"
    keys_to_ignore_at_inference = ["state", "past_key_values", "cache", "report", "document_states"]  # noqa: RUF012

    rwkv_version: str = "5.2"
    vocab_size: int = 65536
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    head_size: int = 64
    intermediate_size: int = 7168
    layer_norm_epsilon: float = 1e-5
    group_norm_epsilon: float = 64e-5
    bonus_is_exponential: bool = False
    has_initial_state: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True

    def __post_init__(self, **kwargs: object) -> None:
        self._refuse_impossible(kwargs)
        unsaid = (RwkvRevConfig.num_attention_heads, RwkvRevConfig.head_size)
        if not self.architecture.has_heads and (self.num_attention_heads, self.head_size) == unsaid:
            self.num_attention_heads, self.head_size = 1, self.hidden_size
        if self.num_attention_heads * self.head_size != self.hidden_size:
            raise ValueError(
                f"num_attention_heads * head_size = {self.num_attention_heads} * {self.head_size} "
                f"must equal hidden_size = {self.hidden_size}"
            )
        if self.has_initial_state and not self.architecture.tunes_state:
            raise ValueError(
                f"has_initial_state = True needs {with_tuned_state()}: {self.architecture.called} has no state of "
                "matrices"
            )
        self._take_own(kwargs)
        former = {name: kwargs.pop(name) for name in FORMER_FIELDS if name in kwargs}
        changed = [f"{name}={value!r}" for name, value in former.items() if value != FORMER_FIELDS[name]]
        if changed:
            warnings.warn(
                f"{', '.join(changed)}: how gradients are made is no property of a model any more, and ignored here; "
                "call model.set_bptt(strategy, chunk_length=..., tape=..., tape_dir=...)",
                stacklevel=2,
            )
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """What a ``config.json`` says. It must have every field of the architecture's own, as those that are saved do:
        a default in the place of a lost one would be another model.

        Raises:
            ValueError: naming fields that are missing; and as the class.
        """
        version = config_dict.get("rwkv_version", cls.rwkv_version)
        known = architecture(version) if isinstance(version, str) else None
        missing = [name for name in known.fields if name not in config_dict | kwargs] if known else []
        if known and missing:
            raise ValueError(
                f"a configuration of {known.called} says {', '.join(missing)}, and this one does not"
            )
        return super().from_dict(config_dict, **kwargs)

    def _refuse_impossible(self, further: dict[str, object]) -> None:
        """Before anything is made by these numbers."""
        architecture(self.rwkv_version)
        for name in ("num_hidden_layers", *_SIZES):
            size, most = getattr(self, name), MOST_SIZE if name in _SIZES else MOST_LAYERS
            if not 1 <= size <= most:
                raise ValueError(f"{name} = {size} must be from 1 to {most}")
        for name in ("layer_norm_epsilon", "group_norm_epsilon"):
            if not (math.isfinite(epsilon := getattr(self, name)) and 0 < epsilon < 1):
                raise ValueError(f"{name} = {epsilon} must be above 0 and below 1")
        labels = further.get("num_labels")  # a list of so many names would be made
        if isinstance(labels, int) and labels > MOST_LAYERS:
            raise ValueError(f"num_labels = {labels} must be at most {MOST_LAYERS}")

    def _take_own(self, given: dict[str, object]) -> None:
        """Take the architecture's own fields out of what was given."""
        for name, field in self.architecture.fields.items():
            setattr(self, name, field.checked(name, given.pop(name) if name in given else field.value(self)))
        self.architecture.check(self)

    @property
    def layer_types(self) -> list[str]:
        """By these accelerate refuses to cut a context over devices, whose states it would not hand on."""
        return ["linear_attention"] * self.num_hidden_layers

    @layer_types.setter
    def layer_types(self, value: list[str]) -> None:
        if value != self.layer_types:
            raise ValueError(
                f"layer_types = {value}: each of the {self.num_hidden_layers} layers is linear_attention"
            )

    @property
    def architecture(self) -> "Architecture":
        """What the generation says of itself."""
        return architecture(self.rwkv_version)
