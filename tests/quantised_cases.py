"""Models with weights in 4 and 8 bits, and the float64 models of the weights that those stand for."""

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from bptt_cases import english
from torch import Tensor, nn

from rwkv_rev import RwkvRevForCausalLM
from rwkv_rev.foreign.quantised import is_quantised

TARGETS = ["receptance", "key", "value", "output"]


def config_of(kind: str, compute: torch.dtype, **settings: Any) -> Any:
    """transformers' settings for a kind."""
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **{"llm_int8_threshold": 0.0} | settings)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        **settings,
    )


def quantised(
    folder: Path, kind: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **settings: Any
) -> RwkvRevForCausalLM:
    """The model of a folder as transformers quantises it, in training mode, frozen."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=config_of(kind, dtype, **settings),
        dtype=dtype,
        device_map={"": device},
    )
    return model.requires_grad_(False).train()


def with_lora(model: RwkvRevForCausalLM, targets: list[str] = TARGETS, **settings: Any) -> Any:
    """peft's wrapper, with additions that are not zero."""
    import peft

    torch.manual_seed(
        1
    )  # with which no GroupNorm divides by nearly nothing, where 16 bits are far from float64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=targets, **settings))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((0.05 * noise).to(parameter.device, parameter.dtype))
    return wrapped.train()


def stands_for(layer: Any) -> Tensor:
    """The weights [out, in] of a quantised map, float64."""
    from bitsandbytes import functional

    state = getattr(layer, "state", None)
    if state is None:
        return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    scale = layer.weight.SCB if state.SCB is None else state.SCB
    return layer.weight.data.double() * (scale.double() / 127)[:, None]


class Rounded(nn.Linear):
    """In float64 what int8 computes on a GPU: rows rounded to 8 bits, through which the gradient goes unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        halved = x.detach().half().double()
        largest = halved.abs().amax(-1, keepdim=True)
        rounded = torch.round(halved * (127 / largest)) * (largest / 127)
        return nn.functional.linear(x + (rounded - x).detach(), self.weight)


def in_float64(wrapped: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The same model with the weights that its own stand for, in float64 (or another ``dtype``)."""
    rounds = next(wrapped.parameters()).is_cuda
    skeleton: Any = copy.deepcopy(wrapped)
    for path, layer in list(skeleton.named_modules()):
        if not is_quantised(type(layer)):
            continue
        kind = Rounded if rounds and getattr(layer, "state", None) is not None else nn.Linear
        plain = kind(layer.in_features, layer.out_features, bias=False)
        plain.weight.data = stands_for(layer)
        plain.requires_grad_(False)
        parent, _, name = path.rpartition(".")
        setattr(skeleton.get_submodule(parent), name, plain)
    return skeleton.to(dtype)


def gradients(
    model: Any, wrapped: Any, strategy: str, length: int, ids: Tensor | None = None, **inputs: Any
) -> dict[str, Tensor]:
    """The loss, and the gradients of what is trained, by name."""
    wrapped.zero_grad()
    if ids is None:
        ids = english(48, 2)
    ids = ids.to(next(model.parameters()).device)
    with model.set_bptt(strategy, chunk_length=length):
        loss = wrapped(input_ids=ids, labels=ids, **inputs).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


class Heard(logging.Handler):
    """The messages of a logger."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())
