"""Every kind of exact memory keeps the one protocol that strategies, tape and recordings see."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rwkv_rev.cells.contract import Exact, Plan
from rwkv_rev.reversal.additive import Additive
from rwkv_rev.reversal.division import LossyState
from rwkv_rev.reversal.fixed_point import DecayPlan, FixedPoint, decay_plan
from rwkv_rev.reversal.memory import Memory
from rwkv_rev.reversal.stepped import Stepped
from rwkv_rev.reversal.whole import Whole

LENGTH = 4
PLAN = decay_plan(torch.full((2, 3), -0.3), LENGTH)

# a memory of a value, and a chunk forwards by a contribution
KINDS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any, Tensor], Any]]] = {
    "whole": (Whole, lambda memory, change: memory.advance(memory.state + change)),
    "decay": (FixedPoint.of, lambda memory, change: memory.advance(change, None, PLAN)),
    "additive": (Additive.of, lambda memory, change: memory.advance(change)),
    "divided": (
        lambda value: LossyState.of(FixedPoint.of(value)),
        lambda memory, change: memory.advance(change, None, PLAN),
    ),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def value(seed: int) -> Tensor:
    return torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(seed))


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))


def test_made_of_its_tensors(kind: str) -> None:
    make, _ = KINDS[kind]
    memory = make(value(0))
    again = memory.like([tensor.clone() for tensor in memory.tensors()])
    computed = memory.like([tensor.clone() for tensor in memory.computed()])
    for other in (again, computed):
        assert type(other) is type(memory) and same(memory, other)
        assert torch.equal(other.value(), memory.value())
        assert torch.equal(other.fingerprint(), memory.fingerprint())
    assert memory.fingerprint().dtype == torch.int64
    torch.testing.assert_close(memory.value(), value(0), rtol=0, atol=2e-6)


def test_a_bit_changes_the_fingerprint(kind: str) -> None:
    make, _ = KINDS[kind]
    memory = make(value(0))
    first, *rest = memory.tensors()
    changed = first.clone()
    changed.view(torch.uint8).view(-1)[7] ^= 1
    other = memory.like([changed, *rest])
    assert not torch.equal(other.fingerprint(), memory.fingerprint())


def test_it_comes_back_from_what_it_is_made_of(kind: str) -> None:
    make, _ = KINDS[kind]
    memory = make(value(0))
    assert {name for name in vars(Memory) if not name.startswith("_")} <= set(dir(memory))
    for again in (memory.like(memory.tensors()), memory.of_computed(memory.computed())):
        assert torch.equal(again.fingerprint(), memory.fingerprint())
        assert all(map(torch.equal, again.computed(), memory.computed()))


def test_remnants_go_through_a_tape(kind: str) -> None:
    """What is kept of a remnant, by its size on the host, makes a remnant that keeps the same."""
    make, forwards = KINDS[kind]
    after, remnant = forwards(make(value(0)), value(1))
    size = None if remnant.size is None else remnant.size.cpu()
    kept = [tensor.clone() for tensor in remnant.tensors(size)]
    again = after.remnant(kept)
    if again.size is not None:  # heads whose grid rose are known by their being there
        size = again.size.cpu()
    for one, other in zip(again.tensors(size), kept, strict=True):
        assert torch.equal(one, other)
    assert (kind in ("additive", "divided")) == (not kept)


def test_what_is_a_cells_state_and_plan_by_itself() -> None:
    """A cell with one memory and no token shift needs no wrapper around either."""

    def asked(protocol: type) -> set[str]:
        return {name for name in vars(protocol) if not name.startswith("_")}

    assert asked(Memory) <= set(dir(Stepped))
    for kind in (FixedPoint, Additive, Whole):
        assert asked(Exact) <= set(dir(kind)), kind
    assert asked(Plan) <= set(dir(DecayPlan))
    log_decay = -torch.rand(2, 3, dtype=torch.float64)
    made = decay_plan(log_decay, 5)
    made.prepare()
    assert [tensor.shape for tensor in made.tensors()] == [(2, 3), (1, 2, 3, 1)]
    memory = FixedPoint.of(torch.randn(1, 2, 3, 3))
    again = memory.of_computed([tensor.clone() for tensor in memory.computed()])
    assert torch.equal(again.mantissa, memory.mantissa) and torch.equal(again.value(), memory.value())
