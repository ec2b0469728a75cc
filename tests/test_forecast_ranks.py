"""The tape's forecast where ranks share a context, against what each of them has put there (gloo)."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from pairwise import every_two
from processes import in_ranks
from test_forecast import TOLERANCE, WIDE, forecasts

from rwkv_rev.modeling import RwkvRevForCausalLM

pytestmark = pytest.mark.dist

CONTEXT, CHUNK, ROWS = 150, 60, 2
"""Three chunks, the last of them half as long; both lengths are multiples of 2 and 3."""
CASES = every_two(WIDE, ("reversible", "checkpoint"), (2, 3))
"""Version, strategy, and how many ranks."""


def model_of(version: str) -> Any:
    torch.manual_seed(0)
    return RwkvRevForCausalLM(WIDE[version])


def cases(world: int) -> list[tuple[str, str]]:
    return [(version, strategy) for version, strategy, ranks in CASES if ranks == world]


def work(rank: int) -> dict[tuple[str, str], int]:
    found = {}
    tokens = torch.randint(500, (ROWS, CONTEXT), generator=torch.Generator().manual_seed(0))
    for version, strategy in cases(dist.get_world_size()):
        model = model_of(version)
        model.set_context_parallel(dist.group.WORLD)
        model.set_bptt(strategy, chunk_length=CHUNK)
        found[version, strategy] = model(tokens, labels=tokens).report["tape_bytes"]
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_tape_of_a_rank(world: int, tmp_path: Any) -> None:
    """Its share of each record; without ``ranks`` the forecast was W times that."""
    tapes = in_ranks(work, world, tmp_path)
    for version, strategy in cases(world):
        size = {"context": CONTEXT // world, "batch": ROWS, "chunk": CHUNK // world}
        forecast = forecasts(model_of(version), **size, ranks=world)[strategy].tape
        tape = max(each[version, strategy] for each in tapes)
        if (version, strategy) == ("6", "reversible"):  # the most that any data take
            assert tape <= forecast
        else:
            assert forecast <= tape <= (1 + TOLERANCE) * forecast, (version, strategy)
