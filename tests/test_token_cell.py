"""Every cell that is stepped a token at a time: the laws, gradients, long contexts, tape, refusals."""

import copy
import functools
import re
from typing import Any

import pytest
import torch
from bptt_cases import random_tokens, relative_error
from cell_laws import LAWS, Trial
from hypothesis import given
from test_inputs import model_of
from token_cases import (
    CELLS,
    PROPERTIES,
    fill,
    gradients,
    language_model,
    masked_inputs,
    plain_inputs,
    token_trials,
)
from torch import Tensor, nn

from rwkv_rev import position_wise
from rwkv_rev.cells.coupled import CoupledCell, TanhGate
from rwkv_rev.cells.feed_forward import FeedForward
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.cells.reversible_gru import ReversibleGru
from rwkv_rev.cells.reversible_lstm import ReversibleLstm
from rwkv_rev.cells.token_cell import TokenCell, TokenState
from rwkv_rev.errors import ConfigError, ReversalMismatchError, StrategyError
from rwkv_rev.reversal.stepped import GridOverflowError, Stepped

KINDS = ("coupled", "gru", "lstm")
CHUNK = 4
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Of gradients against those of the plain loop in float64, relative RMS per tensor."""


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kind", KINDS)
def test_laws(kind: str, law: str) -> None:
    @PROPERTIES
    @given(token_trials(kind))
    def check(trial: Trial) -> None:
        LAWS[law](trial)

    check()


@functools.cache
def by_the_plain_loop(kind: str) -> tuple[Any, list[Tensor]]:
    """A model in float64, and the gradients that are asked of it."""
    wide = language_model(kind)
    return wide, gradients(wide, "full", masked_inputs(wide), 64)[1]


@pytest.mark.parametrize(
    ("strategy", "chunk"),
    [("full", 64), ("checkpoint", 4), ("reversible", 1), ("reversible", 4), ("reversible", 64)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_plain_loop_in_float64(kind: str, strategy: str, chunk: int) -> None:
    wide, expected = by_the_plain_loop(kind)
    for dtype, tolerance in TOLERANCES.items():
        model = copy.deepcopy(wide).to(dtype)
        _, found = gradients(model, strategy, masked_inputs(model), chunk)
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) <= tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_gradients_end_at_the_border_of_a_chunk(kind: str) -> None:
    model = language_model(kind)
    given = plain_inputs(model, 11)
    result, found = gradients(model, "truncated", given, CHUNK)
    state, losses = given.state, []
    for start in range(0, 11, CHUNK):
        part = slice(start, start + CHUNK)
        hidden, state = model.read(given.input_ids[:, part], None, None, state.detach())
        logits, targets = model.head(hidden).flatten(0, 1), given.targets[:, part].flatten()
        losses.append(nn.functional.cross_entropy(logits, targets, reduction="sum") / given.divisor)
    expected = torch.autograd.grad(sum(losses), list(model.parameters()))
    torch.testing.assert_close(result.loss, sum(losses), rtol=1e-12, atol=0)
    for one, other in zip(found, expected, strict=False):
        assert relative_error(one, other) <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_reversible_and_checkpoint_are_the_same_to_the_bit(kind: str) -> None:
    """In bfloat16, too, and under autocast: both sweeps do the same arithmetic, whatever it is."""
    for dtype, autocast in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        model = language_model(kind, dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            (one, first), (other, second) = (
                gradients(model, strategy, masked_inputs(model), CHUNK)
                for strategy in ("reversible", "checkpoint")
            )
        assert torch.equal(one.loss, other.loss)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def swept(cell: TokenCell, length: int, chunk: int, masked: bool, rows: int = 2) -> None:
    """Runs a cell over ``length`` tokens of each row and back, and holds every border against what it was."""
    generator = torch.Generator().manual_seed(0)
    width = 4
    x = torch.randn(rows, chunk, width, generator=generator)
    first = state = cell.exact(cell.empty(rows))
    tape = []
    for start in range(0, length, chunk):
        valid = torch.rand(rows, chunk, generator=torch.Generator().manual_seed(start)) < 0.7
        mask = ChunkMask.of(valid) if masked else None
        rolled = x.roll(start // chunk, dims=1)  # other tokens in each chunk
        advanced = cell.advance(state, rolled, mask, output=False)
        kept = [tensor.clone() for tensor in advanced.remnant.tensors(advanced.remnant.size)]
        tape.append((state.fingerprint(), rolled, mask, kept))
        state = advanced.state
    assert not torch.equal(state.memory.mantissa, first.memory.mantissa)
    with torch.no_grad():
        for fingerprint, rolled, mask, kept in reversed(tape):
            state = cell.retreat(state, rolled, mask, state.remnant(kept)).state
            assert torch.equal(state.fingerprint(), fingerprint)
    assert torch.equal(state.memory.mantissa, first.memory.mantissa)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_many_tokens_come_back_without_drift(kind: str, masked: bool) -> None:
    """Chunks so short that every token is stepped back: nothing is kept whole but where gates are 0."""
    torch.manual_seed(0)
    swept(CELLS[kind](4, 3), 100, 4, masked, rows=10)
    swept(fill(CELLS[kind](4, 3), torch.Generator().manual_seed(3), torch.float32), 30, 1, masked, rows=10)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "length"), [("coupled", 1024), ("gru", 128), ("lstm", 256)])
def test_thousands_of_tokens_come_back_without_drift(kind: str, length: int) -> None:
    """By row of the kind that forgets nothing, whose state grows by 1/8 a token; of many rows of those that do."""
    torch.manual_seed(0)
    settings = {"magnitude": 11} if kind == "coupled" else {}
    swept(CELLS[kind](4, 3, **settings), length, 16, masked=False, rows=2**15 // length)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("forgotten", [0.0, 1.0])
def test_gates_that_forget_all_or_nothing(kind: str, forgotten: float) -> None:
    """z = 0 and z = 1 to the bit, in all precisions: remnants of 32, 51 or 62 bits and of none."""
    for dtype in TOLERANCES:
        torch.manual_seed(0)
        cell = CELLS[kind](4, 3).to(dtype)
        original = cell.update

        def update(part: int, gates: Any, parts: Any, original: Any = original) -> tuple[Tensor, Tensor]:
            _, change = original(part, gates, parts)
            return torch.full_like(change, 1 - forgotten), change / 8

        cell.update = update
        state = cell.exact(TokenState(torch.randn(2, cell.number_of_parts, 3, dtype=dtype).clamp(-3, 3)))
        x = torch.randn(2, 1, 4, dtype=dtype)
        advanced = cell.advance(state, x)
        size = advanced.remnant.size
        bits = (state.memory.bits + 1) * cell.number_of_parts * 3
        assert size.tolist() == [bits * forgotten] * 2
        kept = advanced.state.remnant(advanced.remnant.tensors(size))
        before = cell.retreat(advanced.state, x, None, kept).state
        assert torch.equal(before.memory.mantissa, state.memory.mantissa)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_on_the_tape_is_what_is_forgotten(kind: str) -> None:
    """By chunk: prints (24), a fingerprint (8); sizes of rows (8), words, whole rows; each rounded up to 16 bytes."""
    model = language_model(kind, torch.float32, layers=1)
    cell = model.blocks[0].cell
    for chunk, length in ((1, 10), (4, 24), (32, 96)):
        given = plain_inputs(model, length)
        x = model.blocks[0].norm(model.embeddings(given.input_ids))
        state, expected = cell.exact(cell.empty(2)), 0
        for start in range(0, length, chunk):
            advanced = cell.advance(state, x[:, start : start + chunk])
            if 0 < start < length - chunk:
                bits = advanced.remnant.size
                parts = [24, 8]  # of a layer's input, its state, and of the top layer's output
                if bits is not None:
                    whole = cell.number_of_parts * cell.size * 4
                    kept = bits[bits < 8 * whole]
                    some = [8, -(-int(kept.sum()) // 32) * 4, whole * (2 - len(kept))]
                    parts += some if sum(some) <= 2 * whole else [2 * whole]
                expected += sum(-(-part // 16) * 16 for part in parts)
            state = advanced.state
        result, _ = gradients(model, "reversible", given, chunk)
        assert result.report["tape_bytes"] == expected


def test_whole_states_bound_the_tape() -> None:
    """Where a chunk forgets more than the state is, the state is kept: ``reversible`` is never above ``checkpoint``."""
    for kind in ("gru", "lstm"):
        model = language_model(kind, torch.float32, layers=1)
        given = plain_inputs(model, 129)
        sizes = {
            strategy: gradients(model, strategy, given, 64)[0].report["tape_bytes"]
            for strategy in ("reversible", "checkpoint")
        }
        assert sizes["reversible"] <= sizes["checkpoint"]


@pytest.mark.parametrize("kind", KINDS)
def test_another_arithmetic_on_the_way_back_is_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Stepped.undo
    monkeypatch.setattr(Stepped, "undo", lambda *given: honest(*given) + 1)
    model = language_model(kind)
    with pytest.raises(ReversalMismatchError):
        gradients(model, "reversible", plain_inputs(model, 12), 4)


@pytest.mark.parametrize("strategy", ["checkpoint", "reversible"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_leaves_its_grid_is_named(kind: str, strategy: str) -> None:
    model = language_model(kind, torch.float32, magnitude=-6)
    name = type(model.blocks[0].cell).__name__
    with pytest.raises(
        GridOverflowError, match=rf"layer 0 \({name}\) has left its grid: .* magnitude=-3 or more"
    ):
        gradients(model, strategy, plain_inputs(model, 64), 8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_diverged_model_ends_in_a_loss_that_is_nan(kind: str) -> None:
    model = language_model(kind, torch.float32)
    with torch.no_grad():
        model.blocks[0].norm.weight[0] = torch.nan
    result, _ = gradients(model, "reversible", plain_inputs(model, 32), 4)
    assert result.loss.isnan()


@position_wise
class DroppingGate(TanhGate):
    def forward(self, state: Tensor, share: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(state, share), 0.3, self.training)


@position_wise
class DroppingInput(TanhGate):
    def share(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().share(x), 0.3, self.training)


def coupled_model(gate: type[TanhGate]) -> Any:
    model = language_model("coupled")
    for number, block in enumerate(model.blocks):
        block.cell = CoupledCell(12, first=gate(6, 12), second=gate(6, 12)).double()
        block.cell.layer = number
    return model.train()


def test_a_gate_that_draws_is_refused_by_name() -> None:
    model = coupled_model(DroppingGate)
    with pytest.raises(StrategyError, match=r"a gate of layer 0 \(CoupledCell\) draws random numbers"):
        gradients(model, "reversible", plain_inputs(model, 20), 8)
    gradients(model.eval(), "reversible", plain_inputs(model, 20), 8)


@pytest.mark.parametrize("factor", [1.01, -0.5])
def test_a_gate_that_does_not_forget_but_grow_is_refused_by_name(factor: float) -> None:
    for dtype in TOLERANCES:
        cell = ReversibleGru(4, 3).to(dtype)
        cell.update = lambda part, gates, parts: (torch.full_like(gates[0], factor), gates[1])
        words = (
            rf"\(ReversibleGru\) multiplies the state by z = {factor:g}, and the way back needs z in \[0, 1\]"
        )
        with pytest.raises(StrategyError, match=words):
            cell.advance(cell.exact(cell.empty(1, dtype=dtype)), torch.randn(1, 5, 4, dtype=dtype))


@pytest.mark.parametrize("kind", [CoupledCell, ReversibleGru, ReversibleLstm])
def test_sizes_that_cannot_be_meant(kind: Any) -> None:
    for size in (0, -1, 2.5, True):
        with pytest.raises(ConfigError, match=f"size = {size!r} must be a whole number of at least 1"):
            kind(8, size)
    for magnitude in (-41, 41, 100, 1.5):
        with pytest.raises(
            ConfigError, match=f"magnitude = {magnitude} must be a whole number from -40 to 40"
        ):
            kind(8, magnitude=magnitude)
    assert kind(8, 1, magnitude=40).size == 1 and kind(7, magnitude=-40).size == 4


class FirstColumn(nn.Module):
    """What broadcasts."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, given: Tensor, x: Tensor) -> Tensor:
        return self.inner(given, x)[..., :1]


