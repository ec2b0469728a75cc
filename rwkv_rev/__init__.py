"""rwkv-rev: pretrained RWKV-4/5 checkpoints as reversible cells, proven equal, trainable over very long contexts.

Importing this package registers the model, its configuration and its tokenizers with transformers' Auto classes.
The names below are loaded when first used, so that ``import rwkv_rev`` alone costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rwkv_rev.registration import install as _install

if TYPE_CHECKING:
    from rwkv_rev.configuration import RwkvRevConfig as RwkvRevConfig
    from rwkv_rev.converters.conversion import convert as convert
    from rwkv_rev.converters.export import export as export
    from rwkv_rev.equivalence.verification import verify_directory as verify  # noqa: F401
    from rwkv_rev.foreign_code import position_wise as position_wise
    from rwkv_rev.modeling import RwkvRevForCausalLM as RwkvRevForCausalLM
    from rwkv_rev.modeling import RwkvRevModel as RwkvRevModel
    from rwkv_rev.state import RwkvRevState as RwkvRevState

__version__ = "0.1.0"

_PLACES = {
    "RwkvRevConfig": ("rwkv_rev.configuration", "RwkvRevConfig"),
    "RwkvRevForCausalLM": ("rwkv_rev.modeling", "RwkvRevForCausalLM"),
    "RwkvRevModel": ("rwkv_rev.modeling", "RwkvRevModel"),
    "RwkvRevState": ("rwkv_rev.state", "RwkvRevState"),
    "convert": ("rwkv_rev.converters.conversion", "convert"),
    "position_wise": ("rwkv_rev.foreign_code", "position_wise"),
    "export": ("rwkv_rev.converters.export", "export"),
    "verify": ("rwkv_rev.equivalence.verification", "verify_directory"),
}

__all__ = [*_PLACES]

_install()


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
