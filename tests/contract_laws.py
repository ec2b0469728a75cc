"""The laws of rwkv_rev/cells/contract.py as checks of any cell at all; of RWKV's kind there are more (cell_laws.py).

``LAWS`` maps names to functions of a :class:`Trial`. A cell is tested by ``@pytest.mark.parametrize("law", LAWS)`` and
``LAWS[law](trial)``, where :func:`chunks` draws the input.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.cells.contract import ReversibleCell, leaves, tensors_of, values_like
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.wkv import use_kernel

LENGTHS = (1, 2, 7, 64, 33, 1)
MASKS = ("none", "holes", "left", "right", "masked row", "all masked")


@dataclass(frozen=True)
class Trial:
    """A cell, values before the first chunk, chunks x [B, C, D] with their validity [B, C] or None, and tolerances.

    ``gradients``: of the two replays against the plain loop in float64. ``values``: of outputs and states.
    """

    cell: ReversibleCell
    start: Any
    chunks: list[tuple[Tensor, Tensor | None]]
    gradients: float = 1e-10
    values: float = 1e-6


def chunks(
    width: int, batch: int, seed: int, *, dtype: torch.dtype = torch.float64, scale: float = 1.0
) -> list[tuple[Tensor, Tensor | None]]:
    """Chunks of all :data:`LENGTHS`, each with another kind of mask."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number, length in enumerate(LENGTHS):
        x = scale * torch.randn(batch, length, width, generator=generator, dtype=torch.float64)
        found.append((x.to(dtype), _mask(MASKS[(number + seed) % len(MASKS)], batch, length, generator)))
    return found


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


def retreat_undoes_advance(trial: Trial) -> None:
    """To the bit through all chunks, from state', x and a copy of the remnant alone; outputs and prints too."""
    steps = list(_forwards(trial))
    state = steps[-1][1]
    for before, _, out, remnant, print_, x, mask in reversed(steps):
        kept = state.remnant([tensor.clone() for tensor in remnant.tensors(_on_host(remnant.size))])
        state = state.like([tensor.clone() for tensor in state.tensors()])
        with torch.no_grad():
            replay = trial.cell.retreat(state, x, mask, kept, _plan(trial, x))
        assert same_state(replay.state, before) and torch.equal(replay.print, print_)
        assert torch.equal(replay.out, out)
        state = replay.state


def advance_undoes_retreat(trial: Trial) -> None:
    """advance(retreat(s')) == s', to the bit, and forgets the same."""
    for _, after, out, remnant, _, x, mask in _forwards(trial):
        with torch.no_grad():
            before = trial.cell.retreat(after, x, mask, remnant, _plan(trial, x)).state
        again = trial.cell.advance(before, x, mask, _plan(trial, x))
        assert same_state(again.state, after) and torch.equal(again.out, out)
        size = _on_host(remnant.size)
        for one, other in zip(again.remnant.tensors(size), remnant.tensors(size), strict=True):
            assert torch.equal(one, other)


def nothing_is_written_to(trial: Trial) -> None:
    """advance leaves the state that it is given alone, and gives the same bits twice; without output the same state."""
    for before, after, out, _, print_, x, mask in _forwards(trial):
        kept = [tensor.clone() for tensor in before.tensors()]
        for output in (True, False):
            again = trial.cell.advance(before, x, mask, _plan(trial, x), output=output)
            assert same_state(again.state, after) and torch.equal(again.print, print_)
            assert not output or torch.equal(again.out, out)
        assert all(torch.equal(one, other) for one, other in zip(kept, before.tensors(), strict=True))


def masked_tokens_change_nothing(trial: Trial) -> None:
    """State and other outputs do not depend on what stands at masked places; a masked chunk is no chunk."""
    for before, after, out, _, _, x, mask in _forwards(trial):
        nothing = ChunkMask.of(torch.zeros(x.shape[:2]))
        assert same_state(trial.cell.advance(before, x, nothing, _plan(trial, x)).state, before)
        if mask is not None:
            junk = torch.where(mask.valid[:, :, None], x, -7 * x + 3)
            other = trial.cell.advance(before, junk, mask, _plan(trial, x))
            assert same_state(other.state, after)
            assert torch.equal(other.out[mask.valid], out[mask.valid])


def steps_agree(trial: Trial) -> None:
    """``step`` from the values of an exact state gives advance's output, and its state up to the grid."""
    for before, after, out, _, _, x, mask in _forwards(trial):
        with torch.no_grad():
            stepped_out, stepped = trial.cell.step(trial.cell.values(before), x, mask)
        assert _close(stepped_out, out, trial.values)
        for one, other in zip(tensors_of(stepped), tensors_of(trial.cell.values(after)), strict=True):
            assert _close(one, other, trial.values)


