"""Merge an adapter into the model that it was trained on: ``rwkv-rev merge``.

The formulas are those of :mod:`rwkv_rev.converters.additions`, in float64, one weight at a time: beside the
memory-mapped model the adapter and one weight are held. Weights that do not change keep their dtype and bits.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rwkv_rev.arguments import checked
from rwkv_rev.converters.adapter_files import read_adapter
from rwkv_rev.converters.additions import Adapter
from rwkv_rev.converters.converted import ConvertedModel
from rwkv_rev.converters.edited import Edit, write_edited
from rwkv_rev.errors import ConfigError


@dataclass(frozen=True)
class Merged:
    """A model that an adapter was merged into.

    Attributes:
        path: of its folder. kind: ``LoRA``, ``PiSSA`` or ``DiSHA``.
        weights: how many linear maps changed. replaced: tensors that the adapter's file holds whole.
        ranks, alphas, targets: as the file says.
    """

    path: Path
    kind: str
    weights: int
    replaced: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    targets: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return vars(self) | {"path": str(self.path)}


@checked
def merge(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    alpha: float | None = None,
    init: str | Path | None = None,
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    force: bool = False,
) -> Merged:
    """Write a model folder with an adapter merged into its weights.

    Args:
        base: the converted model that the adapter was trained on.
        adapter: RWKV-PEFT's ``.pth`` (LoRA, PiSSA, DiSHA), or a folder of peft's (LoRA).
        output: the folder to make.
        alpha: of a LoRA whose file does not say it, as RWKV-PEFT's do not.
        init: ``init_pissa.pth`` of the run, which makes the adapter a PiSSA.
        save_dtype: stored dtype of the weights that change; ``auto`` is float32, float64 where the model has that.
        force: replace an existing model folder, at the very end.

    Raises:
        SourceError, CheckpointError: for what is no model, and for an adapter that is not understood, not whole, or of
            another model, or whose alpha is missing.
        ConfigError: for both an alpha and an init. OutputError: if ``output`` cannot be written.
    """
    if save_dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ConfigError(f"save_dtype = {save_dtype!r} must be auto, float32, bfloat16 or float16")
    with ConvertedModel(base) as model:
        found = read_adapter(model, adapter, alpha=alpha, init=init)

        def dtype(name: str) -> torch.dtype:
            if save_dtype != "auto":
                known: torch.dtype = getattr(torch, save_dtype)
                return known
            return torch.promote_types(model.dtype(name), torch.float32)

        def read(name: str) -> Tensor:
            if (addition := found.additions.get(name)) is None:
                return found.replaced[name]
            weight = found.replaced.get(name)
            return addition.merged((model.tensor(name) if weight is None else weight).double())

        names = [*found.additions, *(name for name in found.replaced if name not in found.additions)]
        edit = Edit(
            changed={name: (model.shape(name), dtype(name)) for name in names},
            read=read,
            entry={"settings": {"merged": Path(adapter).name, **_facts(found)}},
            card=(("merged adapter", Path(adapter).name), *_facts(found).items()),
        )
        path = write_edited(model, Path(output), edit, force=force, inputs=[adapter, init])
    return Merged(
        path, found.kind, len(found.additions), len(found.replaced), found.ranks, found.alphas, found.targets
    )


def _facts(found: Adapter) -> dict[str, str]:
    facts = {"kind": found.kind, "rank": ", ".join(map(str, found.ranks))}
    if found.kind == "LoRA":
        facts["alpha"] = ", ".join(f"{alpha:g}" for alpha in found.alphas)
    return facts | {"targets": ", ".join(found.targets)}