def test_gates_and_readers_of_another_shape_are_refused_by_name() -> None:
    x = torch.randn(2, 5, 12)
    for kind in (CoupledCell, ReversibleGru, ReversibleLstm):
        cell, whole = kind(12), kind.update

        def narrow(part: int, gates: Any, parts: Any, of: Any = (cell, whole)) -> Any:
            decay, change = of[1](of[0], part, gates, parts)
            return decay, change[:, :1]

        cell.update = narrow
        words = rf"{kind.__name__}.update of layer 0 gives a tensor \[2, 1\] as c; it must give \[2, 6\], as each part"
        with pytest.raises(ConfigError, match=words):
            cell.step(cell.empty(2), x)
        with pytest.raises(ConfigError, match=words):
            cell.advance(cell.exact(cell.empty(2)), x)
    cell = CoupledCell(12, second=FirstColumn(CoupledCell(12).second))
    cell.second.share = cell.second.inner.share
    with pytest.raises(ConfigError, match=r"CoupledCell\.update of layer 0 gives a tensor \[2, 1\] as c"):
        cell.step(cell.empty(2), x)
    cell = CoupledCell(12, reader=FirstColumn(CoupledCell(12).reader))
    with pytest.raises(
        ConfigError, match=r"reader of layer 0 \(FirstColumn\) gives \[2, 5, 1\], not \[2, 5, 12\]"
    ):
        cell.step(cell.empty(2), x)


