"""What stands in the place of ``ln_x``, the norm of a memory's heads: a plain one is computed by its formula alone."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from bptt_cases import assert_agree, differentiate, random_tokens, tiny_model
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from rwkv_rev import RwkvRevForCausalLM, position_wise

VERSIONS = ("5.0", "5.2", "6", "7")
IDS = random_tokens(13, 2)
CHUNK = 5
AGREE = 1e-10


@position_wise
class Halved(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


@position_wise
class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


def norms(version: str) -> tuple[RwkvRevForCausalLM, list[nn.Module]]:
    """A model in float64, and the modules that hold the norms."""
    model = tiny_model(version, dtype=torch.float64)
    cells = [block.time_mix for block in model.blocks]
    for cell in cells:
        nn.init.normal_(cell.ln_x.weight)
        nn.init.normal_(cell.ln_x.bias)
    return model, cells


def other(norm: nn.GroupNorm, module: nn.GroupNorm) -> nn.GroupNorm:
    """With the weights of ``norm``, where it has weights."""
    module = module.double()
    module.load_state_dict({name: norm.state_dict()[name] for name in module.state_dict()})
    return module


def channels(norm: nn.GroupNorm) -> int:
    return norm.num_channels


def without_bias(norm: nn.GroupNorm) -> nn.GroupNorm:
    norm.bias = None  # type: ignore[assignment]
    return norm


@contextmanager
def nothing() -> Iterator[None]:
    yield


@contextmanager
def global_hook() -> Iterator[None]:
    hook = position_wise(lambda module, given, output: 0.5 * output if type(module) is nn.GroupNorm else None)
    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def other_forward() -> Iterator[None]:
    plain = nn.GroupNorm.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.GroupNorm, "forward", position_wise(lambda self, x: 0.5 * plain(self, x)))
        yield


HALF = lambda norm: nn.Sequential(norm, Half())  # noqa: E731
SAME = lambda norm: norm  # noqa: E731
PLACES: dict[str, tuple[Callable[[Any], nn.Module], Callable[[], Any], Callable[[Any], nn.Module]]] = {
    # what is in the place, what is around the call, and the same as modules that are called
    "subclass": (lambda n: other(n, Halved(n.num_groups, channels(n), n.eps)), nothing, HALF),
    "global hook": (SAME, global_hook, HALF),
    "forward of the class": (SAME, other_forward, HALF),
    "one group": (
        lambda n: other(n, nn.GroupNorm(1, channels(n), n.eps)),
        nothing,
        lambda n: nn.Sequential(other(n, nn.GroupNorm(1, channels(n), n.eps))),
    ),
    "no weights": (
        lambda n: nn.GroupNorm(n.num_groups, channels(n), n.eps, affine=False),
        nothing,
        lambda n: nn.Sequential(nn.GroupNorm(n.num_groups, channels(n), n.eps, affine=False)),
    ),
    "no bias": (without_bias, nothing, lambda n: nn.Sequential(without_bias(n))),
    "identity": (lambda n: nn.Identity(), nothing, lambda n: nn.Sequential(nn.Identity())),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("place", PLACES)
def test_it_is_called_where_its_formula_is_another(place: str, version: str) -> None:
    """In every strategy, and in evaluation, as what has the same numbers and is called in any case."""
    replace, around, called = PLACES[place]
    model, cells = norms(version)
    plain = differentiate(model, "full", input_ids=IDS).loss
    reference, others = norms(version)
    reference.load_state_dict(model.state_dict())
    for cell, twin in zip(cells, others, strict=True):
        cell.ln_x, twin.ln_x = replace(cell.ln_x), called(twin.ln_x)
    expected = differentiate(reference, "full", input_ids=IDS)
    assert abs(float(expected.loss - plain)) > 1e-4
    with ExitStack() as stack:
        stack.enter_context(around())
        found = {
            s: differentiate(model, s, CHUNK, input_ids=IDS) for s in ("full", "checkpoint", "reversible")
        }
        with torch.no_grad():
            evaluated = model.eval()(IDS, labels=IDS).loss
    torch.testing.assert_close(evaluated, expected.loss, rtol=1e-10, atol=0)
    for outcome in found.values():
        torch.testing.assert_close(outcome.loss, expected.loss, rtol=1e-10, atol=0)
        assert_agree(outcome, found["full"], AGREE)


@pytest.mark.parametrize("version", ["5.2", "7"])
def test_a_parametrized_norm_is_still_a_plain_one(version: str) -> None:
    """Its class is PyTorch's own, its formula the same."""
    model, cells = norms(version)
    plain = differentiate(model, "full", input_ids=IDS)
    for cell in cells:
        nn.utils.parametrize.register_parametrization(cell.ln_x, "weight", nn.Identity())
    assert torch.equal(differentiate(model, "full", input_ids=IDS).loss, plain.loss)
    loss = differentiate(model, "reversible", CHUNK, input_ids=IDS).loss
    torch.testing.assert_close(loss, plain.loss, rtol=1e-12, atol=0)
