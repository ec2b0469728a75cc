"""``fully_shard`` over two processes (gloo): a model sharded as one unit trains as whole, under every strategy.

Block by block: ``tests/test_sharded_blocks.py``.
"""

from typing import Any

import pytest
import torch
import torch.distributed
from bptt_cases import random_tokens, relative_error, tiny_model
from processes import in_ranks, wholes
from torch.distributed.fsdp import fully_shard

from rwkv_rev.errors import StrategyError

CHUNK, ROWS, WORLD, STEPS = 8, 2, 2, 2
STRATEGIES = ["full", "checkpoint", "reversible", "truncated"]

pytestmark = pytest.mark.dist


def train(model: Any, rows: slice) -> dict[str, Any]:
    """Gradients of each step, whole, and how many numbers the optimizer keeps here."""
    tokens = random_tokens(20, batch=ROWS)[rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found: dict[str, Any] = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        found[f"step {step}"] = wholes(
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        )
        optimizer.step()
    kept = [t for state in optimizer.state.values() for t in state.values() if t.dim() > 0]
    found["kept"] = sum(t.to_local().numel() if hasattr(t, "to_local") else t.numel() for t in kept)
    return found


def model_of(strategy: str) -> Any:
    return tiny_model("5.2", chunk_length=CHUNK, bptt=strategy)


def sharded(strategy: str, rank: int, *, blocks: bool = False, reshard: bool = True) -> dict[str, Any]:
    model = model_of(strategy)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (WORLD,))
    for block in model.model.blocks if blocks else ():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    return train(model, slice(rank, rank + 1))


def work(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {strategy: sharded(strategy, rank) for strategy in STRATEGIES}
    found["kept gathered"] = sharded("reversible", rank, reshard=False)
    for strategy in ("full", "reversible"):
        found[f"{strategy} by block"] = sharded(strategy, rank, blocks=True)
    try:
        sharded("truncated", rank, blocks=True)
    except StrategyError as error:
        found["truncated by block"] = str(error)
    return found


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_ranks(work, WORLD, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", [*STRATEGIES, "kept gathered", "full by block", "reversible by block"])
def test_equals_the_whole_model(by_rank: list[dict[str, Any]], case: str) -> None:
    strategy = "reversible" if case == "kept gathered" else case.split()[0]
    expected = train(model_of(strategy), slice(None))
    for found in by_rank:
        for step in range(STEPS):
            for name, gradient in expected[f"step {step}"].items():
                error = relative_error(found[case][f"step {step}"][name], gradient)
                assert error <= (2e-5 if step == 0 else 2e-4), (step, name)
    kept = [found[case]["kept"] for found in by_rank]
    assert sum(kept) == expected["kept"] and max(kept) < 0.6 * expected["kept"]


def test_truncated_by_block_is_refused(by_rank: list[dict[str, Any]]) -> None:
    for found in by_rank:
        assert "shard the model as one unit, fully_shard(model)" in found["truncated by block"]
