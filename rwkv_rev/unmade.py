"""What stands for logits that were not made: clear words where it is used, instead of those of ``None``."""

from typing import Any, NoReturn

from rwkv_rev.errors import StrategyError


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise StrategyError(
        "this loss was computed without its logits: pass return_logits=True, with bptt='full' and a context of at most "
        "one chunk where a gradient is wanted (peft's CPT needs them), or call the model without labels"
    )


class Unmade:
    """False, and neither a sequence nor a tensor. Its only value is :data:`LOGITS`."""

    __getitem__ = __iter__ = __len__ = __array__ = _refuse
    __torch_function__: Any = staticmethod(_refuse)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what copying, pickling and the like look for
            raise AttributeError(name)
        _refuse()

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "logits not made"

    def __reduce__(self) -> str:
        return "LOGITS"


LOGITS: Any = Unmade()
