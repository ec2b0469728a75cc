"""A model folder written anew with some tensors changed: all else, tokenizer and settings, as it is.

Weights that do not change keep their dtype and bits. ``conversion.json`` gains an entry in its ``finetuned`` list, by
which ``verify`` and ``export`` know that the values are no longer the original's.
"""

import functools
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.converters.card import model_card
from rwkv_rev.converters.converted import RECORD_NAME, ConvertedModel
from rwkv_rev.converters.rewriter import Entry, shard_layout, write_shards
from rwkv_rev.folders.folder import tokenizer_files
from rwkv_rev.folders.redaction import public
from rwkv_rev.folders.safe_output import check_output, require_space, whole_directory
from rwkv_rev.loading import load_config

SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Edit:
    """What differs in the new folder.

    Attributes:
        changed: shape and dtype of each tensor that is replaced or new, by our names.
        read: gives one of them by its name; called once for each, as late as it can be.
        entry: of conversion.json's ``finetuned``.
        card: rows of the model card.
        config: fields of the configuration that change.
    """

    changed: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    read: Callable[[str], Tensor]
    entry: dict[str, Any]
    card: tuple[tuple[str, object], ...]
    config: Mapping[str, Any] = field(default_factory=dict)


def write_edited(
    model: ConvertedModel, output: Path, edit: Edit, *, force: bool, inputs: Iterable[str | Path | None] = ()
) -> Path:
    """Write ``output``, a model folder like that of ``model`` but for the edit made of ``inputs``; returns its path.

    Raises:
        OutputError: if ``output`` exists without ``force``, is or holds the model or an input, or cannot be written.
        CheckpointError: for values that are not finite.
    """
    check_output(output.absolute(), force=force, directory=True, reads=model.directory, inputs=inputs)
    names = [*model.names(), *(name for name in edit.changed if name not in model.names())]
    kept = {
        name: (model.shape(name), model.dtype(name)) for name in model.names() if name not in edit.changed
    }
    entries = [Entry(name, name, *(edit.changed.get(name) or kept[name])) for name in names]
    require_space(output.parent, sum(entry.nbytes for entry in entries))

    def read(entry: Entry) -> Tensor:
        return edit.read(entry.name) if entry.name in edit.changed else model.tensor(entry.name)

    config = load_config(model.directory)
    replaced = [
        entry.dtype for entry in entries if entry.name in edit.changed and entry.name in model.names()
    ]
    if isinstance(config.dtype, torch.dtype):
        config.dtype = functools.reduce(torch.promote_types, replaced, config.dtype)
    for name, value in edit.config.items():
        setattr(config, name, value)
    told = {"source": model.directory.resolve().name} | public(model.record)
    told["finetuned"] = [*told.get("finetuned", []), public(edit.entry)]
    with whole_directory(output, force=force) as folder:
        write_shards(shard_layout(entries, SHARD_SIZE), folder, read)
        for file in tokenizer_files(model.directory):
            shutil.copyfile(file, folder / file.name)
        if (settings := model.directory / "generation_config.json").is_file():
            shutil.copyfile(settings, folder / settings.name)
        config.save_pretrained(str(folder))
        (folder / RECORD_NAME).write_text(json.dumps(told, indent=2) + "\n", "utf-8")
        card = model_card(config, told, training=list(edit.card))
        (folder / "README.md").write_text(card, "utf-8")
    return output
