"""Integer lifting: any transition comes back to the bit, in little more than the bits that it destroys."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rwkv_rev.reversal.decay_arithmetic import LARGEST, NON_FINITE
from rwkv_rev.reversal.fixed_point import FixedPoint
from rwkv_rev.reversal.lifting import (
    LIFTED,
    KeptLifted,
    Lift,
    Lifted,
    LiftedRemnant,
    LiftingPlan,
    Shear,
    Transition,
    _own_bits,
    exact_bits,
)
from rwkv_rev.reversal.pivoting import factor
from rwkv_rev.wkv import wkv7, wkv7_transition

PROPERTIES = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


def kept(remnant: LiftedRemnant, known: bool = True) -> KeptLifted:
    """As a tape gives it back: in as many bits as are needed, or in the room that there is."""
    return KeptLifted(*[tensor.clone() for tensor in remnant.tensors(remnant.size if known else None)])


def same(one: Lifted, other: Lifted) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))


def entropy(matrix: Tensor) -> float:
    """Bits per number."""
    return float(-torch.linalg.svdvals(matrix.double()).log2().clamp(-32, 0).mean())


def tokens(
    kind: str, size: int, length: int, generator: torch.Generator, batch: int = 2, heads: int = 2
) -> list[Tensor]:
    """r, k, v, log w, kappa and a of one kind, [B, C, H, N]."""
    shape = (batch, length, heads, size)
    r, k, v, removal = (torch.randn(shape, generator=generator) for _ in range(4))
    log_decay = -0.6065 * torch.rand(shape, generator=generator) ** 4
    rate = torch.rand(shape, generator=generator)
    if kind == "projections":
        log_decay, rate = torch.zeros(shape), torch.ones(shape)
    elif kind == "nothing":
        log_decay, rate = torch.zeros(shape), torch.zeros(shape)
    elif kind == "one key":
        removal = removal[:, :1].expand(shape)
    elif kind == "units":
        places = torch.randint(0, size, shape[:3], generator=generator)
        removal = torch.nn.functional.one_hot(places, size).float()
        log_decay = torch.zeros(shape)
        rate = torch.randint(0, 2, shape[:3], generator=generator)[..., None].expand(shape).float()
    elif kind == "slow":
        log_decay, rate = log_decay * 1e-3, rate * 1e-2
    return [r, k, v, log_decay, torch.nn.functional.normalize(removal, dim=-1), rate]


KINDS = ("any", "projections", "nothing", "one key", "units", "slow")


@PROPERTIES
@given(
    st.integers(0, 2**31),
    st.sampled_from([16, 16, 33, 64, 128]),
    st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from([1, 5, 16, 64])), min_size=2, max_size=4),
    st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_states_come_back(seed: int, size: int, chunks: list[tuple[str, int]], scale: float) -> None:
    """Through chunks of all kinds, one of which lifts the grid of a head, and a row whose tokens are all masked."""
    generator = torch.Generator().manual_seed(seed)
    state = Lifted.of(torch.randn(2, 2, size, size, generator=generator))
    states, steps, plan = [state], [], LiftingPlan()
    for number, (kind, length) in enumerate(chunks):
        given = tokens(kind, size, length, generator)
        given[2] = given[2] * scale
        mask = torch.rand(2, length, generator=generator) < 0.8
        if number == 1:
            given[2][0, :, 0] *= 1e6
            mask[1] = False
        transition = Transition(*wkv7_transition(*given, mask))
        state, remnant = state.advance(transition, plan)
        states.append(state)
        steps.append((transition, remnant))
        if number == 1:
            assert torch.equal(state.grid.mantissa[1], states[-2].grid.mantissa[1])
            assert int(remnant.widths[1].sum()) == 0
    for known in (True, False):
        back = states[-1]
        for before, (transition, remnant) in zip(states[-2::-1], steps[::-1], strict=True):
            back = back.retreat(transition, kept(remnant, known))
            assert same(back, before)


@pytest.mark.parametrize("size", [16, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_those_that_the_transition_destroys(kind: str, size: int) -> None:
    """At most 1.2 more per number, none for a unit matrix, never more than the state."""
    generator = torch.Generator().manual_seed(size)
    state = Lifted.of(torch.randn(1, 2, size, size, generator=generator))
    given = tokens(kind, size, 64, generator, batch=1)
    transition = Transition(*wkv7_transition(*given))
    _, remnant = state.advance(transition, LiftingPlan())
    used = int(remnant.size) / state.grid.mantissa.numel()
    assert used <= min(entropy(transition.matrix) + 1.2, 32)
    if kind == "nothing":
        assert torch.equal(transition.matrix, torch.eye(size).double().expand_as(transition.matrix))
        assert used == 0
        assert kept(remnant).words.numel() == 0
    if kind == "projections":
        assert float(torch.linalg.svdvals(transition.matrix)[..., -1].max()) < 1e-6
    if kind in ("nothing", "one key", "slow"):
        assert bool((remnant.code >= LIFTED).all())


def test_a_diagonal_costs_what_fixed_point_does_or_less() -> None:
    """log2(1/w) bits for each number; numbers that only one other is sent to cost nothing."""
    generator = torch.Generator().manual_seed(1)
    decay = 2.0 ** (-6 * torch.rand(1, 2, 32, generator=generator, dtype=torch.float64))
    state = Lifted.of(torch.randn(1, 2, 32, 32, generator=generator))
    transition = Transition(torch.diag_embed(decay), torch.zeros(1, 2, 32, 32))
    after, remnant = state.advance(transition, LiftingPlan())
    theory = float(-decay.log2().mean())
    assert theory <= int(remnant.size) / state.grid.mantissa.numel() <= theory + 0.4
    expected = (decay[..., None] * state.grid.mantissa.double()).round()
    assert torch.equal(after.grid.mantissa.double(), expected)


@pytest.mark.parametrize("length", [16, 256])
def test_states_are_as_near_to_float64_as_those_of_float32(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    exact = torch.zeros(2, 2, 64, 64, dtype=torch.float64)
    single, state, plan = exact.float(), Lifted.of(exact.float()), LiftingPlan()
    errors = torch.zeros(2, dtype=torch.float64)
    for _ in range(8):
        given = tokens("any", 64, length, generator)
        exact = wkv7(*[x.double() for x in given], exact)[1]
        single = wkv7(*given, single)[1]
        state, _ = state.advance(Transition(*wkv7_transition(*given)), plan)
        found = torch.stack([state.value(torch.float64) - exact, single - exact]).flatten(1).norm(dim=1)
        errors = torch.maximum(errors, found / exact.norm())
    assert errors[0] <= errors[1]
    assert errors[1] <= 1e-6


@pytest.mark.parametrize("size", [16, 33, 64])
@pytest.mark.parametrize("kind", [*KINDS, "singular"])
def test_factors(kind: str, size: int) -> None:
    """Of P, rows and columns in order; no entry of a shear is over 1, whatever P is: sums have room for no more."""
    generator = torch.Generator().manual_seed(size)
    matrix = wkv7_transition(*tokens(kind, size, 64, generator))[0].double()
    if kind == "singular":
        matrix[0, 0] = 0
        matrix[0, 1, :, 3:] = 0
        matrix[1, 0, 5:] = 2 * matrix[1, 0, 5:6]
    found, wanted = factor(matrix.flatten(0, 1)), matrix.flatten(0, 1)
    one = torch.eye(size, dtype=torch.float64)
    product = (one + found.lower) @ (found.diagonal[..., None] * (one + found.upper))
    for number, (rows, columns) in enumerate(zip(found.rows, found.columns, strict=True)):
        assert sorted(rows.tolist()) == sorted(columns.tolist()) == list(range(size))
        error = (product[number] - wanted[number][rows][:, columns]).abs().max()
        assert float(error) <= 1e-14 * float(wanted[number].abs().max())
    assert torch.equal(found.lower, found.lower.tril(-1)) and torch.equal(found.upper, found.upper.triu(1))
    assert max(float(shear.abs().max()) for shear in (found.lower, found.upper)) <= 1


def test_sums_do_not_depend_on_their_order() -> None:
    """What makes L and R subtractable: products with them are exact."""
    generator = torch.Generator().manual_seed(4)
    matrix = torch.randn(1, 1, 128, 128, generator=generator)
    lift = Lift.of(matrix)
    x = torch.randint(-(2**31), 2**31, (1, 1, 128, 3), generator=generator).double()
    order = torch.randperm(128, generator=generator)
    for shear in (lift.lower, lift.upper):
        other = type(shear)(shear.high[..., order], shear.low[..., order], shear.bits)
        assert torch.equal(shear.add(x) - x, other.add(x[:, :, order]) - x[:, :, order])
        assert torch.equal(shear.subtract(shear.add(x)), x)


@pytest.mark.parametrize("size", [16, 33, 64, 96, 128])
def test_sums_of_the_largest_numbers_are_exact(size: int) -> None:
    """Every entry and every number as large and as odd as they get: whole numbers of Python's say what the sums are."""
    entry = 1 - 2.0 ** -exact_bits(torch.empty(size, size)) * 2 / 3
    shear = Shear.of(torch.full((1, 1, size, size), entry, dtype=torch.float64).tril(-1))
    largest = 2**31 - 3
    x = torch.full((1, 1, size, 1), float(largest), dtype=torch.float64)
    for part in (shear.high, shear.low):
        assert int((part @ x)[0, 0, -1, 0]) == sum(int(number) * largest for number in part[0, 0, -1])
    assert int(shear.low.abs().max()) > 0


