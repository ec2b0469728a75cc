"""Write a converted model back in the layouts of other tools, bit for bit.

``blinkdl`` is one ``.pth`` as the original trainer saves it, which the ``rwkv`` package loads. ``hf`` is a folder as
transformers' RWKV-4 class reads it, as the published RWKV-5 and RWKV-6 repositories are laid out, or as
flash-linear-attention's RWKV-7 reads it; ``fla`` is the last for RWKV-6, too. Every tensor keeps its dtype and its
values; names, and the shapes and pieces that a layout has, change. Tensors stay memory-mapped while they are written.

Limits: a ``.pth`` has no field for the GroupNorm eps, and the ``rwkv`` package always uses 64e-5
(``Export.note`` says so where it matters). RWKV-5 needs the remote code of a published repository to run
from the ``hf`` layout; config.json refers to it, it is not copied. Its tokenizer needs transformers alone
(:mod:`rwkv_rev.tokenization.fast`).
"""

import json
import math
import shutil
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch

from rwkv_rev.arguments import checked
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.converters.converted import ConvertedModel
from rwkv_rev.converters.names import HEAD, TensorNames, by_foreign, foreign_tensor, tensor_table
from rwkv_rev.converters.reading import is_finite
from rwkv_rev.converters.rewriter import Entry, parse_size, shard_layout, write_shards
from rwkv_rev.converters.torch_files import write_torch
from rwkv_rev.errors import ConfigError, OutputError
from rwkv_rev.folders.folder import refuse_links, tokenizer_files
from rwkv_rev.folders.safe_input import read_object
from rwkv_rev.folders.safe_output import check_output, require_space, whole_directory
from rwkv_rev.loading import load_tokenizer, missing_tokenizer
from rwkv_rev.printable import shortened
from rwkv_rev.tokenization.fast import fast_tokenizer

TARGETS = ("blinkdl", "hf", "fla")
SHARD_SIZE = "5GB"
_OUR_TOKENIZERS = ("RwkvByteTokenizer", "RwkvWorldTokenizer")


@dataclass(frozen=True)
class Export:
    """What an export wrote.

    Attributes:
        not_finite: names of tensors in a ``.pth`` that hold NaN or infinity, written as they are; folders refuse them.
    """

    path: Path
    layout: str
    tensors: int
    nbytes: int
    note: str | None = None
    not_finite: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "path": str(self.path),
            "layout": self.layout,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "note": self.note,
            "not_finite": list(self.not_finite),
        }


