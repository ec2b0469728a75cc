"""Which linear maps low-rank additions can go to, by the names and shapes of stored tensors. Imports nothing heavy."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rwkv_rev.errors import RwkvRevError, StrategyError
from rwkv_rev.folders.safe_input import MOST_JSON_BYTES, read_object

Shapes = Mapping[str, Sequence[int]]


def refuse_lora_targets(targets: Sequence[str], tied: bool, shapes: Shapes) -> None:
    """Refuse a target that is no linear map, or a head that is the embedding (``tied``).

    Raises:
        StrategyError: naming the target, and which there are.
    """
    stored = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    maps = [name for name in stored if name not in shapes and name != "model.embeddings"]
    for target in targets:
        if tied and has_addition("head", [target]):
            raise StrategyError(
                "lora_targets: the head of this model is its embedding (tie_word_embeddings), which an addition to "
                "the head would change too; leave the head out, or use tune = full"
            )
        if not any(has_addition(name, [target]) for name in maps):
            there = sorted({name.rsplit(".", 1)[-1] for name in maps} - {"head"})
            raise StrategyError(
                f"lora_targets: no linear map is called {target!r}; there are {', '.join(there)}"
            )


def has_addition(module: str, targets: Sequence[str]) -> bool:
    """Whether a module is among the targets, by its last names."""
    return any(module == target or module.endswith(f".{target}") for target in targets)


def refuse_early(directory: str | Path, targets: Sequence[str]) -> None:
    """:func:`refuse_lora_targets` before PyTorch is there; what cannot be read is told of where it is loaded."""
    if not targets:
        return
    try:
        tied = read_object(Path(directory) / "config.json").get("tie_word_embeddings") is True
        shapes = stored_shapes(Path(directory))
    except (RwkvRevError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    if shapes:
        refuse_lora_targets(targets, tied, shapes)


def stored_shapes(directory: Path) -> dict[str, list[int]]:
    """Names and shapes of a folder's tensors, from the headers of its safetensors files.

    A file begins with the length of its header, eight bytes, and the header, JSON.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: for files that are none such.
    """
    index = read_object(directory / "model.safetensors.index.json")
    names = sorted(set(index["weight_map"].values())) if index else ["model.safetensors"]
    shapes: dict[str, list[int]] = {}
    for name in names:
        with (directory / name).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MOST_JSON_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        shapes |= {key: list(entry["shape"]) for key, entry in header.items() if key != "__metadata__"}
    return shapes
