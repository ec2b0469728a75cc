"""A product gives other bits on some CPUs where its operands begin elsewhere in memory, have other strides or rows.

So both sweeps, and both directions of a cell that is stepped, must hand it operands that lie alike; that the bits are
the same on the machine of a test says nothing of another one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import test_rewriting
import test_token_models
import torch
from bptt_cases import differentiate, random_tokens, tiny_model
from token_cases import CELLS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_rev import RwkvRevForCausalLM
from rwkv_rev.bptt import sweep
from rwkv_rev.bptt.strategy import Chunk
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.cells.token_cell import TokenCell, TokenState

ALIGNMENT = 64
"""Bytes that new tensors of PyTorch begin at a multiple of, and that MKL promises the same bits for."""
LENGTH, CHUNK = 13, 5
Operand = tuple[tuple[int, ...], tuple[int, ...], int]
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot")


def lies(tensor: Tensor) -> Operand:
    """Shape, strides (of more than one), and where it begins."""
    strides = tuple(stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    return tuple(tensor.shape), strides, tensor.data_ptr() % ALIGNMENT


# --- what gates are handed ----------------------------------------------------------------------------------------


@contextmanager
def watched(cell: TokenCell, patch: pytest.MonkeyPatch, seen: list[Sequence[Tensor]]) -> Iterator[None]:
    """Collects the parts that gates and updates are handed; updates give c in another layout."""
    gates, update = cell.gates, cell.update

    def read_gates(half: int, token: Any, parts: Sequence[Tensor]) -> Any:
        seen.append(list(parts))
        return gates(half, token, parts)

    def read_update(part: int, given: Any, parts: Sequence[Tensor]) -> Any:
        seen.append(list(parts))
        decay, change = update(part, given, parts)
        return decay, change.T.contiguous().T

    with patch.context() as inside:
        inside.setattr(cell, "gates", read_gates)
        inside.setattr(cell, "update", read_update)
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", CELLS)
def test_gates_are_handed_aligned_parts_in_both_directions(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of odd width, and from a state that begins anywhere."""
    torch.manual_seed(0)
    for rows in (1, 3):
        cell = CELLS[kind](7, 5).to(dtype)
        x, mask = torch.randn(rows, 4, 7, dtype=dtype), ChunkMask.of(torch.rand(rows, 4) < 0.7)
        empty = cell.empty(rows, dtype=torch.promote_types(dtype, torch.float32)).memory
        state = TokenState(torch.rand(empty.numel() + 1).to(empty.dtype)[1:].view(empty.shape))
        cell.advance(cell.exact(state), x)  # the cell's rules are looked at once
        seen: list[Sequence[Tensor]] = []
        with watched(cell, monkeypatch, seen):
            cell.step(state, x, mask)
            before = cell.exact(state)
            cell.step_again(before, state, x, mask)
            done = cell.advance(before, x, mask)
            forwards = len(seen)
            kept = done.state.remnant(done.remnant.tensors(done.remnant.size))
            again = cell.retreat(done.state, x, mask, kept)
            assert len(seen) > forwards
        assert torch.equal(again.state.memory.mantissa, before.memory.mantissa)
        assert torch.equal(again.out, done.out)
        for part in (part for parts in seen for part in parts):
            assert part.is_contiguous()
            assert part.data_ptr() % ALIGNMENT == 0


# --- products of both sweeps --------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Collects how the operands of products lie."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, tuple[Operand, ...]]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in PRODUCTS:
            self.found.add((name, tuple(lies(one) for one in args if isinstance(one, Tensor))))
        return function(*args, **(kwargs or {}))


def model_of(version: str) -> RwkvRevForCausalLM:
    """Of odd sizes, where its numbers of heads allow them."""
    if version.startswith("coupled-"):
        return test_rewriting.model_of(version.removeprefix("coupled-"), torch.float32)
    if version == "linear-attention":
        return test_token_models.model_of(version, torch.float32)
    if not version[0].isdigit():
        return test_token_models.model_of(version, torch.float32, hidden_size=9)
    heads = {} if version == "4" else {"head_size": 5}
    return tiny_model(version, hidden_size=15, intermediate_size=33, **heads)


VERSIONS = ("4", "5.0", "5.1", "5.2", "6", "7", "linear-attention", *test_token_models.NAMES)


@pytest.mark.parametrize("version", [*VERSIONS, "coupled-4", "coupled-5.2"])
def test_both_sweeps_multiply_operands_that_lie_alike(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tokens, and of embeddings that begin anywhere with packed documents, in chunks of odd length."""
    model, swept = model_of(version), {"advance_layers": [], "replay_layers": []}

    def watch(name: str) -> Callable[..., Any]:
        honest = getattr(sweep, name)

        def call(*given: Any, **named: Any) -> Any:
            with Products() as products:
                made = honest(*given, **named)
            swept[name].append(products.found)
            return made

        return call

    # once before: cells look at their rules by products of their own
    differentiate(model, "reversible", CHUNK, input_ids=random_tokens(LENGTH))
    for name in swept:
        monkeypatch.setattr(sweep, name, watch(name))
    documents = torch.cat([torch.arange(6), torch.arange(LENGTH - 6)])
    for rows, given in (
        (1, {"input_ids": random_tokens(LENGTH)}),
        (2, {"input_ids": random_tokens(LENGTH, 2)}),
        (2, embeddings(model) | {"position_ids": documents.expand(2, -1)}),
    ):
        for found in swept.values():
            found.clear()
        differentiate(model, "reversible", CHUNK, **given)
        first, second = swept["advance_layers"], swept["replay_layers"][:0:-1]  # not the last chunk
        assert len(first) == len(second) == LENGTH // CHUNK, rows
        for one, other in zip(first, second, strict=True):
            assert one, "no product at all"
            assert one == other


def embeddings(model: RwkvRevForCausalLM) -> dict[str, Any]:
    """Two rows that begin anywhere in memory."""
    width = model.config.hidden_size
    numbers = torch.randn(2 * LENGTH * width + 3, generator=torch.Generator().manual_seed(0))
    return {"inputs_embeds": numbers[3:].view(2, LENGTH, width), "labels": random_tokens(LENGTH, 2)}


@pytest.mark.parametrize("strategy", ["reversible", "checkpoint"])
def test_both_sweeps_embed_embeddings_that_lie_alike(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of embeddings that begin anywhere, which what stands before block 0 may multiply."""
    seen, honest = [], Chunk.embed

    def embed(chunk: Chunk, model: Any, embeds: Tensor) -> Tensor:
        seen.append(lies(embeds))
        return honest(chunk, model, embeds)

    monkeypatch.setattr(Chunk, "embed", embed)
    model = tiny_model("5.2")
    differentiate(model, strategy, CHUNK, **embeddings(model))
    assert len(seen) == 5
    assert seen[:2] == seen[:2:-1]
    assert {start for _, _, start in seen} == {0}
