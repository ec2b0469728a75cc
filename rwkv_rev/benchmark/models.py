"""Models to measure on: published shapes with the official initialisation.

Maps that the official initialisation sets to zero are drawn from a small normal distribution instead, so that no
matrix product is timed on zeros (which run faster) and every gradient is non-zero.
"""

import torch
from torch import nn

from rwkv_rev.architectures.registry import architecture
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.errors import RwkvRevError
from rwkv_rev.modeling import RwkvRevForCausalLM

STANDARD_DEVIATION = 0.01

SHAPES: dict[str, dict[str, int | str]] = {
    "5.2-15m": {"rwkv_version": "5.2", "layers": 6, "width": 448, "vocab": 256},
    "5.2-0.1b": {"rwkv_version": "5.2", "layers": 12, "width": 768, "vocab": 65536},
    "5.2-1.5b": {"rwkv_version": "5.2", "layers": 24, "width": 2048, "vocab": 65536},
    "5.2-7b": {"rwkv_version": "5.2", "layers": 32, "width": 4096, "vocab": 65536},
    "4-0.1b": {"rwkv_version": "4", "layers": 12, "width": 768, "vocab": 50277},
    "4-0.4b": {"rwkv_version": "4", "layers": 24, "width": 1024, "vocab": 50277},
}
"""Names are version and size; 5.2 heads are 64 wide."""


def shape_config(name: str) -> RwkvRevConfig:
    """Configuration of a published shape.

    Raises:
        RwkvRevError: if ``name`` is not in :data:`SHAPES`.
    """
    if name not in SHAPES:
        raise RwkvRevError(f"no model shape is called {name!r}; there are {', '.join(SHAPES)}")
    shape = SHAPES[name]
    width, version = int(shape["width"]), str(shape["rwkv_version"])
    return RwkvRevConfig(
        rwkv_version=version,
        vocab_size=int(shape["vocab"]),
        hidden_size=width,
        num_hidden_layers=int(shape["layers"]),
        **architecture(version).sizes(width),
    )


def benchmark_model(name: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> RwkvRevForCausalLM:
    """The model of a shape on ``device``, weights in ``dtype`` (but what the architecture keeps in float32)."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = RwkvRevForCausalLM(shape_config(name))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and not module.weight.any():
                module.weight.normal_(std=STANDARD_DEVIATION)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.split(".")[-1] not in model.config.architecture.float32:
            parameter.data = parameter.data.to(dtype)
    return model.train()


def matrix_parameters(model: nn.Module) -> int:
    """Weights that take part in matrix products (Linear layers); 6 floating-point operations each per token."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
