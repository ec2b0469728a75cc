"""Sharded blocks in three and four processes: parts of unequal size, and contexts shared among them (dp x cp).

Four processes are a mesh of two groups of two: each group shares a context (cp), and the blocks are sharded over all
four, or over one process of each group (dp), with replicas or without.
"""

from typing import Any

import pytest
import torch
from bptt_cases import random_tokens, relative_error
from processes import in_ranks, wholes
from test_sharded_blocks import TOLERANCES, Settings, model_of, model_settings, sharded
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from rwkv_rev.distributed import sharded_blocks
from rwkv_rev.errors import StrategyError

LENGTH, SHORT = 21, 7
"""Tokens of a row; where rows differ the first process's, or group's, is short."""

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

THREE: dict[str, Settings] = {
    "5.2": {},
    "7 checkpoint, uneven rows": {"version": "7", "bptt": "checkpoint", "uneven": True},
    "6 lora": {"version": "6", "tune": "lora", "uneven": True},
    "7 state": {"version": "7", "tune": "state"},
    "4 float32": {"version": "4", "dtype": torch.float32},
}
FOUR: dict[str, Settings] = {
    "5.2": {"uneven": True},
    "5.2 summed first": {"summed": True},
    "7 checkpoint": {"version": "7", "bptt": "checkpoint", "uneven": True},
    "6 lora, summed first": {"version": "6", "tune": "lora", "summed": True},
    "7 state": {"version": "7", "tune": "state"},
    "auto, uneven": {"bptt": "auto", "uneven": True},
    "one chunk, full": {"bptt": "full", "length": SHORT},
    "4 float32": {"version": "4", "dtype": torch.float32},
    "packed": {"version": "7", "packed": True},
    "replicas": {"mesh": "replicas", "uneven": True},
    "replicas, summed first": {"mesh": "replicas", "summed": True},
    "over dp, summed first": {"mesh": "dp", "summed": True},
}


def settings_of(case: Settings) -> Settings:
    return {
        name: value
        for name, value in model_settings(case).items()
        if name not in ("summed", "mesh", "length")
    }


def row(at: int, rows: int, case: Settings) -> Tensor:
    length = SHORT if case.get("uneven") and at == 0 else case.get("length", LENGTH)
    return random_tokens(LENGTH, batch=rows)[at : at + 1, :length]


def trained(model: Any, own: list[int], rows: int, case: Settings) -> dict[str, Tensor]:
    """Whole gradients and losses of these rows."""
    found = {}
    for at in own:
        ids = row(at, rows, case)
        borders = torch.zeros_like(ids, dtype=torch.bool)
        borders[:, [3, 6]] = True
        loss = model(ids, labels=ids, **({"borders": borders} if case.get("packed") else {})).loss
        (loss / len(own)).backward()
        found[f"loss {at}"] = loss.detach()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | wholes(gradients)


def three(rank: int) -> dict[str, Any]:
    sharded_blocks.SMALL = 4  # these weights are small, and shall be freed
    mesh = init_device_mesh("cpu", (3,))
    return {
        name: trained(sharded(model_of(**settings_of(case)), mesh), [rank], 3, case)
        for name, case in THREE.items()
    }


def four(rank: int) -> dict[str, Any]:
    sharded_blocks.SMALL = 4
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    meshes = {
        "all": mesh["dp", "cp"]._flatten(),
        "replicas": init_device_mesh("cpu", (2, 2), mesh_dim_names=("one", "other")),
        "dp": mesh["dp"],
    }
    found: dict[str, Any] = {}

    def made(case: Settings) -> Any:
        model = model_of(**settings_of(case))
        inner = model.base_model.model if hasattr(model, "peft_config") else model
        inner.set_context_parallel(mesh["cp"], reduce_gradients=case.get("summed", False))
        return sharded(model, meshes[case.get("mesh", "all")])

    for name, case in FOUR.items():
        found[name] = trained(made(case), [mesh["dp"].get_local_rank()], 2, case)
    try:
        trained(made({"mesh": "dp"}), [0], 2, {})
    except StrategyError as error:
        found["refused"] = str(error)
    return found


@pytest.fixture(scope="module")
def of_three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_ranks(three, 3, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_ranks(four, 4, tmp_path_factory.mktemp("ranks"))


def assert_as_whole(ranks: list[dict[str, Any]], name: str, case: Settings, rows: int) -> None:
    truth = trained(model_of(**settings_of(case)), list(range(rows)), rows, case)
    for found in ranks:
        assert {key for key in truth if not key.startswith("loss")} <= found[name].keys()
        for key, value in found[name].items():
            error = relative_error(value, truth[key])
            assert error <= TOLERANCES[case.get("dtype", torch.float64)], (key, error)


@pytest.mark.parametrize("name", THREE)
def test_shards_of_unequal_size(of_three: list[dict[str, Any]], name: str) -> None:
    assert_as_whole(of_three, name, THREE[name], 3)


@pytest.mark.parametrize("name", FOUR)
def test_shared_contexts(of_four: list[dict[str, Any]], name: str) -> None:
    assert_as_whole(of_four, name, FOUR[name], 2)


def test_shards_that_nobody_sums_over_the_context_are_refused(of_four: list[dict[str, Any]]) -> None:
    for found in of_four:
        assert "reduce_gradients=True" in found["refused"]
