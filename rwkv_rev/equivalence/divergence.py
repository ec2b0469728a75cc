"""Where two models part: the first sub-layer after which the residual streams differ.

Both streams are float64: the converted model's stored values through its own blocks (:mod:`.float64`), and the naive
scan over the original's tensors. Rounding there is 1e-15 to 1e-13, so that a difference which moves a logit by less
than float32 rounds is still found in its own block. The distance is relative, rms(difference) / rms(stream): streams
grow with depth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rwkv_rev.converters.converted import ConvertedModel
from rwkv_rev.equivalence.float64 import float64_logits, float64_streams
from rwkv_rev.equivalence.logits import largest_difference
from rwkv_rev.equivalence.naive_model import residual_streams
from rwkv_rev.equivalence.oracles import naive
from rwkv_rev.equivalence.original import Original
from rwkv_rev.modeling import RwkvRevForCausalLM

STREAM_TOLERANCE = 1e-11
"""Relative; logits of up to 100 then agree to 1e-9, which is their own tolerance."""


@dataclass(frozen=True)
class Divergence:
    """First place where the streams part.

    Attributes:
        place: ``embeddings``, ``block I time mix``, ``block I channel mix``, ``ln_out`` or ``head``.
        error: rms of the difference over rms of the original's stream there; None for ``head``, before which
            all streams agree.
    """

    place: str
    error: float | None

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.place} (all residual streams agree)"
        return f"{self.place} (relative difference of the residual stream {self.error:.1e})"


def first_divergence(
    model: RwkvRevForCausalLM, stored: ConvertedModel, original: Original, tokens: Tensor, tolerance: float
) -> Divergence | None:
    """The first place where a converted model leaves the naive scan over the original's tensors.

    Args:
        model, stored: as for :func:`.float64_streams`.
        tokens: ids ``[T]``.
        tolerance: largest |delta logit| in float64.

    Returns:
        None where the models are the same.
    """
    assert original.scan is not None  # without one there is no row that could fail
    scan = residual_streams(
        original.tensors,
        tokens,
        scan=original.scan,
        group_norm_epsilon=original.group_norm_epsilon,
        layer_norm_epsilon=original.layer_norm_epsilon,
    )
    for (place, stream), (_, converted) in zip(scan, float64_streams(model, stored, tokens), strict=True):
        error = float((converted - stream).square().mean().sqrt() / stream.square().mean().sqrt())
        if not error <= STREAM_TOLERANCE:  # NaN diverges too
            return Divergence(_readable(place), error)
    logits = float64_logits(model, stored, tokens)
    if not largest_difference(naive(original, tokens), logits) <= tolerance:
        return Divergence("head", None)
    return None


def place_of(name: str, cells: Sequence[tuple[str, str]]) -> str:
    """The place a tensor of a converted model acts on, in the words of :class:`Divergence`.

    ``cells``: the names of a block's (norm, cell).
    """
    parts = name.split(".")
    if parts[:2] == ["model", "blocks"]:
        cell = next(cell for norm, cell in cells if parts[3] in (norm, cell))
        return f"block {parts[2]} {cell.replace('_', ' ')}"
    if parts[1] in ("embeddings", "ln0"):
        return "embeddings"
    return parts[1] if parts[0] == "model" else "head"


def _readable(place: str) -> str:
    if place.startswith("blocks."):
        _, layer, mix = place.split(".")
        return f"block {layer} {mix.replace('_', ' ')}"
    return "embeddings" if place == "ln0" else place
