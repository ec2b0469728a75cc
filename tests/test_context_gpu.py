"""A context that two GPUs share (NCCL, Triton kernels, recordings) against one of them alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bptt_cases import random_tokens, relative_error, tiny_model
from context_cases import CASES, assert_same_states

from rwkv_rev.bptt import lasting

WORLD = 2

pytestmark = [pytest.mark.gpu, pytest.mark.dist]
if torch.cuda.device_count() < WORLD:
    pytest.skip("needs two CUDA devices", allow_module_level=True)

NAMES = [
    *(
        f"{version} {what}"
        for version in ("4", "5.2", "6", "7")
        for what in ("padded", "packed", "whole pieces")
    ),
    *("bundled 5.2", "bundled 7", "lora", "checkpointed blocks", "truncated", "7 tuned state"),
]
STEPS, CHUNK = 4, 64


def case_of(name: str) -> Any:
    """In float32: Triton's kernels take no float64."""
    return replace(CASES[name], dtype=torch.float32)


def steps(version: str, group: Any, device: torch.device) -> dict[str, Any]:
    """Gradients of the same step, again and again: from the third on by recordings."""
    model = tiny_model(version, head_size=64, hidden_size=128, chunk_length=CHUNK, bptt="reversible").to(
        device
    )
    model.set_context_parallel(group)
    tokens = random_tokens(10 * CHUNK).to(device)
    found = []
    for _ in range(STEPS):
        model.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        found.append(
            {name: p.grad.cpu() for name, p in model.named_parameters()} | {"loss": loss.detach().cpu()}
        )
    kept = lasting._kept.get(model)
    recorded = kept is not None and kept.recordings is not None
    del kept
    model.set_context_parallel(None)  # or the group, which recordings hold, could not end
    return {"steps": found, "recorded": recorded, "left": model in lasting._kept}


def work(rank: int, folder: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = f"file://{folder}/store"
    dist.init_process_group("nccl", init_method=store, rank=rank, world_size=WORLD, device_id=device)
    found = {name: case_of(name).run(dist.group.WORLD, device) for name in NAMES}
    found |= {f"steps {version}": steps(version, dist.group.WORLD, device) for version in ("5.2", "7")}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", NAMES)
def test_equals_one_gpu(ranks: list[dict[str, Any]], name: str) -> None:
    """As close to float64 as one GPU comes, whose kernels add in another order."""
    alone, exact = case_of(name).run(None, "cuda"), CASES[name].run(None, "cpu")
    each = [rank[name] for rank in ranks]
    for found in each:
        assert found["gradients"].keys() == alone["gradients"].keys() == exact["gradients"].keys()
        for key in ("loss", *exact["gradients"]):
            truth, *others = (one["gradients"].get(key, one["loss"]) for one in (exact, found, alone))
            error, of_one = (relative_error(one, truth) for one in others)
            assert error <= max(1e-5, 1.5 * of_one), key
        for one, truth in zip(found["state"], exact["state"], strict=True):
            assert relative_error(one, truth) <= 1e-5
    assert_same_states(each)


@pytest.mark.parametrize("version", ["5.2", "7"])
def test_recordings_give_the_same(ranks: list[dict[str, Any]], version: str) -> None:
    first, *_ = steps(version, None, torch.device("cuda"))["steps"]
    for found in ranks:
        steps_of_rank = found[f"steps {version}"]
        assert steps_of_rank["recorded"] and not steps_of_rank["left"]
        for step in steps_of_rank["steps"]:
            for name, truth in first.items():
                assert relative_error(step[name], truth) <= 1e-5, name
