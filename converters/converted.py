"""Read the weights of a converted or fine-tuned model folder tensor by tensor, memory-mapped."""

from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.converters.folder import read_json, refuse_no_model
from rwkv_rev.converters.hub import resolve
from rwkv_rev.converters.names import tensor_table
from rwkv_rev.converters.reading import open_checkpoint
from rwkv_rev.converters.selection import some
from rwkv_rev.converters.source import Source
from rwkv_rev.errors import CheckpointError

RECORD_NAME = "conversion.json"
_HEAD, _EMBEDDINGS = "head.weight", "model.embeddings.weight"


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
        self.config = RwkvRevConfig.from_pretrained(str(directory))
        self.record = read_json(self.directory / RECORD_NAME)
        self._checkpoint = open_checkpoint(resolve(Source("directory", str(directory)), progress=False))
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
        shared = name == _HEAD and self.config.tie_word_embeddings and _HEAD not in self.names()
        return _EMBEDDINGS if shared else name

    def _check(self) -> None:
        expected = {row.name: row.shape for row in tensor_table(self.config, "blinkdl")}
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