@checked
def export(
    directory: str | Path,
    output: str | Path,
    *,
    to: Literal["blinkdl", "hf", "fla"] = "blinkdl",
    force: bool = False,
    max_shard_size: str | int | None = None,
) -> Export:
    """Write a converted model back in a foreign layout.

    Args:
        directory: a converted or fine-tuned model folder.
        output: the ``.pth`` file (``blinkdl``) or the folder (``hf``, ``fla``) to make.
        to: ``blinkdl``, ``hf`` or ``fla``.
        force: replace an existing output, at the very end.
        max_shard_size: largest file of a folder, ``"5GB"`` when None; ``blinkdl`` has one file.

    Raises:
        SourceError, CheckpointError: if ``directory`` is not a whole converted model.
        OutputError: if ``output`` exists without ``force``, holds the model itself, or cannot be written.
    """
    if to not in TARGETS:
        raise OutputError(f"cannot export to {to!r}; choose one of {', '.join(TARGETS)}")
    if max_shard_size is not None:
        parse_size(max_shard_size)
        if to == "blinkdl":
            raise ConfigError(
                f"max_shard_size = {shortened(max_shard_size)} is without effect on a .pth, which is one file; leave "
                "it out, or export --to hf"
            )
    output = Path(output)
    check_output(output.absolute(), force=force, directory=to != "blinkdl", reads=Path(directory))
    if to != "blinkdl":
        refuse_links(directory)
    with ConvertedModel(directory) as model:
        if to != "blinkdl" and model.config.has_initial_state:
            raise OutputError(
                f"the {to} layout has no place for a tuned initial state; export with --to blinkdl instead"
            )
        architecture = model.config.architecture
        if not architecture.layouts:
            raise OutputError(
                f"no other tool reads models of {architecture.called}: {directory} is its only form, which "
                "transformers loads after import rwkv_rev"
            )
        layout = {"blinkdl": architecture.own_layout, "hf": architecture.hub_layout}.get(to, to)
        kept = next(
            (x for x in architecture.layouts if x.name == model.record.get("layout") and x.family), None
        )
        if kept is not None and kept.family == layout:  # the version of it that the original is in
            layout = kept.name
        if layout not in (known.name for known in architecture.layouts):
            raise OutputError(f"{architecture.called} has no layout {to!r}; use --to hf or --to blinkdl")
        table = _as_stored(tensor_table(model.config, layout), layout, model.record)
        # a folder whose config.json said that the head is the embedding comes back as it was
        same = to != "blinkdl" and model.record.get("layout") == layout
        tied = same and model.config.tie_word_embeddings
        if tied:
            table = tuple(row for row in table if row.name != HEAD)
        nbytes = sum(model.nbytes(row.name) for row in table)
        require_space(output.parent, nbytes)
        rows = by_foreign(table)
        wrong: list[str] = []
        if to == "blinkdl":
            state = {name: foreign_tensor(parts, model.tensor).contiguous() for name, parts in rows.items()}
            wrong = [name for name, tensor in state.items() if not is_finite(tensor)]
            write_torch(state, output, force=force)
        else:

            def read(entry: Entry) -> torch.Tensor:
                return foreign_tensor(rows[entry.name], model.tensor)

            entries = [
                Entry(name, parts[0].name, parts[0].foreign_shape, _dtype(model, parts))
                for name, parts in rows.items()
            ]
            with whole_directory(output, force=force) as folder:
                write_shards(shard_layout(entries, max_shard_size or SHARD_SIZE), folder, read)
                _write_companions(model, folder, layout, tied=tied)
        note = architecture.lost(model.config, layout)
        if note is None and to != "blinkdl" and (note := missing_tokenizer(directory)) is not None:
            note = f"{note}, and export again: the folder has none either"
        return Export(output, layout, len(rows), nbytes, note, tuple(wrong))


def _as_stored(
    table: tuple[TensorNames, ...], layout: str, record: dict[str, Any]
) -> tuple[TensorNames, ...]:
    """The table with the shapes that the original really had, where they are not the layout's usual ones."""
    shapes = record.get("unusual_shapes", {}) if record.get("layout") == layout else {}
    return tuple(
        replace(row, foreign_shape=tuple(shapes[row.foreign]))
        if math.prod(shapes.get(row.foreign, (0,))) == math.prod(row.foreign_shape)
        else row
        for row in table
    )


def _dtype(model: ConvertedModel, rows: list[TensorNames]) -> torch.dtype:
    return reduce(torch.promote_types, [model.dtype(row.name) for row in rows])


def _write_companions(model: ConvertedModel, folder: Path, layout: str, *, tied: bool) -> None:
    fields = hugging_face_config(model.config, layout) | {"tie_word_embeddings": tied}
    text = json.dumps(fields, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    files = tokenizer_files(model.directory)
    if (generation := model.directory / "generation_config.json").is_file():
        files.append(generation)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    if read_object(model.directory / "tokenizer_config.json").get("tokenizer_class") in _OUR_TOKENIZERS:
        for file in tokenizer_files(folder):
            file.unlink()
        fast_tokenizer(load_tokenizer(model.directory)).save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    if (settings := read_object(path)).get("tokenizer_class") == "TokenizersBackend":
        # its name before transformers 5, which transformers 5 knows too
        text = json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2)
        path.write_text(text + "\n", encoding="utf-8")


def hugging_face_config(config: RwkvRevConfig, layout: str) -> dict[str, Any]:
    """``config.json`` of a folder in that layout, with what the generation says besides."""
    fields: dict[str, Any] = {
        "architectures": ["RwkvForCausalLM"],
        "attention_hidden_size": config.hidden_size,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "num_hidden_layers": config.num_hidden_layers,
        "rescale_every": 6,
        "tie_word_embeddings": False,
        "torch_dtype": str(config.dtype).removeprefix("torch."),
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    return fields | config.architecture.hub_config(config, layout)
