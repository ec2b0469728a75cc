"""What a checkpoint is, read from its headers and its decays alone.

Bits forgotten per step and state element are ``log2(1/w)``, ``w = exp(-exp(time_decay))``: the price of
reversing one step exactly (:mod:`rwkv_rev.numerics`).
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from dataclasses import fields as fields_of
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rwkv_rev.arguments import checked
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.converters.converted import ConvertedModel
from rwkv_rev.converters.detection import detect
from rwkv_rev.converters.names import tensor_table
from rwkv_rev.converters.reading import Checkpoint, open_checkpoint
from rwkv_rev.converters.wrappers import note_on_wrappers
from rwkv_rev.errors import CheckpointError, SourceError
from rwkv_rev.folders.folder import is_converted
from rwkv_rev.folders.hub import resolve
from rwkv_rev.folders.safe_input import read_object
from rwkv_rev.folders.source import parse_source
from rwkv_rev.loading import missing_tokenizer
from rwkv_rev.numerics import bits_forgotten_per_step
from rwkv_rev.printable import counted

QUANTILES = {"min": 0.0, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "99 %": 0.99, "max": 1.0}


@dataclass(frozen=True)
class Inspection:
    """Facts about a checkpoint; ``bits_forgotten[layer][i]``, bits per step, is ``quantile_names[i]``.

    ``notes`` say what people should know of how it was read. ``config`` and ``log_decays`` (per layer log w, float32,
    as stored; none where a memory's decay is no constant) are for further calculations (:mod:`rwkv_rev.forecast`,
    :mod:`rwkv_rev.numerics`) and no part of :meth:`to_dict`.
    """

    source: str
    layout: str
    version: str
    layers: int
    width: int
    heads: int
    head_size: int
    channel_mix_width: int
    vocabulary: int
    parameters: int
    nbytes: int
    dtypes: dict[str, int]
    tokenizer: str
    quantile_names: tuple[str, ...]
    bits_forgotten: tuple[tuple[float, ...], ...]
    config: RwkvRevConfig = field(repr=False, compare=False)
    log_decays: tuple[torch.Tensor, ...] = field(repr=False, compare=False)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {
            f.name: getattr(self, f.name) for f in fields_of(self) if f.name not in ("config", "log_decays")
        }
        values["dtypes"], values["notes"] = dict(self.dtypes), list(self.notes)
        if own := self.config.architecture.fields:
            values["fields"] = {name: getattr(self.config, name) for name in own}
        names = values.pop("quantile_names")
        rows = values.pop("bits_forgotten")
        return values | {"bits_forgotten_per_step": [dict(zip(names, row, strict=True)) for row in rows]}

    def fields(self) -> dict[str, object]:
        """Names and values for people."""
        architecture = self.config.architecture
        own = {name.replace("_", " "): getattr(self.config, name) for name in architecture.fields}
        heads = {"heads": f"{self.heads} of size {self.head_size}"} if architecture.has_heads else {}
        return {
            "version": architecture.called,
            "layout": self.layout,
            "layers": self.layers,
            "width": self.width,
            **heads,
            **own,
            "channel mix width": self.channel_mix_width,
            "vocabulary": self.vocabulary,
            "tokenizer": self.tokenizer,
            "parameters": f"{self.parameters:,}",
            "size": f"{self.nbytes:,} bytes",
            "dtypes": ", ".join(
                f"{dtype} ({counted(count, 'tensor')})" for dtype, count in self.dtypes.items()
            ),
        }


@checked
def inspect_source(
    source: str | Path, *, file: str | None = None, revision: str | None = None, progress: bool = False
) -> Inspection:
    """Read what a ``SOURCE`` or a converted folder is; only headers and decays are read.

    Args:
        source: a Hub id, a ``.pth`` file, a folder or ``bundled:NAME``.
        file: which ``.pth`` of a repository that holds several, by name or glob.
        revision: branch, tag or commit of a Hub repository.
        progress: tell on stderr how far it is, by bytes.

    Raises:
        SourceError: if the source cannot be found or told apart.
        CheckpointError: if it is damaged or not RWKV-4/5.
    """
    if is_converted(source):
        if file is not None or revision is not None:
            raise SourceError(
                f"--file and --revision choose from several checkpoints; {source} is a model folder"
            )
        with ConvertedModel(source) as model:
            names = {name: name for name in model.names()}
            found = _inspection(str(source), "converted", model.config, model, names)
            return replace(found, tokenizer=_tokenizer_in(Path(source), found.tokenizer))
    parsed = parse_source(str(source), file=file, revision=revision)
    with open_checkpoint(resolve(parsed, progress=progress)) as checkpoint:
        architecture = detect(checkpoint)
        config = architecture.to_config()
        names = {row.name: row.foreign for row in tensor_table(config, architecture.layout)}
        found = _inspection(str(parsed), architecture.layout, config, checkpoint, names)
        return replace(found, notes=notes_on(checkpoint))


def notes_on(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What people are told of how a checkpoint was read."""
    return (note_on_wrappers(checkpoint.wrappers),) if checkpoint.wrappers else ()


def _inspection(
    source: str,
    layout: str,
    config: RwkvRevConfig,
    checkpoint: Checkpoint | ConvertedModel,
    stored: dict[str, str],
) -> Inspection:
    def read(layer: int, name: str) -> torch.Tensor:
        return checkpoint.tensor(stored[f"model.blocks.{layer}.{name}"])

    log_decay = config.architecture.log_decay
    log_decays: tuple[torch.Tensor, ...] = ()
    if log_decay is not None:
        log_decays = tuple(log_decay(partial(read, layer)) for layer in range(config.num_hidden_layers))
    return Inspection(
        source=source,
        layout=layout,
        version=config.rwkv_version,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        head_size=config.head_size,
        channel_mix_width=config.intermediate_size,
        vocabulary=config.vocab_size,
        parameters=sum(torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names()),
        nbytes=sum(checkpoint.nbytes(name) for name in checkpoint.names()),
        dtypes=dict(Counter(str(checkpoint.dtype(n)).removeprefix("torch.") for n in checkpoint.names())),
        tokenizer=_tokenizer(config.vocab_size),
        quantile_names=tuple(QUANTILES),
        bits_forgotten=tuple(_quantiles(log_decay) for log_decay in log_decays),
        config=config,
        log_decays=log_decays,
    )


def _quantiles(log_decay: torch.Tensor) -> tuple[float, ...]:
    bits = bits_forgotten_per_step(log_decay).flatten()
    return tuple(torch.quantile(bits, torch.tensor(list(QUANTILES.values()), dtype=bits.dtype)).tolist())


def _tokenizer_in(folder: Path, by_vocabulary: str) -> str:
    """The name of a model folder's own tokenizer."""
    if missing_tokenizer(folder) is not None:
        return "none in this folder"
    kind = read_object(folder / "tokenizer_config.json").get("tokenizer_class")
    ours = {"RwkvByteTokenizer": "byte", "RwkvWorldTokenizer": "world"}
    return ours.get(str(kind), by_vocabulary)


def _tokenizer(vocab_size: int) -> str:
    from rwkv_rev.tokenization.choice import name_for_vocabulary

    try:
        return name_for_vocabulary(vocab_size)
    except CheckpointError:
        return "unknown (name one with --tokenizer when converting)"
