"""Where a run takes place: its device, its dtype, and being one of several processes."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from rwkv_rev.bptt import lasting
from rwkv_rev.device import choose_device
from rwkv_rev.errors import RwkvRevError
from rwkv_rev.printable import shortened
from rwkv_rev.training.config import DTYPES


def first_process() -> bool:
    """Whether this process writes and speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def in_processes() -> Iterator[None]:
    """Leaves the process group at the end, if there came to be one; with several processes stdout is kept clean."""
    with _stdout_for_us() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else nullcontext():
        yield
        if dist.is_available() and dist.is_initialized():
            lasting.drop_all()  # recordings hold the group
            dist.destroy_process_group()


@contextmanager
def _stdout_for_us() -> Iterator[None]:
    """Sends to stderr whatever native code writes to stdout: gloo of torch 2.7 to 2.10 tells there whom it reached."""
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(ours, 1)
        os.close(ours)


_ACCELERATE_DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
_SHARDED = "ACCELERATE_USE_FSDP"
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
_PARALLEL = "ACCELERATE_USE_PARALLELISM_CONFIG"
_CONTEXT = "PARALLELISM_CONFIG_CP_SIZE"
_SPREAD = "PARALLELISM_CONFIG_DP_SHARD_SIZE"
_OTHERS = {
    "PARALLELISM_CONFIG_TP_SIZE": "tensor parallelism",
    "PARALLELISM_CONFIG_SP_SIZE": "sequence parallelism",
}
"""Of accelerate's configuration, what ranks there are beside those that share a context or shards."""
_UNSHARDED = {
    "FSDP_OFFLOAD_PARAMS": "offload_params, and chunks need a block's weights on the device: leave it out",
    "FSDP_ACTIVATION_CHECKPOINTING": "activation_checkpointing: leave it out, and use --set checkpoint_blocks=true",
}
_WHOLE_BLOCKS = "FSDP shards whole blocks of the model, each over all processes"


_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_HOW = "unset these variables for one process, or start by torchrun or accelerate launch"


def refuse_launch() -> None:
    """Raise RwkvRevError for half of what a launcher says, and for a model that it splits otherwise than we do."""
    _refuse_half_a_launch()
    names = [name for variable, name in _REFUSED.items() if _is_on(variable)]
    if _is_on(_PARALLEL):
        names += [name for variable, name in _OTHERS.items() if _ranks(variable) > 1]
    if names:
        raise RwkvRevError(
            f"accelerate was configured for {names[0]}, which finetune does not support: use accelerate launch "
            "--multi_gpu (or torchrun), --shard-optimizer to spread the optimizer's state, --shard-model (or "
            "accelerate's FSDP, version 2) to spread the weights too, and --context-parallel to share a context"
        )


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def _ranks(variable: str) -> int:
    text = os.environ.get(variable, "1").strip()
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else 1


def shards_model(asked: bool) -> bool:
    """Whether weights are spread over the processes: as asked for, or as accelerate was configured (its FSDP plugin).

    Accelerate is not told of it afterwards: units, gradients and checkpoints are ours.

    Raises:
        RwkvRevError: for what its plugin would do otherwise.
    """
    if _is_on(_PARALLEL) and _ranks(_SPREAD) > 1:
        if _ranks("PARALLELISM_CONFIG_DP_REPLICATE_SIZE") > 1:
            raise RwkvRevError(
                f"accelerate was configured for replicas of shards: {_WHOLE_BLOCKS}; leave dp_replicate_size out"
            )
        asked = True
    if _is_on(_SHARDED):
        if (version := os.environ.get("FSDP_VERSION", "2").strip()) != "2":
            raise RwkvRevError(
                f"accelerate was configured for FSDP of version {shortened(version)}, and finetune shards by version "
                "2: accelerate launch --use_fsdp --fsdp_version 2"
            )
        for variable, why in _UNSHARDED.items():
            if _is_on(variable):
                raise RwkvRevError(f"accelerate's FSDP was configured with {why}")
        if os.environ.get("FSDP_IGNORED_MODULES", "").strip() not in ("", "None"):
            raise RwkvRevError(
                f"accelerate's FSDP was configured with ignored_modules, and {_WHOLE_BLOCKS}: leave it out"
            )
        asked = True
    for variable in [name for name in os.environ if name == _SHARDED or name.startswith("FSDP_")]:
        del os.environ[variable]
    return asked