@pytest.mark.parametrize("kind", ["any", "projections", "one key", "slow"])
@pytest.mark.parametrize("length", [16, 256])
def test_the_smaller_of_remnant_and_state_is_kept(kind: str, length: int) -> None:
    generator = torch.Generator().manual_seed(11)
    state = Lifted.of(torch.randn(1, 2, 16, 16, generator=generator))
    for _ in range(3):
        transition = Transition(*wkv7_transition(*tokens(kind, 16, length, generator, batch=1)))
        lift, before = Lift.of(transition.matrix), state.grid.mantissa.double()
        found = lift.forwards(before)
        after = found.lifted + state.grid.units(transition.update).round()
        largest = torch.stack([found.turned, found.scaled, after]).abs().amax(dim=(0, 3, 4))
        lifted = lift.widths(found.scaled, _own_bits(found.turned)).sum(dim=(2, 3))
        whole = before.shape[-1] ** 2 * _own_bits(before)
        state, remnant = state.advance(transition, LiftingPlan())
        used = remnant.widths.sum(dim=(2, 3))
        assert torch.equal(used, torch.where(largest <= LARGEST, torch.minimum(lifted, whole), whole))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_and_alone(broken: float) -> None:
    generator = torch.Generator().manual_seed(5)
    state, plan = Lifted.of(torch.randn(1, 2, 16, 16, generator=generator)), LiftingPlan()
    given = tokens("any", 16, 4, generator, batch=1)
    given[2][0, 1, 0, 3] = broken
    for _ in range(2):
        before, transition = state, Transition(*wkv7_transition(*given))
        state, remnant = before.advance(transition, plan)
        assert int(state.grid.exponent[0, 0]) == NON_FINITE and not state.value()[0, 0].isfinite().all()
        assert state.value()[0, 1].isfinite().all()
        back = state.retreat(transition, kept(remnant))
        assert torch.equal(back.grid.mantissa[0, 1], before.grid.mantissa[0, 1])
        given = tokens("any", 16, 4, generator, batch=1)


