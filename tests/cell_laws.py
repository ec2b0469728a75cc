"""The laws of a reversible cell (rwkv_rev/cells/contract.py), as checks that any cell can be run through.

``LAWS`` maps names to functions of a :class:`Trial`; ``trials`` draws trials for hypothesis from a strategy of
cells and a function that makes the values of their first state. A new cell is tested by
``@pytest.mark.parametrize("law", LAWS)`` and ``LAWS[law](trial)``. Of its state, a part called ``memory`` may be
rounded; all others are the same to the bit in plain arithmetic.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from rwkv_rev.cells import ChunkMask, ReversibleCell, ShiftedCell, TimeMixRwkv4
from rwkv_rev.cells.contract import Replay, tensors_of, values_like
from rwkv_rev.cells.shifted_cell import ExactShiftedState
from rwkv_rev.cells.token_cell import TokenCell
from rwkv_rev.wkv import use_kernel

# Relative to each tensor's RMS (gradients, float64) or largest element (states, outputs).
GRADIENT_TOLERANCE = 1e-8  # a norm of two numbers may cancel nearly all
# of cells whose state is rounded at each token, against plain arithmetic in the same precision
STEPPED_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.3}
VALUE_TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Trial:
    """A cell, a state before the first chunk, and the chunks: x [B, C, D] with its validity [B, C] or None."""

    cell: ReversibleCell
    state: Any
    chunks: list[tuple[Tensor, Tensor | None]]

    @property
    def dtype(self) -> torch.dtype:
        return self.chunks[0][0].dtype

    @property
    def rounds_inside(self) -> bool:
        """Whether the state is rounded within a chunk, so that plain arithmetic gives other bits."""
        return isinstance(self.cell, TokenCell)

    @property
    def unit(self) -> float:
        """Of the grid that the state is rounded to within a chunk; 0 where it is not."""
        return float(2.0 ** self.exact().memory.exponent) if self.rounds_inside else 0.0

    def exact(self) -> Any:
        return self.cell.exact(self.state)


MASKS = ("none", "none", "holes", "left", "right", "masked row", "all masked")


@st.composite
def trials(
    draw: st.DrawFn, cells: st.SearchStrategy[tuple[Any, int]], state: Callable, longest: int = 33
) -> Trial:
    """Trials of a cell; ``cells`` draws (cell, D), ``state(cell, B, D, generator)`` makes the first state's values.

    ``longest``: tokens of the longest chunks; one more than a kernel takes at once.
    """
    cell, width = draw(cells)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch = draw(st.integers(1, 3))
    scale = draw(st.sampled_from([1.0, 1.0, 1e-3, 30.0]))
    dtype = next(p for n, p in cell.named_parameters() if n.endswith("weight")).dtype
    chunks: list[tuple[Tensor, Tensor | None]] = []
    for length in draw(st.lists(st.sampled_from([1, 2, 3, 7, longest]), min_size=1, max_size=3)):
        x = (torch.randn(batch, length, width, generator=generator) * scale).to(dtype)
        chunks.append((x, _mask(draw(st.sampled_from(MASKS)), batch, length, generator)))
    return Trial(cell, state(cell, batch, width, generator), chunks)


def _mask(kind: str, batch: int, length: int, generator: torch.Generator) -> Tensor | None:
    if kind == "none":
        return None
    valid = torch.rand(batch, length, generator=generator) < 0.6
    count = torch.randint(0, length + 1, (batch, 1), generator=generator)
    if kind == "left":
        valid = torch.arange(length) >= length - count
    elif kind == "right":
        valid = torch.arange(length) < count
    elif kind == "masked row":
        valid[0] = False
    elif kind == "all masked":
        valid[:] = False
    return valid


# --- the laws -------------------------------------------------------------------------------------------------------


def write_first(trial: Trial) -> None:
    """out follows from state', x and the remnant: reverse, given copies of those alone, makes it to the bit."""
    for _, after, out, remnant, x, mask in _forwards(trial):
        _, again = _reverse(trial.cell, _copy(after), x, mask, _kept(remnant, after))
        assert same_bits(out, again)


