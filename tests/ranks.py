"""The same work in several gloo processes of this machine, for tests of data-parallel training."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing


def in_ranks(work: Callable[[int], Any], world: int, folder: Path) -> list[Any]:
    """What ``work(rank)``, a function of a module, gives in each of ``world`` processes; files go to ``folder``."""
    torch.multiprocessing.spawn(_one_rank, args=(work, world, str(folder)), nprocs=world)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def _one_rank(rank: int, work: Callable[[int], Any], world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    torch.save(work(rank), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
