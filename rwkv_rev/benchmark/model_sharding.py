"""Tokens per second and memory of a model that is spread over the processes block by block (FSDP2), fully tuned.

    torchrun --nproc-per-node 2 -m rwkv_rev.benchmark.model_sharding --shape 7-7b --chunk-length 2048,8192

Weights are made block by block and sharded at once: no process ever holds more than its part and one block. Each
process takes one row. A step is a loss, its gradient and an update by AdamW; a printed row is the median of the steps
after the first. Bytes are the most of any process.

``--weights bfloat16`` keeps weights and moments in bfloat16, ``float32`` both in float32 and computes in bfloat16 (the
mixed precision policy of FSDP2). Gradients are summed in float32 under both.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from rwkv_rev.benchmark.models import SHAPES, STANDARD_DEVIATION, shape_config
from rwkv_rev.json_text import json_text
from rwkv_rev.modeling import RwkvRevForCausalLM

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def sharded_model(
    shape: str, device: torch.device, weights: torch.dtype, compute: torch.dtype
) -> RwkvRevForCausalLM:
    """The model of a shape, this process's part of it on ``device``, with the official initialisation.

    Args:
        weights: of what is kept; one for all, as FSDP2 wants it.
        compute: in which blocks are computed.
    """
    with torch.device("meta"):
        model = RwkvRevForCausalLM(shape_config(shape))
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=compute) if compute != weights else MixedPrecisionPolicy()
    torch.manual_seed(0)
    blocks: Sequence[nn.Module] = model.blocks
    for block in blocks:
        _materialise(model, block, device, weights)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    for name, child in (*model.model.named_children(), *model.named_children()):
        if name not in ("blocks", "model"):
            _materialise(model, child, device, weights)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model.train()


@torch.no_grad()
def _materialise(
    model: RwkvRevForCausalLM, part: nn.Module, device: torch.device, weights: torch.dtype
) -> None:
    """Bring one part of a model from the meta device to ``device``, initialised."""
    part.to_empty(device=device)
    part.apply(model._init_weights)
    for module in part.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            module.weight.normal_(std=STANDARD_DEVIATION)
    for parameter in part.parameters():
        parameter.data = parameter.data.to(weights)


def measure(model: RwkvRevForCausalLM, ids: Tensor, optimizer: Any, steps: int) -> dict[str, Any]:
    """A row: speed over all processes, and the most memory of any."""
    cuda = ids.is_cuda
    seconds, report, losses = [], {}, []
    for step in range(steps + 1):
        if cuda:
            torch.cuda.synchronize()
            if step == 1:
                torch.cuda.reset_peak_memory_stats()
        dist.barrier()
        began = time.perf_counter()
        output = model(ids, labels=ids)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
        report = cast(dict[str, Any], output.report)
        seconds.append(time.perf_counter() - began)
    memory = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()] if cuda else [0, 0]
    most = torch.tensor([*memory, int(report.get("tape_bytes", 0))], device=ids.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    median = statistics.median(seconds[1:])
    return {
        "seconds": round(median, 3),
        "tokens_per_second": round(ids.numel() * dist.get_world_size() / median),
        **dict(zip(("peak_bytes", "reserved_bytes", "tape_bytes"), most.tolist(), strict=True)),
        "losses": losses,
    }


@contextmanager
def _process_group(device: str) -> Iterator[torch.device]:
    """The device of this process, in a group of those that torchrun has started."""
    own = (
        torch.device(device, int(os.environ.get("LOCAL_RANK", "0")))
        if device == "cuda"
        else torch.device(device)
    )
    if device == "cuda":
        torch.cuda.set_device(own)
    started = not dist.is_initialized()
    if started:
        cuda = device == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", device_id=own if cuda else None)
    try:
        yield own
    finally:
        if started:
            dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row of JSON for each chunk length, by the first process; ``arguments`` are the command line's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7-7b")
    parser.add_argument("--context-length", type=int, default=65536)
    parser.add_argument("--chunk-length", default="2048", help="tokens per chunk, comma-separated")
    parser.add_argument("--strategy", choices=("reversible", "checkpoint"), default="reversible")
    parser.add_argument("--weights", choices=DTYPES, default="bfloat16")
    parser.add_argument("--compute", choices=DTYPES, default="bfloat16")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args(arguments)
    with _process_group(args.device) as device:
        began = time.perf_counter()
        model = sharded_model(args.shape, device, DTYPES[args.weights], DTYPES[args.compute])
        made = round(time.perf_counter() - began, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        generator = torch.Generator().manual_seed(dist.get_rank())
        ids = torch.randint(model.config.vocab_size, (1, args.context_length), generator=generator).to(device)
        for chunk in map(int, args.chunk_length.split(",")):
            model.set_bptt(args.strategy, chunk_length=chunk)
            row = {
                "shape": args.shape,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "processes": dist.get_world_size(),
                "weights": args.weights,
                "compute": args.compute,
                "strategy": args.strategy,
                "tokens": args.context_length,
                "chunk_length": chunk,
                "seconds_to_make": made,
                **measure(model, ids, optimizer, args.steps),
            }
            if dist.get_rank() == 0:
                print(json_text(row), flush=True)


if __name__ == "__main__":
    main()
