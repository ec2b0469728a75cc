"""Checkpoints of sharded blocks go on with another number of processes: from two to one, and from one to two."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from bptt_cases import random_tokens, tiny_model
from processes import in_ranks
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

ROWS, LENGTH, CHUNK = 2, 15, 8

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]


def made(world: int) -> tuple[Any, Any]:
    model = tiny_model("5.2", chunk_length=CHUNK, bptt="reversible")
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def step(model: Any, optimizer: Any, rows: range) -> torch.Tensor:
    ids = random_tokens(LENGTH, batch=ROWS)
    optimizer.zero_grad()
    losses = [model(ids[row : row + 1], labels=ids[row : row + 1]).loss for row in rows]
    loss = torch.stack(losses).mean()
    loss.backward()
    optimizer.step()
    return torch.stack(losses).detach()


def saved(model: Any, optimizer: Any, folder: Path, *, full: bool) -> None:
    options = StateDictOptions(full_state_dict=full, cpu_offload=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    if not full:
        checkpoint.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    elif torch.distributed.get_rank() == 0:
        torch.save((weights, moments), folder)


def loaded(model: Any, optimizer: Any, folder: Path, *, full: bool) -> None:
    options = StateDictOptions(full_state_dict=full)
    if full:
        weights, moments = torch.load(folder)
    else:
        weights, moments = get_state_dict(model, optimizer)
        checkpoint.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options)


def two(folder: Path, rank: int) -> dict[str, Any]:
    """Two steps; then from the checkpoints after the first, of this run and of one process, the second again."""
    found: dict[str, Any] = {}
    model, optimizer = made(2)
    step(model, optimizer, range(rank, rank + 1))
    for full in (True, False):
        saved(model, optimizer, folder / f"two {full}", full=full)
    found["went on"] = step(model, optimizer, range(rank, rank + 1))
    for name, full in (("two True", True), ("two False", False), ("one", False)):
        model, optimizer = made(2)
        loaded(model, optimizer, folder / name, full=full)
        found[name] = step(model, optimizer, range(rank, rank + 1))
    return found


def one(folder: Path, rank: int) -> dict[str, Any]:
    """Two steps with a checkpoint between them; where there are some of two processes, the second step from those."""
    found: dict[str, Any] = {}
    if (folder / "one").exists():
        for name, full in (("two True", True), ("two False", False)):
            model, optimizer = made(1)
            loaded(model, optimizer, folder / name, full=full)
            found[name] = step(model, optimizer, range(ROWS))
        return found
    model, optimizer = made(1)
    step(model, optimizer, range(ROWS))
    saved(model, optimizer, folder / "one", full=False)
    return {"went on": step(model, optimizer, range(ROWS))}


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Of both rows in the second step, by who went on from whose checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def started(work: Any, world: int, name: str) -> list[dict[str, Any]]:
        scratch = folder / name
        scratch.mkdir()
        return in_ranks(partial(work, folder), world, scratch)

    (alone,) = started(one, 1, "first")
    ranks = started(two, 2, "second")
    (resumed,) = started(one, 1, "third")
    found = {f"two from {name}": torch.cat([rank[name] for rank in ranks]) for name in ranks[0]}
    found |= {f"one from {name}": loss for name, loss in resumed.items()}
    return found | {"one": alone["went on"]}


@pytest.mark.parametrize(
    "name",
    [
        "two from went on",
        "two from two True",
        "two from two False",
        "two from one",
        "one from two True",
        "one from two False",
    ],
)
def test_goes_on_with_another_number_of_processes(losses: dict[str, torch.Tensor], name: str) -> None:
    torch.testing.assert_close(losses[name], losses["one"], rtol=1e-5, atol=0)