@pytest.mark.parametrize(
    "halves", [((0,), (0,)), ((0,), (2,)), ((1,), (2,)), ((0, 1), (1,)), (), (0, 1), None]
)
def test_halves_that_do_not_have_each_part_once_are_refused_by_name(halves: Any) -> None:
    kind = type("Halved", (ReversibleGru,), {"halves": halves})
    words = rf"^Halved\.halves = {re.escape(repr(halves))} must name each part of the state once, from 0 on: \(\(0,"
    with pytest.raises(ConfigError, match=words):
        kind(4)


@pytest.mark.parametrize(
    ("method", "given", "told"),
    [
        ("project", lambda cell, x: cell.input(x), "a tensor [2, 5, 36]; it must give a tuple of tensors [B, C, ...]"),
        ("project", lambda cell, x: None, "None; it must give a tuple of tensors [B, C, ...], here [2, 5, ...]"),
        ("project", lambda cell, x: (), "(); it must give a tuple"),
        ("project", lambda cell, x: (x.sum(1, keepdim=True), None), "(a tensor [2, 1, 12], None); it must give"),
        ("update", lambda cell, *_: None, "None; it must give a pair (z, c) of [2, 6] each, z None for 1"),
        ("update", lambda cell, part, gates, _: gates[1], "a tensor [2, 6]; it must give a pair (z, c)"),
        ("update", lambda cell, part, gates, _: (None, None), "None as c; it must give [2, 6], as each part"),
        ("update", lambda cell, part, gates, _: (0.5, gates[1]), "a float as z; it must give [2, 6]"),
        ("read", lambda cell, parts, x: x[..., :1], "a tensor [2, 5, 1]; it must give [2, 5, 12], as its input is"),
        ("read", lambda cell, parts, x: None, "None; it must give [2, 5, 12]"),
    ],
)  # fmt: skip
def test_methods_that_give_something_else_are_refused_by_name(method: str, given: Any, told: str) -> None:
    """Whatever runs them: what would be broadcast, or be taken for two things because there are two rows, too."""
    cell, x = type("Given", (ReversibleGru,), {method: given})(12), torch.randn(2, 5, 12)
    exact = cell.exact(cell.empty(2))
    for run in (
        lambda: cell.step(cell.empty(2), x),
        lambda: cell.step_again(exact, cell.empty(2), x),
        lambda: cell.advance(exact, x),
        lambda: cell.replay(exact, x),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"Given.{method} of layer 0 gives {told}")):
            run()


