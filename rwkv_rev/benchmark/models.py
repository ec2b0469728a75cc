"""Models to measure on: published shapes with the official initialisation.

Maps that the official initialisation sets to zero are drawn from a small normal distribution instead, so that no
matrix product is timed on zeros (which run faster) and every gradient is non-zero.

Ranks of RWKV-7's low-rank maps are those with which the published models were trained, by widths D: in steps of 32, the
nearest to 1.8 sqrt(D) (decay and rate), 1.3 sqrt(D) (residual) and 0.6 D^0.8 (gate). Those of RWKV-6 are its defaults.
"""

import math
from typing import Any

import torch
from torch import nn

from rwkv_rev.architectures.registry import architecture
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.errors import RwkvRevError
from rwkv_rev.foreign.quantised import quantise, told_to_peft
from rwkv_rev.modeling import RwkvRevForCausalLM

STANDARD_DEVIATION = 0.01


def _ranks(width: int) -> dict[str, int]:
    def in_steps(rank: float) -> int:
        return max(32, round(rank / 32) * 32)

    root = math.sqrt(width)
    return {
        "decay_rank": in_steps(1.8 * root),
        "rate_rank": in_steps(1.8 * root),
        "residual_rank": in_steps(1.3 * root),
        "gate_rank": in_steps(0.6 * width**0.8),
    }


SHAPES: dict[str, dict[str, Any]] = {
    "5.2-15m": {"rwkv_version": "5.2", "layers": 6, "width": 448, "vocab": 256},
    "5.2-0.1b": {"rwkv_version": "5.2", "layers": 12, "width": 768, "vocab": 65536},
    "5.2-1.5b": {"rwkv_version": "5.2", "layers": 24, "width": 2048, "vocab": 65536},
    "5.2-7b": {"rwkv_version": "5.2", "layers": 32, "width": 4096, "vocab": 65536},
    "6-1.5b": {"rwkv_version": "6", "layers": 24, "width": 2048, "vocab": 65536},
    "6-3b": {"rwkv_version": "6", "layers": 32, "width": 2560, "vocab": 65536},
    "6-7b": {"rwkv_version": "6", "layers": 32, "width": 4096, "vocab": 65536},
    "6-14b": {"rwkv_version": "6", "layers": 61, "width": 4096, "vocab": 65536},
    "7-0.1b": {"rwkv_version": "7", "layers": 12, "width": 768, "vocab": 65536, **_ranks(768)},
    "7-1.5b": {"rwkv_version": "7", "layers": 24, "width": 2048, "vocab": 65536, **_ranks(2048)},
    "7-3b": {"rwkv_version": "7", "layers": 32, "width": 2560, "vocab": 65536, **_ranks(2560)},
    "7-7b": {"rwkv_version": "7", "layers": 32, "width": 4096, "vocab": 65536, **_ranks(4096)},
    "7-13b": {"rwkv_version": "7", "layers": 61, "width": 4096, "vocab": 65536, **_ranks(4096)},
    "4-0.1b": {"rwkv_version": "4", "layers": 12, "width": 768, "vocab": 50277},
    "4-0.4b": {"rwkv_version": "4", "layers": 24, "width": 1024, "vocab": 50277},
}
"""Names are version and size; heads are 64 wide. Other keys are fields of the configuration."""


def shape_config(name: str) -> RwkvRevConfig:
    """Configuration of a published shape.

    Raises:
        RwkvRevError: if ``name`` is not in :data:`SHAPES`.
    """
    if name not in SHAPES:
        raise RwkvRevError(f"no model shape is called {name!r}; there are {', '.join(SHAPES)}")
    shape = dict(SHAPES[name])
    width, vocabulary, layers = (shape.pop(key) for key in ("width", "vocab", "layers"))
    return RwkvRevConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        **architecture(shape["rwkv_version"]).sizes(width),
        **shape,
    )


def benchmark_model(
    name: str, device: torch.device, dtype: torch.dtype, seed: int = 0, quantised: str | None = None
) -> RwkvRevForCausalLM:
    """The model of a shape on ``device``, weights in ``dtype`` (but what the architecture keeps in float32).

    ``quantised``: kind of the frozen maps in 4 or 8 bits (:mod:`rwkv_rev.foreign.quantised`).
    """
    torch.manual_seed(seed)
    if quantised is not None:
        return _quantised_model(shape_config(name), device, dtype, quantised)
    with torch.device(device):
        model = RwkvRevForCausalLM(shape_config(name))
    _fill_zeros(model)
    _narrow(model, dtype, model.config.architecture.float32)
    return model.train()


def _quantised_model(
    config: RwkvRevConfig, device: torch.device, dtype: torch.dtype, kind: str
) -> RwkvRevForCausalLM:
    """The model made part by part, each quantised before the next: more than one is never there in float32."""
    with torch.device("meta"):
        model = RwkvRevForCausalLM(config)
    body = model.model
    for part in (body.embeddings, body.ln0, *body.blocks, body.ln_out, model.head):
        part.to_empty(device=device)
        for parameter in part.parameters():
            parameter.data.fill_(math.nan)
        for module in reversed(list(part.modules())):  # a cell after what it is made of
            model._init_weights(module)
        if missing := [one for one, parameter in part.named_parameters() if parameter.isnan().any()]:
            raise RwkvRevError(f"nothing initialises {', '.join(missing)}")
        _fill_zeros(part)
        if part is not model.head:
            quantise(part, kind, dtype, device)
        _narrow(part, dtype, config.architecture.float32)
    told_to_peft(model, kind)
    return model.train()


@torch.no_grad()
def _fill_zeros(module: nn.Module) -> None:
    for one in module.modules():
        if isinstance(one, nn.Linear) and not one.weight.any():
            one.weight.normal_(std=STANDARD_DEVIATION)


def _narrow(module: nn.Module, dtype: torch.dtype, wide: tuple[str, ...]) -> None:
    for name, parameter in module.named_parameters():
        if name.split(".")[-1] not in wide and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def matrix_parameters(model: nn.Module) -> int:
    """Weights that take part in matrix products (Linear layers); 6 floating-point operations each per token."""
    return sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear))
