"""A context shared by 2, 3 and 4 processes (gloo): loss, gradients, states and tape against one process alone."""

from functools import cache
from typing import Any

import pytest
import torch.distributed as dist
from context_cases import CASES, assert_equals_one_process
from processes import in_ranks

from rwkv_rev.distributed import context_group

pytestmark = pytest.mark.dist

BY_WORLD = {
    2: list(CASES),
    3: ["4 packed", "5.2 padded", "6 packed", "7 packed", "one token a piece"],
    4: ["4 padded", "5.2 packed", "6 packed, padded", "7 padded", "one token a piece"],
}
"""Cases of so many processes: each version, and each way to give tokens."""


def work(rank: int) -> dict[str, Any]:
    """One process: its cases in turn."""
    if dist.get_world_size() == 3:
        context_group.BUNDLE = 1000  # bytes: gradients travel in several bundles, and alone
    return {name: CASES[name].run(dist.group.WORLD) for name in BY_WORLD[dist.get_world_size()]}


@pytest.fixture(scope="module", params=list(BY_WORLD))
def ranks(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_ranks(work, request.param, tmp_path_factory.mktemp("ranks"))


@cache
def alone(name: str) -> dict[str, Any]:
    return CASES[name].run(None)


@pytest.mark.parametrize("name", list(CASES))
def test_equals_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    if name not in ranks[0]:
        pytest.skip("not of so many processes")
    assert_equals_one_process([found[name] for found in ranks], alone(name), CASES[name].dtype)


@pytest.mark.parametrize("name", ["5.2 padded", "6 packed, padded", "7 padded", "4 packed"])
def test_a_tape_is_held_once(ranks: list[dict[str, Any]], name: str) -> None:
    """But for what is compared, and what fills up the last share."""
    if name not in ranks[0]:
        pytest.skip("not of so many processes")
    tapes = [found[name]["tape"] for found in ranks]
    assert max(tapes) == min(tapes)
    compared = 1500  # bytes of checksums, of layers and chunks
    assert sum(tapes) <= alone(name)["tape"] + len(ranks) * compared