def chunks_of_any_length_agree(trial: Trial) -> None:
    """A chunk cut in two at any place gives the same outputs and the same state, up to the grid."""
    for before, after, out, _, _, x, mask in _forwards(trial):
        cut = x.shape[1] // 2
        if cut == 0:
            continue
        state, outputs = before, []
        for part in (slice(0, cut), slice(cut, None)):
            inner = None if mask is None else ChunkMask.of(mask.valid[:, part])
            found = trial.cell.advance(state, x[:, part], inner, _plan(trial, x[:, part]))
            state, outputs = found.state, [*outputs, found.out]
        valid = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.valid
        assert _close(torch.cat(outputs, 1)[valid], out[valid], trial.values)
        values = (tensors_of(trial.cell.values(found)) for found in (state, after))
        for one, other in zip(*values, strict=True):
            assert _close(one, other, trial.values)


def gradients_are_exact(trial: Trial) -> None:
    """Both replays, by parameters, input and state: those of autograd through the plain loop, all in float64."""
    wide = copy.deepcopy(trial.cell).double()
    doubled = replace(
        trial,
        cell=wide,
        start=values_like(trial.start, [tensor.double() for tensor in tensors_of(trial.start)]),
        chunks=[(x.double(), valid) for x, valid in trial.chunks],
    )
    for before, after, _, remnant, _, x, mask in _forwards(doubled):
        truth = _plain_gradients(wide, before, x, mask)
        for known, given in ((before, None), (after, remnant)):
            leaf = x.clone().requires_grad_()
            plan = _plan(doubled, x)
            replay = (
                wide.replay(known, leaf, mask, plan)
                if given is None
                else wide.retreat(known, leaf, mask, given, plan)
            )
            found = _gradients(wide, replay.out, replay.start, replay.end, leaf)
            for name, gradient in truth.items():
                scale = max(float(gradient.norm()), 1e-6 * max(float(g.norm()) for g in truth.values()))
                assert float((found[name] - gradient).norm()) <= trial.gradients * scale, name


LAWS: dict[str, Callable[[Trial], None]] = {
    law.__name__: law
    for law in (
        retreat_undoes_advance,
        advance_undoes_retreat,
        nothing_is_written_to,
        masked_tokens_change_nothing,
        steps_agree,
        chunks_of_any_length_agree,
        gradients_are_exact,
    )
}


# --- helpers --------------------------------------------------------------------------------------------------------


def same_state(one: Any, other: Any) -> bool:
    """Equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))


def _forwards(trial: Trial) -> Iterator[tuple[Any, Any, Tensor, Any, Tensor, Tensor, ChunkMask | None]]:
    """(state, state', out, remnant, print, x, mask) of every chunk in turn."""
    state = trial.cell.exact(trial.start)
    for x, valid in trial.chunks:
        mask = None if valid is None else ChunkMask.of(valid)
        found = trial.cell.advance(state, x, mask, _plan(trial, x))
        yield state, found.state, found.out, found.remnant, found.print, x, mask
        state = found.state


def _plan(trial: Trial, x: Tensor) -> Any:
    return trial.cell.plan(x.shape[1])


def _plain_gradients(
    cell: ReversibleCell, state: Any, x: Tensor, mask: ChunkMask | None
) -> dict[str, Tensor]:
    start, leaf = leaves(cell.values(state)), x.clone().requires_grad_()
    with use_kernel("naive"):
        out, end = cell.step(start, leaf, mask)
        return _gradients(cell, out, start, end, leaf)


def _gradients(cell: ReversibleCell, out: Tensor, start: Any, end: Any, x: Tensor) -> dict[str, Tensor]:
    """Of a fixed random objective of output and final state."""
    generator = torch.Generator().manual_seed(0)
    objective = torch.zeros((), dtype=torch.float64)
    for tensor in (out, *tensors_of(end)):
        objective = objective + (torch.randn(tensor.shape, generator=generator) * tensor.double()).sum()
    wanted: dict[str, Tensor] = {"x": x, **dict(cell.named_parameters())}
    wanted |= {f"state {number}": tensor for number, tensor in enumerate(tensors_of(start))}
    found = torch.autograd.grad(objective, list(wanted.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(wanted.items(), found, strict=True)
    }


def _on_host(size: Tensor | None) -> Tensor | None:
    return None if size is None else size.cpu()


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    if one.numel() == 0:
        return True
    difference, scale = (one.double() - other.double()).abs().max(), other.double().abs().max()
    return float(difference) <= tolerance * max(float(scale), 1e-30)
