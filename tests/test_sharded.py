"""The sharded optimizer in two processes (gloo) against AdamW in one: numbers, state, layout, resuming."""

from typing import Any

import pytest
import torch
from processes import in_ranks
from torch import Tensor

from rwkv_rev.training.sharded import ShardedOptimizer, deal, state_bytes

WORLD, STEPS = 2, 5
SHAPES = [(40, 30), (30, 40), (7,), (300,), (1,), (64, 16)]

pytestmark = pytest.mark.dist


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


def adamw(tensors: list[Tensor], groups: str) -> torch.optim.AdamW:
    decayed = [tensor for tensor in tensors if tensor.dim() == 2]
    rest = [tensor for tensor in tensors if tensor.dim() != 2]
    first, second = {"two": (decayed, rest), "one empty": (tensors, [])}[groups]
    return torch.optim.AdamW(
        [{"params": first, "weight_decay": 0.1}, {"params": second, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.99),
        fused=True,
    )


def step(optimizer: torch.optim.Optimizer, tensors: list[Tensor], number: int) -> None:
    """A step at a rate that a schedule has changed, from gradients that every process has."""
    generator = torch.Generator().manual_seed(100 + number)
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, generator=generator)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 / (1 + number)
    optimizer.step()


def train(rank: int, groups: str) -> dict[str, Any]:
    tensors = parameters()
    optimizer = ShardedOptimizer(adamw(tensors, groups))
    empty = optimizer.state_dict()
    optimizer.load_state_dict(empty)  # as accelerate does
    for number in range(STEPS):
        step(optimizer, tensors, number)
    optimizer.gather()
    saved = optimizer.state_dict()
    optimizer.release()
    found = {"parameters": [t.detach().clone() for t in tensors], "bytes": state_bytes(optimizer)}
    found |= {"saved": saved, "released": len(optimizer.state_dict()["state"])}

    alone = adamw(copied := parameters(), groups)
    for number in range(STEPS):
        step(alone, copied, number)
    resumed = ShardedOptimizer(adamw(copied, groups))
    resumed.load_state_dict(alone.state_dict())
    step(resumed, copied, STEPS)
    return found | {"resumed": [t.detach() for t in copied], "resumed bytes": state_bytes(resumed)}


def work(rank: int) -> dict[str, Any]:
    return {groups: train(rank, groups) for groups in ("two", "one empty")}


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_ranks(work, WORLD, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("groups", ["two", "one empty"])
def test_equals_the_whole_optimizer(by_rank: list[dict[str, Any]], groups: str) -> None:
    tensors = parameters()
    whole = adamw(tensors, groups)
    for number in range(STEPS):
        step(whole, tensors, number)
    for rank in by_rank:
        for found, expected in zip(rank[groups]["parameters"], tensors, strict=True):
            assert torch.equal(found, expected)
    saved, expected_state = by_rank[0][groups]["saved"], whole.state_dict()
    assert saved["param_groups"] == expected_state["param_groups"]
    assert saved["state"].keys() == expected_state["state"].keys()
    for index, state in expected_state["state"].items():
        assert saved["state"][index].keys() == state.keys()
        for name, tensor in state.items():
            assert torch.equal(saved["state"][index][name], tensor), (index, name)
    assert [rank[groups]["released"] for rank in by_rank] == [0, 0]
    assert not by_rank[1][groups]["saved"]["state"], "only the first process gathers"


@pytest.mark.parametrize("groups", ["two", "one empty"])
def test_goes_on_where_the_whole_optimizer_stopped(by_rank: list[dict[str, Any]], groups: str) -> None:
    tensors = parameters()
    whole = adamw(tensors, groups)
    for number in range(STEPS + 1):
        step(whole, tensors, number)
    for rank in by_rank:
        for found, expected in zip(rank[groups]["resumed"], tensors, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("groups", ["two", "one empty"])
def test_each_process_keeps_its_share(by_rank: list[dict[str, Any]], groups: str) -> None:
    tensors = parameters()
    whole = adamw(tensors, groups)
    step(whole, tensors, 0)
    for name in ("bytes", "resumed bytes"):
        shares = [rank[groups][name] for rank in by_rank]
        assert sum(shares) == state_bytes(whole)
        assert max(shares) < 0.6 * sum(shares)


def test_deal() -> None:
    assert deal([5, 9, 1, 1, 3], 2) == [1, 0, 1, 0, 1]
    assert deal([4], 3) == [0]
    assert sorted(deal([1] * 6, 3)) == [0, 0, 1, 1, 2, 2]
