"""Models, texts and comparisons for the tests of gradient strategies.

Tests import it as ``from bptt_cases import tiny_model``.
"""

import copy
import io
import pickle
import pydoc_data.topics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rwkv_rev import RwkvRevConfig, RwkvRevForCausalLM, RwkvRevState
from rwkv_rev.wkv import naive, use_kernel

VERSIONS = ("4", "5.0", "5.1", "5.2", "6", "7")
RANKS = {
    "6": {"mix_rank": 6, "decay_rank": 5},
    "7": {"decay_rank": 5, "rate_rank": 6, "residual_rank": 7, "gate_rank": 9},
}

AGREE = 1e-5
"""Relative RMS error, per parameter, between float32 gradients of strategies that must agree."""
AS_CLOSE = 1.5
"""How much farther from float64 than ``full`` in the same precision a strategy may be."""


def tiny_model(
    version: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> RwkvRevForCausalLM:
    """A random model in training mode whose every parameter matters.

    Decays run from slow to fast, mixes leave [0, 1] on both sides, no map is zero. Equal arguments give equal values.
    Of ``config``, ``bptt`` and ``chunk_length`` are set on the model; the rest makes the configuration.
    """
    bptt, chunk_length = config.pop("bptt", "auto"), config.pop("chunk_length", None)
    with torch.random.fork_rng(devices=[]):  # whoever makes the first one draws no more than others
        model = _tiny_model(version, seed, tuple(config.items())).copied()
    model.set_bptt(bptt, chunk_length=chunk_length)
    return model.to(dtype).train()


class _Kept:
    """A model that is copied often: as by ``copy.deepcopy``, in a fifth of its time."""

    class Writer(pickle.Pickler):
        """Leaves tensors out, but for their numbers."""

        def persistent_id(self, value: Any) -> int | None:
            if not isinstance(value, Tensor):
                return None
            self.tensors[id(value)] = value
            return id(value)

    class Reader(pickle.Unpickler):
        def persistent_load(self, number: int) -> Tensor:
            return self.tensors[number]

    def __init__(self, model: RwkvRevForCausalLM) -> None:
        buffer = io.BytesIO()
        writer = self.Writer(buffer)
        writer.tensors = self.tensors = {}
        writer.dump(model)
        self.others = buffer.getvalue()

    def copied(self) -> RwkvRevForCausalLM:
        reader = self.Reader(io.BytesIO(self.others))
        reader.tensors = copy.deepcopy(self.tensors)
        return reader.load()


@cache
def _tiny_model(version: str, seed: int, config: tuple[tuple[str, Any], ...]) -> _Kept:
    """In float32. Making one takes far longer than copying it."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 32, "intermediate_size": 32} | dict(
        config
    )
    head_size = sizes["hidden_size"] if version == "4" else sizes.pop("head_size", 8)
    sizes = RANKS.get(version, {}) | sizes
    model = RwkvRevForCausalLM(
        RwkvRevConfig(
            rwkv_version=version,
            num_attention_heads=sizes["hidden_size"] // head_size,
            head_size=head_size,
            bonus_is_exponential=version == "5.0",
            **sizes,
        )
    )
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: Tensor) -> Tensor:
        return torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = normal(parameter)
            if "time_decay" in name:
                value = -2.5 + 1.5 * noise
            elif "mix_" in name and parameter.dim() == 1:
                value = 0.5 + 0.5 * noise
            elif "bonus" in name:
                value = 0.5 * noise
            elif name.endswith("_base"):  # what a sigmoid is taken of
                value = 1.5 * noise - (3.0 if "decay" in name else 0.0)
            elif name.endswith("_scale"):
                value = 1 + 0.3 * noise
            elif parameter.dim() == 2:
                value = noise / parameter.shape[1] ** 0.5
            else:
                value = 0.2 * noise + (1.0 if name.endswith("weight") else 0.0)
            parameter.copy_(value)
    return _Kept(model)


def load(
    directory: Path, dtype: torch.dtype = torch.float32, layers: int | None = None
) -> RwkvRevForCausalLM:
    """A converted model in training mode, all of it or its lowest layers."""
    written = max((file.stat().st_mtime_ns for file in Path(directory).iterdir()), default=0)
    with torch.random.fork_rng(devices=[]):  # as in tiny_model
        return _loaded(directory, dtype, layers, written).copied()


@cache
def _loaded(directory: Path, dtype: torch.dtype, layers: int | None, written: int) -> _Kept:
    """Of a folder as it was when something was last ``written`` in it."""
    depth = {} if layers is None else {"num_hidden_layers": layers}
    return _Kept(RwkvRevForCausalLM.from_pretrained(directory, dtype=dtype, **depth).train())


def english(length: int, batch: int = 1) -> Tensor:
    """Real text as byte tokens [batch, length]; rows are different places of Python's own reference."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    return torch.tensor([list(text[place : place + length]) for place in range(0, 50_000 * batch, 50_000)])


def random_tokens(length: int, batch: int = 1, vocab: int = 32, seed: int = 1) -> Tensor:
    """Random token ids [batch, length]."""
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_state(
    model: RwkvRevForCausalLM, batch: int, seed: int = 2, *, learned: bool = False
) -> RwkvRevState:
    """A non-empty state as some text would leave it; ``learned`` makes its tensors require gradients."""
    tokens = random_tokens(23, batch, model.config.vocab_size, seed)
    with torch.no_grad():
        state = model(tokens).state
    return state.each(lambda tensor: tensor.detach().clone().requires_grad_(learned))


def random_like(state: RwkvRevState, seed: int = 3) -> RwkvRevState:
    """Random values in the shapes of ``state``."""
    generator = torch.Generator().manual_seed(seed)
    return state.each(lambda t: torch.randn(t.shape, generator=generator).to(t.dtype))


@dataclass
class Outcome:
    """What one forward and backward pass gave; parameters without a gradient are absent."""

    loss: Tensor
    state: RwkvRevState
    gradients: dict[str, Tensor]
    report: dict[str, Any]


def differentiate(
    model: RwkvRevForCausalLM, strategy: str, chunk_length: int | None = None, **inputs: Any
) -> Outcome:
    """Loss, final state and parameter gradients of ``model(**inputs)``; labels are the input ids unless given."""
    if "input_ids" in inputs:
        inputs.setdefault("labels", inputs["input_ids"])
    model.zero_grad()
    with model.set_bptt(strategy, chunk_length=chunk_length):
        output = model(**inputs)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Outcome(output.loss.detach(), output.state, gradients, output.report)


class _Recomputed(torch.autograd.Function):
    """A scan that keeps its arguments alone and runs again, with a graph, when its gradient is wanted."""

    @staticmethod
    def forward(ctx: Any, scan: Callable[..., tuple[Tensor, Tensor]], *arguments: Tensor | None) -> Any:
        ctx.scan = scan
        ctx.save_for_backward(*arguments)
        return scan(*arguments)

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> Any:
        arguments = [None if x is None else x.detach().requires_grad_() for x in ctx.saved_tensors]
        wanted = [x for x in arguments if x is not None]
        with torch.enable_grad():
            found = iter(torch.autograd.grad(ctx.scan(*arguments), wanted, arriving))
        return None, *(None if x is None else next(found) for x in arguments)


@contextmanager
def naive_recomputed() -> Iterator[None]:
    """The naive kernel, whose states are in memory for one layer at a time.

    Activation checkpointing would do the same with a hook on every tensor of every token, which costs as much again as
    all else. Without masks.
    """
    with use_kernel("naive"), pytest.MonkeyPatch.context() as patch:
        for name in ("wkv4", "wkv5", "wkv6", "wkv7"):
            patch.setattr(naive, name, partial(_Recomputed.apply, getattr(naive, name)))
        yield


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference over that of ``truth``; 0 where both are zero."""
    dtype = torch.complex128 if truth.is_complex() else torch.float64
    value, truth = value.detach().to(dtype), truth.detach().to(dtype)
    error, size = (value - truth).norm(), truth.norm()
    return 0.0 if error == 0 else float(error / size)


def relative_errors(values: dict[str, Tensor], truths: dict[str, Tensor]) -> dict[str, float]:
    """:func:`relative_error` by parameter."""
    assert values.keys() == truths.keys()
    return {name: relative_error(values[name], truth) for name, truth in truths.items()}


def grouped_errors(values: dict[str, Tensor], truths: dict[str, Tensor]) -> dict[str, float]:
    """Relative RMS error by kind of parameter, all layers together; ``all`` is the whole gradient."""
    squares: dict[str, list[float]] = {}
    assert values.keys() == truths.keys()
    for name, truth in truths.items():
        value = values[name]
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        error = float((value.double() - truth.double()).square().sum())
        size = float(truth.double().square().sum())
        for group in (kind, "all"):
            total = squares.setdefault(group, [0.0, 0.0])
            total[0] += error
            total[1] += size
    return {group: (error / size) ** 0.5 for group, (error, size) in squares.items()}


def assert_agree(value: Outcome, truth: Outcome, tolerance: float = AGREE) -> None:
    """Loss, every parameter's gradient and the final state within ``tolerance``, relatively."""
    assert relative_error(value.loss, truth.loss) <= tolerance
    errors = relative_errors(value.gradients, truth.gradients)
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= tolerance, (worst, errors[worst])
    for found, expected in zip(value.state.tensors(), truth.state.tensors(), strict=True):
        assert relative_error(found, expected) <= tolerance


def assert_same_bits(value: Outcome, truth: Outcome) -> None:
    """Loss, every gradient and the final state equal to the bit."""
    assert value.loss.item() == truth.loss.item()
    assert value.gradients.keys() == truth.gradients.keys()
    for name, expected in truth.gradients.items():
        assert torch.equal(value.gradients[name], expected), name
    for found, expected in zip(value.state.tensors(), truth.state.tensors(), strict=True):
        assert torch.equal(found, expected)


def checkpoint_blocks(model: RwkvRevForCausalLM) -> None:
    """Switch per-block activation checkpointing on, by the name that the installed transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


@contextmanager
def default_device(name: str) -> Iterator[None]:
    """PyTorch's default device is another one within."""
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)
        vars(torch._GLOBAL_DEVICE_CONTEXT).pop("device_context", None)  # torch 2.9 looks into None
