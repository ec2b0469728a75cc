"""The original model as the oracles see it: tensors under its trainer's names, whatever file they came from."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.architectures.scan import Scan
from rwkv_rev.arguments import expanded
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.converters.detection import detect
from rwkv_rev.converters.names import (
    EMBEDDINGS,
    HEAD,
    TensorNames,
    by_foreign,
    foreign_tensor,
    tensor_table,
)
from rwkv_rev.converters.reading import open_checkpoint
from rwkv_rev.equivalence.expected import expected_path
from rwkv_rev.equivalence.naive_model import LAYER_NORM_EPSILON, PUBLISHED_GROUP_NORM_EPSILON
from rwkv_rev.errors import SourceError
from rwkv_rev.folders.folder import is_converted
from rwkv_rev.folders.hub import resolve
from rwkv_rev.folders.source import Source, parse_source
from rwkv_rev.folders.whereabouts import recall

OWN_VALUES = "check its own values, with --original"


@dataclass(frozen=True)
class Original:
    """What a converted model is held against.

    Attributes:
        tensors: state dict under the names that its architecture's scan goes through; may load each when it is asked
            for.
        label: the SOURCE in its own grammar, for people.
        config: what the tensors say the model is.
        group_norm_epsilon: eps of the GroupNorm the original was trained with: the published value, unless
            the source or the one who converted it said otherwise. Never taken from the converted model's
            config alone.
        layer_norm_epsilon: eps of every LayerNorm, 1e-5 unless the source says otherwise.
        transformers_tensors: the same values under the names of ``transformers.RwkvForCausalLM``; None for
            RWKV-5.
        own_tensors: the same values under the names and shapes of a converted model.
        expected: a ``*.expected.json`` beside the checkpoint, if there is one.
        tensors_are_own: whether they are the converted model's (itself.py).
    """

    tensors: Mapping[str, Tensor]
    label: str
    config: RwkvRevConfig
    group_norm_epsilon: float = PUBLISHED_GROUP_NORM_EPSILON
    layer_norm_epsilon: float = LAYER_NORM_EPSILON
    transformers_tensors: Mapping[str, Tensor] | None = field(default=None, repr=False)
    own_tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    expected: Path | None = None
    tensors_are_own: bool = False

    @property
    def scan(self) -> Scan | None:
        """How a plain loop goes through ``tensors``; None where the architecture does not say it."""
        own = self.config.architecture.scan
        return None if own is None else own(self.config)

    @property
    def num_layers(self) -> int:
        """L, counted in the tensors."""
        assert self.scan is not None
        return self.scan.layers(self.tensors)

    @property
    def has_group_norm(self) -> bool:
        """Whether there is a GroupNorm behind the recurrence, whose eps no tensor tells."""
        return self.config.architecture.has_group_norm

    @property
    def is_known(self) -> bool:
        """Whether other implementations of this architecture exist."""
        return self.config.architecture.rwkv_package is not None or self.transformers_tensors is not None


def known_to_transformers(config: RwkvRevConfig) -> bool:
    """Whether transformers itself has a class for such models."""
    known = config.architecture
    return bool(known.layouts) and known.hub_layout == "transformers"


class ReadTensors(Mapping[str, Tensor]):
    """Tensors by name, each made by ``read`` when it is asked for."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._read = read

    @classmethod
    def in_layout(cls, table: Iterable[TensorNames], read: Callable[[str], Tensor]) -> "ReadTensors":
        """The tensors of a table under their foreign names; ``read`` gives one by our name."""
        rows = by_foreign(table)
        return cls(rows, lambda name: foreign_tensor(rows[name], read))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class RoundedTensors(Mapping[str, Tensor]):
    """Tensors rounded to a narrower dtype when they are asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._tensors = tensors
        self._dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].to(self._dtype)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def source_of(
    directory: Path,
    record: dict[str, Any],
    original: str | Source | None,
    file: str | None,
    revision: str | None,
) -> Source:
    """Where the original of a converted folder is: as named, else as its record and this machine remember.

    Raises:
        SourceError: if it is not known, or not there any more.
    """
    if isinstance(original, Source):
        return original
    if original is not None:
        source = parse_source(original, file=file, revision=revision)
        if (folder := Path(expanded(original))).is_dir() and is_converted(folder):
            raise SourceError(
                f"{original} is a converted model itself, and no original: name with --original what it was converted "
                f"from, or leave that out, and what {directory} remembers is taken"
            )
        return source
    if file is not None or revision is not None:
        raise SourceError("--file and --revision choose from an --original SOURCE; name it too")
    if not record.get("source"):
        raise SourceError(
            f"{directory} does not say what it was converted from; name that with --original SOURCE, or "
            f"{OWN_VALUES} {directory}"
        )
    elsewhere = record["source"].startswith("bundled:") or record.get("commit")  # found wherever this runs
    if not elsewhere and (here := recall(record)) is not None:
        return parse_source(str(here), file=record.get("file") if here.is_dir() else None)
    try:
        return parse_source(
            record["source"],
            file=record.get("file"),
            revision=record.get("commit") or record.get("revision"),
        )
    except SourceError as error:
        raise SourceError(
            f"the original that {directory} remembers is gone ({error}); name it with --original SOURCE"
        ) from None


@contextmanager
def open_original(
    source: Source, *, group_norm_epsilon: float | None = None, progress: bool = False
) -> Iterator[Original]:
    """Resolve (download), open and detect a SOURCE; its tensors can be read until the context ends.

    Args:
        source: any kind of source.
        group_norm_epsilon: what the conversion was told; None for what the source says, else the published
            value.
        progress: download bars on stderr.

    Raises:
        SourceError, CheckpointError: as ``convert`` would.
    """
    local = resolve(source, progress=progress)
    with open_checkpoint(local) as checkpoint:
        architecture = detect(checkpoint)
        config = architecture.to_config()
        here = {row.name: row for row in tensor_table(config, architecture.layout)}
        if architecture.tied:
            here[HEAD] = replace(here[EMBEDDINGS], name=HEAD)

        def own(name: str) -> Tensor:
            return here[name].of(checkpoint.tensor(here[name].foreign))

        def renamed(layout: str) -> ReadTensors:
            return ReadTensors.in_layout(
                [row for row in tensor_table(config, layout) if row.name in here], own
            )

        yield Original(
            tensors=renamed(config.architecture.own_layout),
            label=str(source),
            config=config,
            group_norm_epsilon=group_norm_epsilon or config.group_norm_epsilon,
            layer_norm_epsilon=config.layer_norm_epsilon,
            transformers_tensors=renamed("transformers") if known_to_transformers(config) else None,
            own_tensors=ReadTensors(here, own),
            expected=expected_path(local.files[0]),
        )