def write_once(trial: Trial) -> None:
    """state' is one update: the state is not written to, a second call agrees, and ``step`` gives its value."""
    scale = 0.0  # the largest value so far: the grid it set stays
    for before, after, out, remnant, x, mask in _forwards(trial):
        kept = _copy(before)
        again = trial.cell.advance(before, x, mask)
        assert same_state(before, kept) and same_state(again[0], after)
        assert same_bits(again[1], out) and same_remnant(again[2], remnant)
        start = trial.cell.values(_carried(trial.cell, before, x, mask))
        with torch.no_grad():
            stepped_out, stepped = trial.cell.step(start, x, mask)
        if trial.rounds_inside:
            assert _close(stepped_out, out, VALUE_TOLERANCES[trial.dtype], 64 * trial.unit)
        else:
            assert same_bits(stepped_out, out)
        for name, value in _parts(trial.cell.values(after)).items():
            if name != "memory":
                assert same_bits(_parts(stepped)[name], value)
                continue
            scale = max(scale, _largest(value), _largest(start.memory))
            dtype = trial.dtype if trial.rounds_inside else torch.float32
            assert _largest(value - stepped.memory) <= VALUE_TOLERANCES[dtype] * scale + 64 * trial.unit


def masked_tokens_change_nothing(trial: Trial) -> None:
    """State and other outputs do not depend on what stands at masked places; a masked chunk is no chunk."""
    for before, after, out, _, x, mask in _forwards(trial):
        if mask is not None:
            junk = torch.where(mask.valid[:, :, None], x, -7 * x + 3)
            junk_after, junk_out, *_ = trial.cell.advance(before, junk, mask)
            assert same_state(junk_after, after)
            assert same_bits(junk_out[mask.valid], out[mask.valid])
            for row in (mask.count == 0).nonzero()[:, 0].tolist():
                assert same_state(_row(after, row), _row(before, row))
        nothing = ChunkMask.of(torch.zeros(x.shape[:2]))
        unchanged, _, remnant, _ = trial.cell.advance(before, x, nothing)
        assert same_state(unchanged, before)
        kept = _kept(remnant, unchanged)
        assert same_state(_reverse(trial.cell, unchanged, x, nothing, kept)[0], before)


def rows_are_alone(trial: Trial) -> None:
    """A row padded left, right or with holes gets the outputs and the state that its valid tokens get alone."""
    for before, after, out, _, x, mask in _forwards(trial):
        for row in range(x.shape[0]):
            valid = torch.ones(x.shape[1], dtype=torch.bool) if mask is None else mask.valid[row]
            if not valid.any():
                continue
            alone, alone_out, *_ = trial.cell.advance(_row(before, row), x[row, valid][None])
            assert _close(alone_out[0], out[row, valid], VALUE_TOLERANCES[trial.dtype], 64 * trial.unit)
            former, together, single = (_parts(trial.cell.values(state)) for state in (before, after, alone))
            for name, part in together.items():
                if name != "memory":
                    assert same_bits(single[name][0], part[row])
                    continue
                scale = max(_largest(part[row]), _largest(former[name][row]), 1e-30)
                bound = VALUE_TOLERANCES[trial.dtype] * scale + 64 * trial.unit
                assert _largest(single[name][0] - part[row]) <= bound


def reverse_of_forward(trial: Trial) -> None:
    """reverse(forward(s)) == s through all chunks, bit for bit; x_{a-1} as its carried y gives it."""
    steps = list(_forwards(trial))
    state = steps[-1][1]
    for before, _, _, remnant, x, mask in reversed(steps):
        state, _ = _reverse(trial.cell, state, x, mask, _kept(remnant, state))
        assert same_state(state, _carried(trial.cell, before, x, mask))


def a_record_without_sizes_is_enough(trial: Trial) -> None:
    """What depends on no data gives the state back where nothing exceeds it: recorded launches keep that alone."""
    for before, after, _, remnant, x, mask in _forwards(trial):
        if remnant.excess is None or not remnant.excess.any():
            kept = after.remnant([tensor.clone() for tensor in remnant.tensors(None)])
            state, _ = _reverse(trial.cell, after, x, mask, kept)
            assert same_state(state, _carried(trial.cell, before, x, mask))


