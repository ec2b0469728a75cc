"""``set_bptt``: settings that hold from now on, or for a ``with`` statement."""

from dataclasses import replace
from types import TracebackType
from typing import Any

from rwkv_rev.base_model import RwkvRevModel
from rwkv_rev.bptt_settings import AUTO
from rwkv_rev.chunk_length import AutoLength
from rwkv_rev.errors import StrategyError
from rwkv_rev.remnants import refuse_lifting


class BpttSetting:
    """Settings just chosen for a model; as a context manager it puts back what they replaced."""

    def __init__(self, model: RwkvRevModel, chosen: dict[str, Any]) -> None:
        refuse_lifting(chosen.get("remnants"), model.config, StrategyError)
        self._model, self._chosen = model, chosen
        self._former = {name: getattr(model.bptt, name) for name in chosen}
        model.bptt = replace(model.bptt, **chosen)
        self._in_force = True
        if chosen.get("chunk_length") == AUTO:
            model.auto_length = AutoLength()

    def __enter__(self) -> None:
        if not self._in_force:  # entered once more
            self._former = {name: getattr(self._model.bptt, name) for name in self._chosen}
            self._model.bptt = replace(self._model.bptt, **self._chosen)
            self._in_force = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._model.bptt = replace(self._model.bptt, **self._former)
        self._in_force = False
