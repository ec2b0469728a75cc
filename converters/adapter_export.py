"""Write a LoRA in the layout of RWKV-PEFT or of peft: A and B as they are, every bit.

RWKV-PEFT's ``.pth`` has one alpha for all maps, which it is told at the merge, and only the large maps: those of
RWKV-6's and 7's own low-rank pairs are no part of it (its merge script would drop them in silence). peft's folder is
what ``PeftModel.from_pretrained`` reads.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rwkv_rev.arguments import checked
from rwkv_rev.converters.adapter_files import (
    ALPHA_KEY,
    CONFIG_NAME,
    PEFT_PREFIX,
    VERSION_KEY,
    linear_maps,
    read_adapter,
)
from rwkv_rev.converters.additions import Adapter, LowRank
from rwkv_rev.converters.converted import ConvertedModel
from rwkv_rev.converters.rewriter import Entry, Shard, write_shard
from rwkv_rev.converters.torch_files import write_torch
from rwkv_rev.errors import OutputError
from rwkv_rev.folders.safe_output import check_output, whole_directory
from rwkv_rev.folders.selection import some


@dataclass(frozen=True)
class AdapterFile:
    """An adapter that was written: its path, layout, rank, alpha, and how many maps it changes."""

    path: Path
    layout: str
    rank: int
    alpha: float
    weights: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return vars(self) | {"path": str(self.path)}


@checked
def save_adapter(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    to: Literal["rwkv-peft", "peft"] = "rwkv-peft",
    alpha: float | None = None,
    force: bool = False,
) -> AdapterFile:
    """Write a LoRA of a model in the layout of another tool.

    Args:
        base: the converted model that it was trained on, by which its maps are known.
        adapter: RWKV-PEFT's ``.pth``, or a folder of peft's, as ``finetune --tune lora`` leaves it in ``adapter``.
        output: the ``.pth`` (rwkv-peft) or the folder (peft) to make.
        to: ``rwkv-peft`` or ``peft``.
        alpha: of a file that does not say it.
        force: replace an existing ``.pth``, at the very end.

    Raises:
        SourceError, CheckpointError: as :func:`rwkv_rev.merge`.
        OutputError: where the layout cannot hold the adapter, and if ``output`` cannot be written.
    """
    if to not in ("rwkv-peft", "peft"):
        raise OutputError(f"an adapter cannot be written as {to!r}; choose rwkv-peft or peft")
    output = Path(output)
    reads = Path(base) if to == "peft" else None
    check_output(output.absolute(), force=force, directory=to == "peft", reads=reads, inputs=[base, adapter])
    with ConvertedModel(base) as model:
        found = read_adapter(model, adapter, alpha=alpha)
        additions = _low_rank(found, to)
        rank, said = additions[next(iter(additions))].rank, _one_alpha(additions, to)
        if to == "rwkv-peft":
            _write_rwkv_peft(model, additions, said, output, force=force)
        else:
            _write_peft(model, additions, rank, said, output, force=force)
    return AdapterFile(output, to, rank, said, len(additions))


def _low_rank(found: Adapter, to: str) -> dict[str, LowRank]:
    plain = {name: each for name, each in found.additions.items() if isinstance(each, LowRank)}
    if len(plain) < len(found.additions):
        raise OutputError(f"a {found.kind} is not written as {to}; merge it: rwkv-rev merge BASE ADAPTER")
    if found.replaced:
        raise OutputError(
            f"the adapter holds tensors that were trained whole ({some(list(found.replaced), 1)}), which are not "
            f"written as {to}; merge it: rwkv-rev merge BASE ADAPTER"
        )
    ranks = {each.rank for each in plain.values()}
    if len(ranks) > 1:
        raise OutputError(
            f"the adapter has the ranks {', '.join(map(str, sorted(ranks)))}, and is written as {to} with one alone; "
            "merge it: rwkv-rev merge BASE ADAPTER"
        )
    return plain


def _one_alpha(additions: dict[str, LowRank], to: str) -> float:
    """Alpha for s = alpha / r, of one rank."""
    scales = {each.scale for each in additions.values()}
    if len(scales) > 1:
        raise OutputError(
            f"the maps of the adapter are scaled by {', '.join(f'{scale:g}' for scale in sorted(scales))}, and it is "
            f"written as {to} with one alpha; merge it: rwkv-rev merge BASE ADAPTER"
        )
    first = next(iter(additions.values()))
    return first.alpha if first.alpha / first.rank == first.scale else first.scale * first.rank


def _write_rwkv_peft(
    model: ConvertedModel, additions: dict[str, LowRank], alpha: float, output: Path, *, force: bool
) -> None:
    theirs = {row.name: name for name, row in linear_maps(model).items() if name != "head"}
    if unknown := [name for name in additions if name not in theirs]:
        maps = ",".join(dict.fromkeys(name.split(".")[-2] for name in theirs))
        raise OutputError(
            f"RWKV-PEFT adapts the large maps of blocks alone, and this adapter has {some(unknown, 1)}; train one with "
            f"--lora-targets {maps}, or merge it: rwkv-rev merge BASE ADAPTER"
        )
    tensors = {}
    for name, addition in additions.items():
        tensors[f"{theirs[name]}.lora_A"] = addition.down
        tensors[f"{theirs[name]}.lora_B"] = addition.up
    told = {ALPHA_KEY: repr(float(alpha)), VERSION_KEY: model.config.rwkv_version}
    write_torch(tensors, output, force=force, metadata=told)


def _write_peft(
    model: ConvertedModel,
    additions: dict[str, LowRank],
    rank: int,
    alpha: float,
    output: Path,
    *,
    force: bool,
) -> None:
    tensors = {}
    modules = [name.removesuffix(".weight") for name in additions]
    for module, addition in zip(modules, additions.values(), strict=True):
        tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"] = addition.down
        tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"] = addition.up
    entries = [Entry(name, name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": model.directory.resolve().name,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "r": rank,
        "target_modules": sorted(modules),
        "task_type": "CAUSAL_LM",
    }
    with whole_directory(output, force=force) as folder:
        shard = Shard("adapter_model.safetensors", entries)
        told = {VERSION_KEY: model.config.rwkv_version}
        write_shard(shard, folder, lambda entry: tensors[entry.name], metadata=told)
        (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