def forward_of_reverse(trial: Trial) -> None:
    """forward(reverse(s')) == s', with the same remnant, bit for bit."""
    for _, after, out, remnant, x, mask in _forwards(trial):
        before, _ = _reverse(trial.cell, after, x, mask, _kept(remnant, after))
        again, again_out, again_remnant, _ = trial.cell.advance(before, x, mask)
        assert same_state(again, after) and same_bits(again_out, out)
        assert same_remnant(again_remnant, remnant)


def replays_agree(trial: Trial) -> None:
    """``replay`` and ``retreat`` give advance's bits, with gradients enabled or not, and each other's end."""
    for before, after, out, remnant, x, mask in _forwards(trial):
        kept = _kept(remnant, after)
        with torch.no_grad():
            quiet = trial.cell.retreat(after, x, mask, kept)
        replays = [
            quiet,
            trial.cell.retreat(after, x, mask, kept),
            trial.cell.replay(before, x, mask),
        ]
        expected = trial.cell.advance(before, x, mask).print
        for replay in replays:
            assert same_bits(replay.print, expected)
            assert same_bits(replay.out.detach(), out)
            assert same_state(replay.state, quiet.state)
            for name, value in _parts(trial.cell.values(after)).items():
                end = _parts(replay.end)[name].detach()
                exactly = name != "memory" or trial.rounds_inside
                assert same_bits(end, value if exactly else quiet.end.memory)


def gradients_are_exact(trial: Trial) -> None:
    """Gradients of both replays (parameters, input, state): those of ``step`` to the bit; in float64, the truth's.

    Where the state is rounded within a chunk: the same bits in both replays, and ``step``'s to a tolerance.
    """
    tolerance = GRADIENT_TOLERANCE
    pairs = list(_gradient_pairs(trial, trial.cell))
    for replays, step in pairs:
        for replay in replays:
            for name, gradient in step.items():
                assert same_bits(replay[name], replays[0][name] if trial.rounds_inside else gradient), name
        if trial.rounds_inside:
            _agree(replays[0], step, STEPPED_TOLERANCES[trial.dtype], trial.unit)
            tolerance = STEPPED_TOLERANCES[torch.float64]
    wide = copy.deepcopy(trial.cell).double()
    doubled = Trial(wide, _doubled(trial.state), [(x.double(), valid) for x, valid in trial.chunks])
    with use_kernel("naive"):
        expected = [_step_gradients(wide, before, x, mask) for before, *_, x, mask in _forwards(doubled)]
    if trial.dtype != torch.float64:
        pairs = list(_gradient_pairs(doubled, wide))
    for (replays, _), truth in zip(pairs, expected, strict=True):
        for replay in replays:
            _agree(replay, truth, tolerance, doubled.unit)


def _agree(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float, unit: float) -> None:
    """Relative to each tensor's RMS; ``unit``, of a grid, is as much of the largest one."""
    scale = max(_rms(gradient) for gradient in truth.values())
    for name, gradient in truth.items():
        bound = tolerance * max(_rms(gradient), 1e-6 * scale) + 64 * unit * scale
        assert _rms(found[name] - gradient) <= bound, name


LAWS: dict[str, Callable[[Trial], None]] = {
    law.__name__: law
    for law in (
        write_first,
        write_once,
        masked_tokens_change_nothing,
        rows_are_alone,
        reverse_of_forward,
        a_record_without_sizes_is_enough,
        forward_of_reverse,
        replays_agree,
        gradients_are_exact,
    )
}


# --- helpers --------------------------------------------------------------------------------------------------------


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal dtype, shape and bits (0.0 and -0.0 differ)."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def same_state(first: Any, second: Any) -> bool:
    """Equal exact states, bit for bit."""
    return all(same_bits(a, b) for a, b in zip(first.tensors(), second.tensors(), strict=True))


def same_remnant(first: Any, second: Any) -> bool:
    """Equal remnants, bit for bit."""
    kept = zip(first.tensors(first.size), second.tensors(second.size), strict=True)
    return all(same_bits(a, b) for a, b in kept)


