"""transformers' Trainer under accelerate's FSDP plugin (version 2): one process's losses, and resuming among others.

accelerate does not take its plugin on a CPU: the test puts it there.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from bptt_cases import random_tokens, tiny_model
from processes import free_port, in_ranks
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

ROWS, LENGTH, CHUNK = 12, 15, 8
STEP, WORLDS = 6, (2, 3)
"""Rows of a step; processes that train, and those that go on."""

pytestmark = pytest.mark.dist


class Rows(Dataset):
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = random_tokens(LENGTH, batch=ROWS)[index]
        return {"input_ids": tokens, "labels": tokens}


class Sharding(Trainer):
    kept = "SHARDED_STATE_DICT"

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        self.accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as it does on a GPU
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            state_dict_type=self.kept,
            cpu_ram_efficient_loading=False,
            reshard_after_forward=True,
        )
        self.is_fsdp_enabled = True


class Whole(Sharding):
    kept = "FULL_STATE_DICT"


def trained(
    trainer: type[Trainer], folder: Path, rows: int, resume: str | None = None
) -> tuple[Any, list[float]]:
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=rows,
        max_steps=2,
        use_cpu=True,
        logging_steps=1,
        report_to="none",
        save_strategy="steps" if resume is None else "no",
        save_steps=1,
        disable_tqdm=True,
        learning_rate=1e-2,
        log_level="error",
    )
    model = tiny_model("5.2", chunk_length=CHUNK, bptt="reversible")
    found = trainer(model, arguments, train_dataset=Rows())
    found.train(resume_from_checkpoint=resume)
    return found.model, [row["loss"] for row in found.state.log_history if "loss" in row]


def work(folder: Path, port: int, world: int, rank: int) -> dict[str, Any]:
    """Two steps with a checkpoint after each; then the second again, from those of as many processes and of others."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    rows, found = STEP // world, {}
    for kind in (Sharding, Whole):
        own = folder / f"{kind.kept} of {world}"
        if world == WORLDS[0]:
            model, found[f"losses {kind.kept}"] = trained(kind, own, rows)
            found["sharded"] = all(isinstance(parameter, DTensor) for parameter in model.parameters())
        for checkpoint in sorted(folder.glob(f"{kind.kept} of */checkpoint-1")):
            _, found[f"{checkpoint.parent.name}"] = trained(kind, own, rows, str(checkpoint))
    return found


@pytest.fixture(scope="module")
def by_world(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for world in WORLDS:
        scratch = tmp_path_factory.mktemp("ranks")
        found[world] = in_ranks(partial(work, folder, free_port(), world), world, scratch)
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return trained(Trainer, tmp_path_factory.mktemp("one") / "one", STEP)[1]


@pytest.mark.parametrize("kept", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_losses_of_one_process(by_world: Any, expected: list[float], kept: str) -> None:
    for rank in by_world[WORLDS[0]]:
        assert rank["sharded"]
        assert rank[f"losses {kept}"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kept", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_goes_on_from_a_checkpoint(by_world: Any, expected: list[float], kept: str, world: int) -> None:
    """Of two processes, by two and by three."""
    for rank in by_world[world]:
        assert rank[f"{kept} of {WORLDS[0]}"] == pytest.approx(expected, rel=1e-5)