@pytest.mark.parametrize("scale", [1, 1e3])
@pytest.mark.parametrize("changed", ["matrix", "update", "words", "after"])
def test_another_bit_gives_another_state(changed: str, scale: float) -> None:
    """Of a head that was lifted and of one that was kept whole, as its grid rose."""
    generator = torch.Generator().manual_seed(3)
    state = Lifted.of(torch.randn(1, 1, 16, 16, generator=generator))
    matrix, update = wkv7_transition(*tokens("any", 16, 16, generator, 1, 1))
    transition = Transition(matrix, scale * update)
    after, remnant = state.advance(transition, LiftingPlan())
    assert bool((remnant.code >= LIFTED).all()) == (scale == 1)
    back = kept(remnant)
    if changed == "words":
        back.words[2] ^= 1 << 7
    elif changed == "after":
        mantissa = after.grid.mantissa.clone()
        mantissa[0, 0, 3, 4] += 1
        after = Lifted(FixedPoint(mantissa, after.grid.exponent))
    else:
        transition = transition._replace(**{changed: getattr(transition, changed) * 1.01})
    assert not same(after.retreat(transition, back), state)


def test_a_recording_gives_as_much_room_as_has_been_needed() -> None:
    generator = torch.Generator().manual_seed(6)
    state, plan = Lifted.of(torch.randn(1, 1, 16, 16, generator=generator)), LiftingPlan()
    slow, fast = (
        Transition(*wkv7_transition(*tokens(kind, 16, length, generator, 1, 1)))
        for kind, length in (("slow", 16), ("any", 64))
    )
    _, remnant = state.advance(slow, plan)
    assert kept(remnant, known=False).words.numel() == state.grid.mantissa.numel()  # nothing is known
    assert not bool(remnant.excess) and plan.holds(plan)
    plan = LiftingPlan()
    _, remnant = state.advance(slow, plan)
    size = kept(remnant).words.numel()
    assert size <= kept(remnant, known=False).words.numel() <= 1.2 * size + 1
    assert not bool(remnant.excess)
    _, remnant = state.advance(fast, plan)
    assert bool(remnant.excess)
    new = LiftingPlan()
    assert plan.holds(new)
    kept(remnant)
    assert not plan.holds(new) and new.needed == int(remnant.size)


def test_the_transition_of_float32_is_made_in_float64_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tokens("any", 16, 40, torch.Generator().manual_seed(0), 1, 2)
    monkeypatch.setattr("rwkv_rev.wkv.dispatch.choose_kernel", lambda kernel, tensor: kernel or "triton")
    found = wkv7_transition(*(x.float() for x in given))
    exact = wkv7_transition(*(x.float().double() for x in given), kernel="naive")
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