def _forwards(trial: Trial) -> Iterator[tuple[Any, Any, Tensor, Any, Tensor, ChunkMask | None]]:
    """(state, state', out, remnant, x, mask) of every chunk in turn."""
    state = trial.exact()
    for x, valid in trial.chunks:
        mask = None if valid is None else ChunkMask.of(valid)
        after, out, remnant, _ = trial.cell.advance(state, x, mask)
        yield state, after, out, remnant, x, mask
        state = after


def _gradient_pairs(
    trial: Trial, cell: ReversibleCell
) -> Iterator[tuple[list[dict[str, Tensor]], dict[str, Tensor]]]:
    """Per chunk the gradients of both replays, and of ``step`` from the same state."""
    for before, after, _, remnant, x, mask in _forwards(trial):
        found = []
        for state, given in ((after, _kept(remnant, after)), (before, None)):
            leaf = x.clone().requires_grad_()
            replay = (
                cell.replay(state, leaf, mask) if given is None else cell.retreat(state, leaf, mask, given)
            )
            found.append(_gradients(cell, replay.out, replay.start, replay.end, leaf))
        yield found, _step_gradients(cell, before, x, mask)


def _step_gradients(
    cell: ReversibleCell, before: Any, x: Tensor, mask: ChunkMask | None
) -> dict[str, Tensor]:
    values = cell.values(_carried(cell, before, x, mask))
    start = values_like(values, [tensor.clone().requires_grad_() for tensor in tensors_of(values)])
    leaf = x.clone().requires_grad_()
    out, end = cell.step(start, leaf, mask)
    return _gradients(cell, out, start, end, leaf)


def _gradients(cell: ReversibleCell, out: Tensor, start: Any, end: Any, x: Tensor) -> dict[str, Tensor]:
    """Of a fixed random objective of output and final state."""
    generator = torch.Generator().manual_seed(0)
    objective = torch.zeros((), dtype=torch.float64)
    for name, tensor in {"out": out, **_parts(end)}.items():
        weights = torch.randn(tensor.shape, generator=generator)
        if name == "memory" and isinstance(cell, TimeMixRwkv4):  # the exponent m is a gauge without gradient
            weights[:, 2] = 0
        objective = objective + (tensor.double() * weights.double()).sum()
    wanted = {"x": x, **dict(cell.named_parameters()), **_parts(start)}
    found = torch.autograd.grad(objective, list(wanted.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(wanted.items(), found, strict=True)
    }


def _reverse(
    cell: ReversibleCell, state: Any, x: Tensor, mask: ChunkMask | None, remnant: Any
) -> tuple[Any, Tensor]:
    """One chunk backwards: the exact state before it and its output."""
    with torch.no_grad():
        replay: Replay = cell.retreat(state, x, mask, remnant)
    return replay.state, replay.out


def _carried(cell: ReversibleCell, state: Any, x: Tensor, mask: ChunkMask | None) -> Any:
    """The exact state as outputs see it: a token shift's has been through its carried y."""
    return cell.carried(state, x, mask) if isinstance(cell, ShiftedCell) else state


def _parts(values: Any) -> dict[str, Tensor]:
    """The tensors of a state's values that are there, by name."""
    return {name: tensor for name, tensor in values._asdict().items() if tensor is not None}


def _kept(remnant: Any, after: Any) -> Any:
    """The remnant as a tape would give it back."""
    return after.remnant([tensor.clone() for tensor in remnant.tensors(remnant.size)])


def _copy(state: Any) -> Any:
    return _mapped(state, Tensor.clone)


def _row(state: Any, row: int) -> Any:
    return _mapped(state, lambda tensor: tensor[row : row + 1])


def _mapped(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    found = state.like([change(tensor) for tensor in state.tensors()])
    if not isinstance(state, ExactShiftedState):
        return found
    return replace(found, carried=None if state.carried is None else change(state.carried))


def _largest(tensor: Tensor | None) -> float:
    return 0.0 if tensor is None else float(tensor.double().abs().max())


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def _doubled(state: Any) -> Any:
    return values_like(state, [tensor.double() for tensor in tensors_of(state)])


def _close(first: Tensor, second: Tensor, tolerance: float, floor: float = 0.0) -> bool:
    return _largest(first.double() - second.double()) <= tolerance * max(_largest(second), 1e-30) + floor
