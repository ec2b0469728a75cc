"""transformers' Trainer under accelerate's FSDP plugin (version 2), two processes: one process's losses, and resuming.

accelerate does not take its plugin on a CPU: the test puts it there.
"""

import os
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from bptt_cases import random_tokens, tiny_model
from processes import in_ranks
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

ROWS, LENGTH, CHUNK = 8, 24, 8

pytestmark = pytest.mark.dist


class Rows(Dataset):
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = random_tokens(LENGTH, batch=ROWS)[index]
        return {"input_ids": tokens, "labels": tokens}


class Sharding(Trainer):
    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        self.accelerator.state.distributed_type = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            state_dict_type="SHARDED_STATE_DICT",
            cpu_ram_efficient_loading=False,
            reshard_after_forward=True,
        )
        self.is_fsdp_enabled = True


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
        save_strategy="steps" if trainer is Sharding else "no",
        save_steps=1,
        disable_tqdm=True,
        learning_rate=1e-2,
    )
    model = tiny_model("5.2", chunk_length=CHUNK, bptt="reversible")
    found = trainer(model, arguments, train_dataset=Rows())
    found.train(resume_from_checkpoint=resume)
    return found.model, [row["loss"] for row in found.state.log_history if "loss" in row]


def work(folder: Path, port: int, rank: int) -> dict[str, Any]:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    model, losses = trained(Sharding, folder, ROWS // 4)
    sharded = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    _, again = trained(Sharding, folder, ROWS // 4, str(folder / "checkpoint-1"))
    return {"losses": losses, "again": again, "sharded": sharded}


def test_losses_of_one_process(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    found = in_ranks(partial(work, tmp_path / "out", port), 2, tmp_path)
    _, expected = trained(Trainer, tmp_path / "one", ROWS // 2)
    for rank in found:
        assert rank["sharded"]
        assert rank["losses"] == pytest.approx(expected, rel=1e-5)
        assert rank["again"] == pytest.approx(expected, rel=1e-5)
