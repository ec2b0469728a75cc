"""Cells that are stepped a token at a time, for the laws, and a small language model around any of them.

Tests import it as ``from token_cases import LanguageModel``.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from bptt_cases import english
from cell_laws import Trial, trials
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rwkv_rev import position_wise
from rwkv_rev.bptt import STRATEGIES
from rwkv_rev.bptt.layers import run_layers
from rwkv_rev.bptt.strategy import LossInputs
from rwkv_rev.cells.block import ResidualBlock
from rwkv_rev.cells.coupled import CoupledCell
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.cells.reversible_gru import ReversibleGru
from rwkv_rev.cells.reversible_lstm import ReversibleLstm
from rwkv_rev.cells.token_cell import TokenCell, TokenState
from rwkv_rev.loss import next_token_targets
from rwkv_rev.state import ModelState

CELLS: dict[str, Any] = {"coupled": CoupledCell, "gru": ReversibleGru, "lstm": ReversibleLstm}
PROPERTIES = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16])
GATES = (0.0, 0.0, 0.0, 200.0, -200.0)
"""What is added to the gates' inputs: beyond 105 a sigmoid is 0 or 1 in float32."""


@torch.no_grad()
def fill(cell: nn.Module, generator: torch.Generator, dtype: torch.dtype) -> nn.Module:
    """Random parameters; some gates are 0 or 1 to the bit."""
    for parameter in cell.parameters():
        random = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            parameter.copy_(random / math.sqrt(parameter.shape[1]))
        else:
            table = torch.tensor(GATES)
            parameter.copy_(random + table[torch.randint(len(GATES), parameter.shape, generator=generator)])
    return cell.to(dtype)


@st.composite
def token_cells(draw: st.DrawFn, kind: str) -> tuple[TokenCell, int]:
    """(cell, D)."""
    width, size = draw(st.sampled_from([1, 3, 8])), draw(st.sampled_from([1, 2, 5]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    limits = {} if kind == "coupled" else {"forget_limit": draw(st.sampled_from([None, None, 2]))}
    cell = fill(CELLS[kind](width, size, **limits), generator, draw(DTYPES))
    assert isinstance(cell, TokenCell)
    return cell, width


def token_state(cell: TokenCell, batch: int, width: int, generator: torch.Generator) -> TokenState:
    """Random values, whole numbers and zeros among them."""
    dtype = next(cell.parameters()).dtype
    shape = (batch, cell.number_of_parts, cell.size)
    scales = torch.tensor([0.0, 1e-3, 1.0])[torch.randint(3, shape, generator=generator)]
    memory = torch.randn(shape, generator=generator).clamp(-3, 3) * scales
    return TokenState(memory.to(torch.float64 if dtype == torch.float64 else torch.float32))


def token_trials(kind: str) -> st.SearchStrategy[Trial]:
    """Trials of one of :data:`CELLS`."""
    return trials(token_cells(kind), token_state, longest=12)


# --- a language model ------------------------------------------------------------------------------------------------


class OneCellBlock(ResidualBlock):
    def __init__(self, width: int, cell: TokenCell) -> None:
        super().__init__()
        self.norm, self.cell = nn.LayerNorm(width), cell

    def parts(self) -> list[tuple[nn.Module, Any]]:
        return [(self.norm, self.cell)]


@dataclass(frozen=True)
class StackedState(ModelState):
    memory: Tensor  # [L, B, P, M]

    cells = ((TokenState, ("memory",)),)


class LanguageModel(nn.Module):
    """Embeddings of bytes, ``layers`` blocks of a cell each, and an output layer."""

    checkpoints_blocks = False

    def __init__(
        self, cell: Any, width: int = 12, layers: int = 2, vocabulary: int = 128, **settings: Any
    ) -> None:
        super().__init__()
        self.vocab_size = vocabulary
        self.embeddings, self.norm = nn.Embedding(vocabulary, width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(OneCellBlock(width, cell(width, **settings)) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    @position_wise
    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        return self.embeddings(input_ids)

    @position_wise
    def normalize(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)

    @position_wise
    def run(self, x: Tensor, state: StackedState, mask: ChunkMask | None) -> tuple[Tensor, StackedState]:
        layers = [state.layer(index) for index in range(len(self.blocks))]
        x, after = run_layers(list(self.blocks), x, layers, mask)
        return x, StackedState.stack(after)

    @position_wise
    def read(
        self,
        input_ids: Tensor,
        valid: Tensor | None,
        inputs_embeds: None,
        state: StackedState,
        borders: None = None,
    ) -> Any:
        mask = None if valid is None else ChunkMask.of(valid)
        x, after = self.run(self.embed(input_ids, None), state, mask)
        return self.normalize(x), after

    def empty(self, batch: int) -> StackedState:
        """The state before the first token."""
        dtype = torch.promote_types(self.head.weight.dtype, torch.float32)
        cell = self.blocks[0].cell
        return StackedState.stack([(cell.empty(batch, dtype=dtype),) for _ in self.blocks])


def language_model(kind: str, dtype: torch.dtype = torch.float64, **settings: Any) -> LanguageModel:
    """A random model of one of :data:`CELLS`, the same at each call."""
    torch.manual_seed(0)
    return LanguageModel(CELLS[kind], **settings).to(dtype).train()


def masked_inputs(model: LanguageModel, length: int = 11) -> LossInputs:
    """Two rows of text with padding and a hole, from a state that is not zero."""
    ids, valid = english(length, 2) % model.vocab_size, torch.ones(2, length, dtype=torch.bool)
    valid[0, :5], valid[1, 5:9] = False, False
    empty = model.empty(2).memory
    state = StackedState(
        (torch.randn(empty.shape, generator=torch.Generator().manual_seed(1)) / 2).to(empty.dtype)
    )
    targets = next_token_targets(ids, valid)
    return LossInputs(ids, None, valid, targets, float((targets >= 0).sum()), state)  # type: ignore[arg-type]


def plain_inputs(model: LanguageModel, length: int, batch: int = 2) -> LossInputs:
    """Rows of text, all of it valid, from the state before the first token."""
    ids = english(length, batch) % model.vocab_size
    targets = next_token_targets(ids, None)
    return LossInputs(ids, None, None, targets, float((targets >= 0).sum()), model.empty(batch))  # type: ignore[arg-type]


def gradients(model: LanguageModel, strategy: str, given: LossInputs, chunk: int) -> tuple[Any, list[Tensor]]:
    """The result of a strategy, and gradients by all parameters and the first state."""
    state = StackedState(given.state.tensors()[0].clone().requires_grad_())
    batch = LossInputs(given.input_ids, None, given.valid, given.targets, given.divisor, state)  # type: ignore[arg-type]
    result = STRATEGIES[strategy](chunk).loss(model, batch)  # type: ignore[arg-type]
    return result, list(torch.autograd.grad(result.loss, [*model.parameters(), state.memory]))
