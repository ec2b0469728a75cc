"""rwkv-rev: pretrained RWKV-4/5 checkpoints as reversible cells, proven equal, trainable over very long contexts.

Letters (B, T, C, D, ...) and terms (boundary, remnant, tape, ...) are explained in ``docs/terms.md``.

Importing this package registers the model, its configuration and its tokenizers with transformers' Auto classes.
The names below are loaded when first used, so that ``import rwkv_rev`` alone costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rwkv_rev.registration import install as _install
from rwkv_rev.version import __version__ as __version__

if TYPE_CHECKING:
    from rwkv_rev.base_model import RwkvRevModel as RwkvRevModel
    from rwkv_rev.benchmark.run import run_benchmark as bench  # noqa: F401
    from rwkv_rev.configuration import RwkvRevConfig as RwkvRevConfig
    from rwkv_rev.continuation import generate as generate
    from rwkv_rev.conversation import Chat as Chat
    from rwkv_rev.conversation import chat as chat
    from rwkv_rev.conversion import convert as convert
    from rwkv_rev.converters.adapter_export import save_adapter as save_adapter
    from rwkv_rev.converters.export import export as export
    from rwkv_rev.converters.inspection import inspect_source as inspect  # noqa: F401
    from rwkv_rev.converters.merging import merge as merge
    from rwkv_rev.converters.tuned_states import load_state as load_state
    from rwkv_rev.converters.tuned_states import merge_states as merge_states
    from rwkv_rev.converters.tuned_states import save_state as save_state
    from rwkv_rev.equivalence.verification import verify_directory as verify  # noqa: F401
    from rwkv_rev.errors import CheckpointError as CheckpointError
    from rwkv_rev.errors import ConfigError as ConfigError
    from rwkv_rev.errors import DataError as DataError
    from rwkv_rev.errors import OutputError as OutputError
    from rwkv_rev.errors import ReversalMismatchError as ReversalMismatchError
    from rwkv_rev.errors import RwkvRevError as RwkvRevError
    from rwkv_rev.errors import SourceError as SourceError
    from rwkv_rev.errors import StrategyError as StrategyError
    from rwkv_rev.errors import VerificationFailed as VerificationFailed
    from rwkv_rev.folders.publish import publish as publish
    from rwkv_rev.foreign.declared_code import position_wise as position_wise
    from rwkv_rev.fresh import init as init
    from rwkv_rev.modeling import RwkvRevForCausalLM as RwkvRevForCausalLM
    from rwkv_rev.rewriting import rewrite as rewrite
    from rwkv_rev.simulation.combinations import combine as plan  # noqa: F401
    from rwkv_rev.state import RwkvRevState as RwkvRevState
    from rwkv_rev.training.evaluate import evaluate_directory as evaluate  # noqa: F401
    from rwkv_rev.training.finetune import finetune as finetune

_ERRORS = (
    "CheckpointError",
    "ConfigError",
    "DataError",
    "OutputError",
    "ReversalMismatchError",
    "RwkvRevError",
    "SourceError",
    "StrategyError",
    "VerificationFailed",
)
_PLACES = {
    "Chat": ("rwkv_rev.conversation", "Chat"),
    "RwkvRevConfig": ("rwkv_rev.configuration", "RwkvRevConfig"),
    "RwkvRevForCausalLM": ("rwkv_rev.modeling", "RwkvRevForCausalLM"),
    "RwkvRevModel": ("rwkv_rev.base_model", "RwkvRevModel"),
    "RwkvRevState": ("rwkv_rev.state", "RwkvRevState"),
    "bench": ("rwkv_rev.benchmark.run", "run_benchmark"),
    "chat": ("rwkv_rev.conversation", "chat"),
    "convert": ("rwkv_rev.conversion", "convert"),
    "evaluate": ("rwkv_rev.training.evaluate", "evaluate_directory"),
    "export": ("rwkv_rev.converters.export", "export"),
    "finetune": ("rwkv_rev.training.finetune", "finetune"),
    "generate": ("rwkv_rev.continuation", "generate"),
    "init": ("rwkv_rev.fresh", "init"),
    "inspect": ("rwkv_rev.converters.inspection", "inspect_source"),
    "load_state": ("rwkv_rev.converters.tuned_states", "load_state"),
    "merge": ("rwkv_rev.converters.merging", "merge"),
    "merge_states": ("rwkv_rev.converters.tuned_states", "merge_states"),
    "plan": ("rwkv_rev.simulation.combinations", "combine"),
    "position_wise": ("rwkv_rev.foreign.declared_code", "position_wise"),
    "publish": ("rwkv_rev.folders.publish", "publish"),
    "rewrite": ("rwkv_rev.rewriting", "rewrite"),
    "save_adapter": ("rwkv_rev.converters.adapter_export", "save_adapter"),
    "save_state": ("rwkv_rev.converters.tuned_states", "save_state"),
    "verify": ("rwkv_rev.equivalence.verification", "verify_directory"),
    **{name: ("rwkv_rev.errors", name) for name in _ERRORS},
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
