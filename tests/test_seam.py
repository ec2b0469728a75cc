"""A cell that is no RWKV, in a model of its own, goes through both sweeps without an edit elsewhere.

Plain linear attention, ``y_t = q_t (S + sum_{j<=t} k_j^T v_j)``: its memory only adds, so nothing of it is forgotten.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from bptt_cases import english, relative_error
from torch import Tensor, nn

from rwkv_rev import position_wise
from rwkv_rev.bptt import STRATEGIES
from rwkv_rev.bptt.layers import run_layers
from rwkv_rev.bptt.strategy import LossInputs
from rwkv_rev.cells.block import ResidualBlock
from rwkv_rev.cells.contract import Advanced, Replay, ReversibleCell, leaves
from rwkv_rev.cells.exact_sums import ExactSums
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.errors import ReversalMismatchError
from rwkv_rev.foreign.search import strangers
from rwkv_rev.loss import next_token_targets
from rwkv_rev.reversal.additive import Additive, NoRemnant
from rwkv_rev.reversal.fingerprint import checksum
from rwkv_rev.state import ModelState

SIZE, LAYERS, CHUNK = 16, 3, 8


class SumValues(NamedTuple):
    memory: Tensor


class SumCell(ReversibleCell):
    inverts_memory = True

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(SIZE, SIZE, bias=False) for _ in range(4))

    def plan(self, length: int) -> None:
        return None

    def exact(self, state: SumValues) -> ExactSums:
        return ExactSums((Additive.of(state.memory, format="int64", exponent=-30),))

    def values(self, state: ExactSums) -> SumValues:
        return SumValues(state.memories[0].value(self.query.weight.dtype))

    def step(self, state: SumValues, x: Tensor, mask: ChunkMask | None = None) -> tuple[Tensor, SumValues]:
        key, value = self.pair(x, mask)
        query = self.query(x)
        inside = (query @ key.mT).tril() @ value
        update = key.mT @ value
        return self.output(inside + query @ state.memory), SumValues(state.memory + update)

    def pair(self, x: Tensor, mask: ChunkMask | None) -> tuple[Tensor, Tensor]:
        key, value = self.key(x), self.value(x)
        return key, value if mask is None else value * mask.valid[..., None]

    @torch.no_grad()
    def advance(
        self, state: ExactSums, x: Tensor, mask: Any = None, plan: Any = None, *, output: bool = True
    ) -> Advanced:
        out, _ = self.step(self.values(state), x, mask)
        key, value = self.pair(x, mask)
        update = key.mT @ value
        after, remnant = state.memories[0].advance(update)
        return Advanced(ExactSums((after,)), out, remnant, checksum(update)[None])

    def replay(
        self, state: ExactSums, x: Tensor, mask: Any = None, plan: Any = None, after: Any = None
    ) -> Replay:
        start = leaves(self.values(state))
        out, end = self.step(start, x, mask)
        with torch.no_grad():
            key, value = self.pair(x, mask)
            update = key.mT @ value
            same = None
            if after is not None:
                same = (state.memories[0].advance(update)[0].fingerprint() == after.fingerprint()).all()
        return Replay(state, out, start, end, checksum(update)[None], same)

    def retreat(
        self, state: ExactSums, x: Tensor, mask: Any, remnant: NoRemnant, plan: Any = None, after: Any = None
    ) -> Replay:
        with torch.no_grad():
            key, value = self.pair(x, mask)
            before = ExactSums((state.memories[0].retreat(key.mT @ value),))
        return self.replay(before, x, mask, plan, after)


class SumBlock(ResidualBlock):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.cell = nn.LayerNorm(SIZE), SumCell()

    def parts(self) -> list[tuple[nn.Module, ReversibleCell]]:
        return [(self.norm, self.cell)]


@dataclass(frozen=True)
class SumState(ModelState):
    memory: Tensor  # [L, B, N, N]

    cells = ((SumValues, ("memory",)),)


class SumModel(nn.Module):
    vocab_size, checkpoints_blocks = 128, False

    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.norm = nn.Embedding(self.vocab_size, SIZE), nn.LayerNorm(SIZE)
        self.blocks = nn.ModuleList(SumBlock() for _ in range(LAYERS))
        self.head = nn.Linear(SIZE, self.vocab_size, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    @position_wise
    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        return self.embeddings(input_ids)

    @position_wise
    def normalize(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)

    @position_wise
    def run(self, x: Tensor, state: SumState, mask: ChunkMask | None) -> tuple[Tensor, SumState]:
        x, after = run_layers(list(self.blocks), x, [state.layer(i) for i in range(LAYERS)], mask)
        return x, SumState.stack(after)

    @position_wise
    def read(
        self,
        input_ids: Tensor,
        valid: Tensor | None,
        inputs_embeds: None,
        state: SumState,
        borders: None = None,
    ) -> Any:
        x, after = self.run(
            self.embed(input_ids, None), state, None if valid is None else ChunkMask.of(valid)
        )
        return self.normalize(x), after


@pytest.fixture
def model() -> SumModel:
    return SumModel().double().train()


def inputs(length: int = 43) -> LossInputs:
    ids, valid = english(length, 2) % 128, torch.ones(2, length, dtype=torch.bool)
    valid[0, :9], valid[1, 20:25] = False, False
    state = SumState(torch.randn(LAYERS, 2, SIZE, SIZE, dtype=torch.float64) / 10)
    targets = next_token_targets(ids, valid)
    return LossInputs(ids, None, valid, targets, float((targets >= 0).sum()), state)


def gradients(model: SumModel, strategy: str, given: LossInputs) -> tuple[Any, list[Tensor]]:
    state = SumState(given.state.memory.clone().requires_grad_())
    batch = LossInputs(given.input_ids, None, given.valid, given.targets, given.divisor, state)  # type: ignore[arg-type]
    result = STRATEGIES[strategy](CHUNK).loss(model, batch)  # type: ignore[arg-type]
    return result, list(torch.autograd.grad(result.loss, [*model.parameters(), state.memory]))


@pytest.mark.parametrize("strategy", ["reversible", "checkpoint"])
def test_gradients_are_those_of_full(model: SumModel, strategy: str) -> None:
    given = inputs()
    whole, expected = gradients(model, "full", given)
    result, found = gradients(model, strategy, given)
    torch.testing.assert_close(result.loss, whole.loss, rtol=1e-8, atol=0)
    torch.testing.assert_close(result.state.memory, whole.state.memory, rtol=0, atol=1e-7)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) <= 1e-6


def test_nothing_of_the_memory_is_on_the_tape(model: SumModel) -> None:
    """A print of two numbers and a fingerprint for each layer: 24 bytes, laid out by 16."""
    given = inputs(64)
    reversible, _ = gradients(model, "reversible", given)
    checkpoint, _ = gradients(model, "checkpoint", given)
    inner, memory = 64 // CHUNK - 2, 2 * SIZE * SIZE * 8
    assert reversible.report["tape_bytes"] <= inner * LAYERS * 48
    assert checkpoint.report["tape_bytes"] >= inner * LAYERS * memory


def test_another_arithmetic_on_the_way_back_is_found(
    model: SumModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Additive.retreat
    monkeypatch.setattr(
        Additive,
        "retreat",
        lambda self, change: Additive(honest(self, change).units + 1, self.exponent),
    )
    with pytest.raises(ReversalMismatchError):
        gradients(model, "reversible", inputs())


@pytest.mark.parametrize("way", ["forward", "__call__", "_call_impl", "_wrapped_call_impl"])
@pytest.mark.parametrize("kind", [SumBlock, SumCell])
def test_a_forward_of_its_own_is_refused_by_name(kind: type[nn.Module], way: str) -> None:
    def other(self: Any, *given: Any, **named: Any) -> Any:
        out, after = getattr(kind, way)(self, *given, **named)
        return out if out is None else out - out.mean(1, keepdim=True), after

    own = {"_wrapped_call_impl": other, "__call__": other} if way == "_wrapped_call_impl" else {way: other}
    meddling = type("Meddling", (kind,), own)
    assert not strangers(SumModel()).unknown
    model = SumModel()
    block = model.blocks[1]
    changed = block if kind is SumBlock else block.cells[0]
    changed.__class__ = meddling
    where = next(name for name, module in model.named_modules() if module is changed)
    assert [found.where for found in strangers(model).unknown] == [f"Meddling at {where}"]
    position_wise(meddling)
    assert not strangers(model).unknown
