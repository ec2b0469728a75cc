"""Contexts that are shared, and batches that are split: meshes of dp x cp, by DistributedDataParallel and FSDP2."""

from typing import Any

import pytest
import torch
from bptt_cases import random_tokens, relative_error, tiny_model
from processes import in_ranks, wholes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

CHUNK, LENGTH, ROWS, WORLD = 10, 17, 2, 4
WAYS = ["ddp", "ddp, summed first", "fsdp", "fsdp, summed first"]

pytestmark = pytest.mark.dist


def train(model: nn.Module, loss_of: Any) -> dict[str, dict[str, Tensor]]:
    """Gradients of two steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = {}
    for step in range(2):
        optimizer.zero_grad()
        loss_of(step).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found[f"step {step}"] = {
            name.removeprefix("module."): gradient for name, gradient in wholes(gradients).items()
        }
        optimizer.step()
    return found


def tokens(step: int) -> Tensor:
    return random_tokens(LENGTH, batch=ROWS, seed=step)


def in_mesh(way: str) -> dict[str, dict[str, Tensor]]:
    """Each data-parallel rank has a row, and shares it with its context group."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    model = tiny_model(
        "7" if "fsdp" in way else "5.2", dtype=torch.float64, chunk_length=CHUNK, bptt="reversible"
    )
    model.set_context_parallel(mesh, reduce_gradients="summed" in way)
    inner = model
    if way.startswith("ddp"):
        inner = nn.parallel.DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=mesh["dp", "cp"]._flatten())
    row = mesh["dp"].get_local_rank()

    def loss_of(step: int) -> Tensor:
        own = tokens(step)[row : row + 1]
        return inner(input_ids=own, labels=own).loss

    return train(inner, loss_of)


def work(rank: int) -> dict[str, Any]:
    return {way: in_mesh(way) for way in WAYS}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_ranks(work, WORLD, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("way", WAYS)
def test_equals_one_process(ranks: list[dict[str, Any]], way: str) -> None:
    model = tiny_model(
        "7" if "fsdp" in way else "5.2", dtype=torch.float64, chunk_length=CHUNK, bptt="reversible"
    )
    truths = train(model, lambda step: model(input_ids=tokens(step), labels=tokens(step)).loss)
    for found in ranks:
        for step, truth in truths.items():
            for name, gradient in truth.items():
                assert relative_error(found[way][step][name], gradient) <= 1e-10, (step, name)
