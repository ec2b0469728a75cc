"""What a forward pass returns. Under transformers' own names, so that its trainers and ``generate`` find them."""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from rwkv_rev import unmade
from rwkv_rev.cache import CACHE_NAME, RwkvRevCache
from rwkv_rev.distributed.static_graph import refuse_lonely
from rwkv_rev.state import ModelState, of_batch_first


@dataclass
class RwkvRevOutput(ModelOutput):
    """Hidden states after ``ln_out`` [B, T, D], the state after the last token, each layer's residual stream.

    ``document_states``, where they were asked for, has a row for every document.
    """

    last_hidden_state: Tensor | None = None
    state: ModelState | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    document_states: ModelState | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        states = [state for state in (self.state, self.document_states) if isinstance(state, ModelState)]
        refuse_lonely(tensor for state in states for tensor in state.tensors())


@dataclass
class RwkvRevCausalLMOutput(ModelOutput):
    """Loss (float32 scalar), logits [B, T, V], state after the last token, each layer's residual stream.

    Beside a loss there are logits only if they were asked for.
    ``report`` tells what the gradient strategy did (name, tape bytes, drift; see :mod:`rwkv_rev.bptt`).
    ``document_states`` are those after every document, where they were asked for.
    The state is there once more as a cache, under the name that the installed transformers knows.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: ModelState | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    report: dict[str, Any] | None = field(default=None)
    document_states: ModelState | None = None
    if CACHE_NAME == "cache":
        cache: RwkvRevCache | None = None
    else:
        past_key_values: RwkvRevCache | None = None

    def __post_init__(self) -> None:
        """Beside a loss, logits that were not made are no item, and refuse to be used."""
        if self.logits is unmade.LOGITS:  # a copy of such an output
            OrderedDict.pop(self, "logits", None)
            object.__setattr__(self, "logits", None)
        super().__post_init__()
        for name in ("state", "document_states"):
            found = getattr(self, name)
            if isinstance(found, list):  # made again out of ``items``
                setattr(self, name, of_batch_first(found))
        if self.loss is not None and self.logits is None:
            object.__setattr__(self, "logits", unmade.LOGITS)

    def items(self) -> Any:
        """Without a gradient, what trainers can walk through, gather and pad: tensors.

        Then the state is a list of its three tensors with the batch first, and the report is left out.
        """
        if torch.is_grad_enabled():
            return super().items()
        values = dict(super().items())
        values.pop("report", None)
        for name in ("state", "document_states"):
            found = getattr(self, name)
            if isinstance(found, ModelState):  # a tuple in graphs that torch.export made
                values[name] = found.batch_first()
        return values.items()

    def keys(self) -> Any:
        """The names of :meth:`items`, by which ``to_tuple()`` and ``output[0]`` look up."""
        return dict(self.items()).keys()

    def __getitem__(self, key: Any) -> Any:
        return self.report if key == "report" and self.report is not None else super().__getitem__(key)
