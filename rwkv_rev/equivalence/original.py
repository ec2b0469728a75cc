"""The original model as the oracles see it: tensors under BlinkDL's names, whatever file they came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from rwkv_rev.equivalence.naive_model import PUBLISHED_GROUP_NORM_EPSILON


@dataclass(frozen=True)
class Original:
    """What a converted model is held against.

    Attributes:
        tensors: state dict under BlinkDL's names; may load each tensor when it is asked for.
        label: the SOURCE in its own grammar, for people.
        group_norm_epsilon: eps of the GroupNorm the original was trained with: the published value, unless
            the one who converted it said otherwise. Never taken from the converted model's config alone.
        transformers_tensors: the same values under the names of ``transformers.RwkvForCausalLM``; None for
            RWKV-5.
        expected: a ``*.expected.json`` beside the checkpoint, if there is one.
    """

    tensors: Mapping[str, Tensor]
    label: str
    group_norm_epsilon: float = PUBLISHED_GROUP_NORM_EPSILON
    transformers_tensors: Mapping[str, Tensor] | None = field(default=None, repr=False)
    expected: Path | None = None

    @property
    def num_layers(self) -> int:
        """L, counted in the tensors."""
        layers = 0
        while f"blocks.{layers}.ln1.weight" in self.tensors:
            layers += 1
        return layers

    @property
    def has_heads(self) -> bool:
        """Whether this is an RWKV-5."""
        return "blocks.0.att.ln_x.weight" in self.tensors