class Narrow(FeedForward):
    def compute(self, x: Tensor) -> Tensor:
        return super().compute(x)[..., :1]


@pytest.mark.parametrize("strategy", ["full", "reversible", "checkpoint"])
def test_an_output_that_the_residual_would_broadcast_is_refused_by_name(strategy: str) -> None:
    """Of whatever kind the cell is."""
    model = model_of("linear-attention")
    model.blocks[1].feed_forward = Narrow(16, 64)
    model.blocks[1].feed_forward.layer = 1
    ids = random_tokens(6, batch=2)
    with (
        pytest.raises(ConfigError, match=r"^Narrow of layer 1 gives \[2, \d, 1\]; .* be \[2, \d, 16\]"),
        model.set_bptt(strategy, chunk_length=4),
    ):
        model(ids, labels=ids).loss.backward()


def test_an_input_that_draws_is_drawn_again() -> None:
    model = coupled_model(DroppingInput)
    found = []
    for strategy in ("reversible", "checkpoint"):
        torch.manual_seed(5)
        found.append(gradients(model, strategy, plain_inputs(model, 20), 8)[1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_recordings_may_last(kind: str) -> None:
    """A recording that lasts over many steps asks every plan whether it may, and what it is made of."""
    plans = [language_model(kind).blocks[0].cell.plan(8) for _ in range(2)]
    plans[0].prepare()
    assert plans[0].holds(plans[1]) and plans[0].tensors() == []


def test_plain_division_is_refused_by_name() -> None:
    model = language_model("gru")
    with pytest.raises(StrategyError, match="a ReversibleGru is stepped token by token: use 'reversible'"):
        gradients(model, "reversible-lossy", plain_inputs(model, 64), 8)


def test_second_derivatives_are_refused_on_the_grid() -> None:
    cell = ReversibleGru(4)
    replay = cell.replay(cell.exact(cell.empty(1)), torch.randn(1, 3, 4, requires_grad=True))
    with pytest.raises(StrategyError, match="second derivatives"):
        torch.autograd.grad(replay.out.sum(), list(cell.parameters()), create_graph=True, allow_unused=True)
