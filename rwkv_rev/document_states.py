"""The final state of every document, as a call of the model is asked for it (``return_document_states=True``).

Without labels these states are in the graph of the whole context. A loss of the model's own finishes its gradients
chunk by chunk, and they come beside it without any: what would be lost silently is refused.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.bptt.strategy import LossInputs
from rwkv_rev.cells.borders import Borders
from rwkv_rev.document_ends import DocumentEnds
from rwkv_rev.errors import StrategyError
from rwkv_rev.exporting import exporting
from rwkv_rev.packed_rows import refuse_empty_documents
from rwkv_rev.state import ModelState

Asked = bool | DocumentEnds
"""By a user, or by a loss of ours that knows where its documents end."""


def ends_asked_for(
    asked: Asked,
    model: Any,
    packed: dict[str, Any],
    at: Tensor | None,
    valid: Tensor | None,
    shape: tuple[int, ...],
) -> DocumentEnds | None:
    """Where the documents of a batch [B, T] end; None where nobody asks. ``packed`` are the call's further keywords.

    Raises:
        StrategyError: where they cannot be given with their gradient.
        ValueError: for documents of no tokens.
    """
    if not asked:
        return None
    if exporting():
        raise StrategyError("return_document_states has no place in an exported graph: leave it out")
    if isinstance(asked, DocumentEnds):
        return asked
    if torch.is_grad_enabled() and model.checkpoints_blocks:
        raise StrategyError(
            "return_document_states has no gradient through checkpointed blocks: call "
            "gradient_checkpointing_disable(), or ask under torch.no_grad()"
        )
    refuse_empty_documents(packed)
    return _ends(at, valid, shape)


def with_ends(inputs: LossInputs, packed: dict[str, Any], group: Any = None) -> LossInputs:
    """A batch of a loss, whose documents' states are asked for. ``packed`` are the call's further keywords.

    Raises:
        StrategyError: where several ranks, a ``group``, share it.
        ValueError: for documents of no tokens.
    """
    if group is not None:
        raise StrategyError(
            "return_document_states needs whole documents, and the context is split over ranks: leave it out"
        )
    refuse_empty_documents(packed)
    shape = tuple(inputs.targets.shape)
    borders = inputs.borders
    if borders is None:
        valid = None if inputs.valid is None else inputs.valid.cpu()
        borders = Borders(torch.zeros(shape, dtype=torch.bool, device="cpu"), valid, None)
    return replace(inputs, borders=replace(borders, ends=_ends(borders.at, inputs.valid, shape)))


def _ends(at: Tensor | None, valid: Tensor | None, shape: tuple[int, ...]) -> DocumentEnds:
    at = torch.zeros(shape, dtype=torch.bool, device="cpu") if at is None else at
    return DocumentEnds.of(at, None if valid is None else valid.cpu())


def beside_a_loss(inputs: LossInputs, loss: Tensor) -> ModelState | None:
    """The states that a loss has found, if they were asked for; their gradient is refused."""
    if inputs.borders is None or inputs.borders.ends is None:
        return None
    states: ModelState | None = inputs.borders.ends.states()
    states = None if states is None else states.detach()
    if states is None or not (loss.requires_grad and torch.is_grad_enabled()):
        return states
    return type(states)(*_WithoutGradient.apply(loss, *states.tensors()))


class _WithoutGradient(torch.autograd.Function):
    """The same tensors; whoever asks for their gradient is told that there is none."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise StrategyError(
            "document_states beside a loss have no gradient: detach() them, or call the model without labels, whose "
            "document_states have one"
        )
