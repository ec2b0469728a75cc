"""A language model as gradient strategies see it."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn

from rwkv_rev.cells.block import Block
from rwkv_rev.cells.borders import Borders, Mask
from rwkv_rev.state import ModelState


class LanguageModel(Protocol):
    """What strategies need of a model."""

    training: bool

    @property
    def blocks(self) -> list[Block]: ...
    @property
    def head(self) -> nn.Module: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def checkpoints_blocks(self) -> bool: ...
    def get_input_embeddings(self) -> nn.Module: ...
    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor: ...
    def read(
        self,
        input_ids: Tensor | None,
        valid: Tensor | None,
        inputs_embeds: Tensor | None,
        state: ModelState,
        borders: Borders | None = None,
    ) -> tuple[Tensor, ModelState]: ...
    def normalize(self, hidden: Tensor) -> Tensor: ...
    def run(self, x: Tensor, state: ModelState, mask: Mask) -> tuple[Tensor, ModelState]: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
