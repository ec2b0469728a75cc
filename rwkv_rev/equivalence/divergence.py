"""Where two models part: the first sub-layer after which the residual streams differ.

The converted model runs in float32 with a hook on each LayerNorm, whose input is the residual stream: ln1
of a block sees what the block before left, ln2 what the time mix left, ln_out the end. The naive float64
scan over the original's tensors gives the same streams. Their distance is relative, rms(difference) /
rms(stream): streams grow with depth.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rwkv_rev.equivalence.naive_model import residual_streams
from rwkv_rev.equivalence.original import Original

# float32 noise on the trained models of the tests stays below 2e-6 at every depth.
STREAM_TOLERANCE = 2e-5


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


def converted_streams(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """Residual streams ``[T, D]`` of a converted model, under the places of :func:`.residual_streams`.

    Args:
        model: an ``RwkvRevForCausalLM`` in eval mode.
        tokens: ids ``[T]``.
    """
    pieces: dict[str, list[Tensor]] = {}
    layers = model.config.num_hidden_layers
    places = {"model.blocks.0.ln1": "ln0", "model.ln_out": f"blocks.{layers - 1}.channel_mix"}
    for i in range(layers):
        places[f"model.blocks.{i}.ln2"] = f"blocks.{i}.time_mix"
        if i:
            places[f"model.blocks.{i}.ln1"] = f"blocks.{i - 1}.channel_mix"
    handles = []
    for name, place in places.items():

        def keep(module: nn.Module, arguments: tuple[Tensor, ...], place: str = place) -> None:
            pieces.setdefault(place, []).append(arguments[0].detach().flatten(0, -2).clone())

        handles.append(model.get_submodule(name).register_forward_pre_hook(keep))

    def keep_normed(module: nn.Module, arguments: tuple[Tensor, ...], out: Tensor) -> None:
        pieces.setdefault("ln_out", []).append(out.detach().flatten(0, -2).clone())

    handles.append(model.get_submodule("model.ln_out").register_forward_hook(keep_normed))
    try:
        with torch.no_grad():
            model(input_ids=tokens[None])
    finally:
        for handle in handles:
            handle.remove()
    return {place: torch.cat(parts) for place, parts in pieces.items()}


def first_divergence(model: PreTrainedModel, original: Original, tokens: Tensor) -> Divergence:
    """The first place where ``model`` leaves the naive scan over the original's tensors.

    Where all streams agree the difference is behind them: the head.
    """
    streams = converted_streams(model, tokens)
    for place, stream in residual_streams(
        original.tensors,
        tokens,
        group_norm_epsilon=original.group_norm_epsilon,
        layer_norm_epsilon=original.layer_norm_epsilon,
    ):
        difference = streams[place].double() - stream
        error = float(difference.square().mean().sqrt() / stream.square().mean().sqrt())
        if not error <= STREAM_TOLERANCE:  # NaN diverges too
            return Divergence(_readable(place), error)
    return Divergence("head", None)


def place_of(name: str) -> str:
    """The place a tensor of a converted model acts on, in the words of :class:`Divergence`."""
    parts = name.split(".")
    if parts[:2] == ["model", "blocks"]:
        time_mix = parts[3] in ("ln1", "time_mix")
        return f"block {parts[2]} {'time mix' if time_mix else 'channel mix'}"
    if parts[1] in ("embeddings", "ln0"):
        return "embeddings"
    return parts[1] if parts[0] == "model" else "head"


def _readable(place: str) -> str:
    if place.startswith("blocks."):
        _, layer, mix = place.split(".")
        return f"block {layer} {mix.replace('_', ' ')}"
    return "embeddings" if place == "ln0" else place
