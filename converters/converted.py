"""Read the weights of a converted or fine-tuned model folder tensor by tensor, memory-mapped."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from rwkv_rev.converters.names import EMBEDDINGS, HEAD, tensor_table
from rwkv_rev.converters.reading import open_checkpoint
from rwkv_rev.errors import CheckpointError
from rwkv_rev.folders.folder import RECORD_NAME, refuse_no_model
from rwkv_rev.folders.hub import resolve
from rwkv_rev.folders.safe_input import read_object
from rwkv_rev.folders.selection import some
from rwkv_rev.folders.source import Source
from rwkv_rev.loading import load_config
from rwkv_rev.printable import shortened

_TEXT = (str, type(None))
_RECORD: dict[str, type | tuple[type, ...]] = {
    "source": _TEXT,
    "file": _TEXT,
    "revision": _TEXT,
    "commit": _TEXT,
    "layout": _TEXT,
    "sha256": dict,
    "unusual_shapes": dict,
    "group_norm_eps": (float, int, type(None)),
    "dtypes": dict,
    "versions": dict,
    "finetuned": list,
    "initialised": dict,
}
"""Types of what ``conversion.json`` holds and is read back."""


class ConvertedModel:
    """The config and the weights of a converted folder, under our own tensor names; a context manager.

    Where the head is the embedding (``tie_word_embeddings``) it need not be stored: ``head.weight`` then names the
    embedding's tensor, and is not among :meth:`names`.

    Attributes:
        directory: the folder.
        config: its configuration, which the tensors are known to fit.
        record: contents of ``conversion.json``; empty if there is none.

    Raises:
        SourceError: if the folder or a file of it is missing.
        CheckpointError: if it is not a converted model, or its tensors do not fit its config.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        refuse_no_model(directory)
        self.config = load_config(self.directory)
        self.record = read_record(self.directory)
        local = resolve(Source("directory", str(directory)), progress=False)
        self._checkpoint = open_checkpoint(local, unwrap=False)
        try:
            self._check()
        except BaseException:
            self._checkpoint.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._checkpoint.close()

    def names(self) -> tuple[str, ...]:
        """Names of all stored tensors, in file order."""
        return self._checkpoint.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._checkpoint.shape(self._stored(name))

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor, without reading it."""
        return self._checkpoint.dtype(self._stored(name))

    def nbytes(self, name: str) -> int:
        """Bytes of the values of a tensor."""
        return self._checkpoint.nbytes(self._stored(name))

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, memory-mapped: its pages are read when its values are. Do not write to it."""
        return self._checkpoint.tensor(self._stored(name))

    def _stored(self, name: str) -> str:
        """The name that a tensor is stored under."""
        shared = name == HEAD and self.config.tie_word_embeddings and HEAD not in self.names()
        return EMBEDDINGS if shared else name

    def _check(self) -> None:
        if getattr(self.config, "quantization_config", None):
            raise CheckpointError(
                f"{self.directory} holds weights in few bits (quantization_config in its config.json), which "
                "from_pretrained alone reads: give the folder of the float model they were made of, with --quantise "
                "where its weights shall be in few bits, and merge adapters into that one"
            )
        if (layers := self.config.num_hidden_layers) > len(self.names()):
            raise CheckpointError(
                f"{self.directory} holds {len(self.names())} tensors, too few for the {layers} layers "
                "of its config.json"
            )
        expected = {row.name: row.shape for row in tensor_table(self.config)}
        stored = set(self.names())
        if missing := [name for name in expected if self._stored(name) not in stored]:
            raise CheckpointError(f"{self.directory} lacks {some(missing)}, which its config.json asks for")
        if leftover := [name for name in self.names() if name not in expected]:
            raise CheckpointError(f"{self.directory} holds {some(leftover)}, which is no part of the model")
        for name, shape in expected.items():
            if self.shape(name) != shape:
                raise CheckpointError(
                    f"{name} in {self.directory} has shape {self.shape(name)}, its config.json says {shape}"
                )


def read_record(directory: Path) -> dict[str, Any]:
    """Contents of ``conversion.json``; empty if there is none.

    Raises:
        SourceError, CheckpointError: if it cannot be read, or holds what no conversion writes.
    """
    path = directory / RECORD_NAME
    record = read_object(path)
    for name, kinds in _RECORD.items():
        if name in record and not isinstance(record[name], kinds):
            raise CheckpointError(f"{path} is damaged: {name} = {shortened(repr(record[name]))}")
    for name, shape in record.get("unusual_shapes", {}).items():
        sizes = isinstance(shape, list) and all(type(size) is int and 0 < size < 1 << 31 for size in shape)
        if not sizes:
            shown = f"{shortened(name)}: {shortened(repr(shape))}"
            raise CheckpointError(f"{path} is damaged: unusual_shapes = {{{shown}}}")
    return record