def context_ranks(asked: int) -> int:
    """How many processes share a context: as asked for, or as accelerate was configured (``ParallelismConfig``).

    Accelerate is not told of it afterwards: it would split a row's tokens for attention.

    Raises:
        RwkvRevError: where the two contradict each other, or the processes cannot be dealt out so.
    """
    if _is_on(_PARALLEL) and (configured := _ranks(_CONTEXT)) > 1:
        if asked not in (1, configured):
            raise RwkvRevError(
                f"context_parallel = {asked}, and accelerate was configured for cp_size = {configured}: name one of "
                "them"
            )
        asked = configured
    for variable in [
        name for name in os.environ if name == _PARALLEL or name.startswith("PARALLELISM_CONFIG_")
    ]:
        del os.environ[variable]
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % asked:
        raise RwkvRevError(
            f"context_parallel = {asked}: {world} process{'' if world == 1 else 'es'} cannot be dealt out in groups "
            f"of {asked}; start {asked}, 2 * {asked} and so on, by torchrun --nproc-per-node {asked} -m rwkv_rev.cli "
            "finetune"
        )
    return asked


def share_contexts(model: Any, ranks: int, device: str) -> None:
    """Let processes that follow one another share contexts, in groups of ``ranks``; others average gradients."""
    shape = (dist.get_world_size() // ranks, ranks)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("dp", "cp"))
    model.set_context_parallel(mesh, reduce_gradients=False)


def _refuse_half_a_launch() -> None:
    """Of the variables that torchrun sets, all or none."""
    there = {name: os.environ[name] for name in _LAUNCH if name in os.environ}
    numbers = {}
    for name, value in there.items():
        if name != "MASTER_ADDR":
            if not re.fullmatch(r"-1|[0-9]{1,9}", value.strip()):
                raise RwkvRevError(
                    f"{name} = {shortened(repr(value))} in the environment is no number; {_HOW}"
                )
            numbers[name] = int(value)
    rank, size = numbers.get("RANK", 0), numbers.get("WORLD_SIZE", 1)
    if rank > 0 or size > 1 or numbers.get("LOCAL_RANK", -1) >= 0:
        if missing := [name for name in _LAUNCH if name not in there]:
            raise RwkvRevError(
                f"the environment has {', '.join(there)}, as of one of several processes, but no "
                f"{', '.join(missing)}; {_HOW}"
            )
        if not 0 <= rank < size:
            raise RwkvRevError(f"RANK = {rank} in the environment is none of {size} processes; {_HOW}")


def training_device(name: str) -> str:
    """``cpu`` or ``cuda``: the GPU of each process is the one that its launcher gave it.

    Raises:
        RwkvRevError: for a device that is not there, and for any other.
    """
    device = choose_device(name)
    if device.type == "cuda" and device.index is not None:
        raise RwkvRevError(
            f"device = {name}: finetune takes the GPU that its launcher gives it; use device = cuda with "
            f"CUDA_VISIBLE_DEVICES={device.index}"
        )
    if device.type not in ("cpu", "cuda"):
        raise RwkvRevError(f"device = {name}: finetune trains on cpu and cuda; use device = cpu")
    return device.type


def choose_dtype(dtype: str, device: torch.device) -> str:
    """The dtype that ``auto`` is on a device, bfloat16 where a GPU has that; any other as it is.

    ``accelerate launch --mixed_precision`` is what ``auto`` means under it.

    Raises:
        RwkvRevError: for a dtype that the device cannot train in.
    """
    if dtype not in DTYPES:
        raise RwkvRevError(f"dtype = {dtype!r} does not exist; choose one of {', '.join(DTYPES)}")
    if dtype == "auto" and (asked := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
        if asked not in _ACCELERATE_DTYPES:
            raise RwkvRevError(
                f"accelerate was configured for {asked}, which finetune does not support: use bf16"
            )
        dtype = _ACCELERATE_DTYPES[asked]
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if dtype == "float16" and device.type == "cpu":
        raise RwkvRevError("dtype = float16 needs a GPU; use bfloat16 or float32 on the CPU")
    return dtype


def own_device(device: str) -> torch.device:
    """``cpu``, or the GPU of this process: each one that a launcher starts on a host has its own."""
    if device != "cuda":
        return torch.device(device)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
