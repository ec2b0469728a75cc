"""The architectures that there are: one line each. What is here can be made, trained and used; RWKV's also converted.

An architecture's own file, and its cells with it, is imported when it is first asked for: that the configuration can
look here does not make it import a model.
"""

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rwkv_rev.architectures.architecture import Architecture

ARCHITECTURES: "dict[str, str | Architecture]" = {
    "4": "rwkv4.RWKV4",
    "5.0": "rwkv5.RWKV5_0",
    "5.1": "rwkv5.RWKV5_1",
    "5.2": "rwkv5.RWKV5_2",
    "6": "rwkv6.RWKV6",
    "7": "rwkv7.RWKV7",
    "linear-attention": "linear_attention.LINEAR_ATTENTION",
    "coupled": "coupled.COUPLED",
    "coupled-4": "coupled_feedback.COUPLED_4",
    "coupled-5.2": "coupled_feedback.COUPLED_5_2",
    "reversible-gru": "reversible_gru.REVERSIBLE_GRU",
    "reversible-lstm": "reversible_lstm.REVERSIBLE_LSTM",
}
"""By the name that ``rwkv_version`` of a configuration has: the module of this package, and what it calls it. The
generations of RWKV stand from the oldest to the newest."""
UNKNOWN = {
    "6a (x060a, a low-rank gate)": r"\.att\.gate_w[12]$",
    "6b or 6c (x060b, x060c, no gate)": r"\.att\.time_maa_rkvw_",
    "6 in a Qwen (QRWKV6)": r"\.self_attn\.time_maa_",
    "7a or 7b (deep embeddings)": r"\.ffn\.s(_emb|_emb_x|[012])(\.weight)?$",
    "8": r"\.(rosa|qkv)\.|\.ffn\.enn\.",
    "1": r"\.att\.time_(w|alpha|beta|gamma)$",
}
"""Other generations, by a pattern that one of their tensors' names fulfils: they are refused by name."""


def register(architecture: "Architecture") -> None:
    """Add an architecture from outside of this package, for as long as the program runs.

    Raises:
        ValueError: if there is another one of its name, or it has none.
    """
    if not architecture.version:
        raise ValueError("an architecture needs a name: its version is empty")
    known = ARCHITECTURES.setdefault(architecture.version, architecture)
    if (_loaded(known) if isinstance(known, str) else known) is not architecture:
        raise ValueError(
            f"there is an architecture called {architecture.version!r} already: choose another name"
        )


def architecture(version: str) -> "Architecture":
    """The architecture called ``version``.

    Raises:
        ValueError: if there is none.
    """
    known = ARCHITECTURES.get(version)
    if known is None:
        raise ValueError(f"rwkv_version = {version!r} must be one of {', '.join(ARCHITECTURES)}")
    if isinstance(known, str):
        known = ARCHITECTURES[version] = _loaded(known)
    return known


def architectures() -> "tuple[Architecture, ...]":
    """All of them."""
    return tuple(map(architecture, ARCHITECTURES))


def generations() -> "tuple[Architecture, ...]":
    """Those of RWKV, from the oldest to the newest: what has layouts of other tools, and can be converted."""
    return tuple(known for known in architectures() if known.layouts)


def supported() -> str:
    """``RWKV-4, 5.0 and 5.1``, of all generations."""
    *versions, last = (known.version for known in generations())
    return f"RWKV-{' and '.join([', '.join(versions), last] if versions else [last])}"


def families(some: "Iterable[Architecture]") -> str:
    """``RWKV-5``, or ``RWKV-5 or 6``, of versions 5.0, 5.2 and 6."""
    numbers = dict.fromkeys(known.version.split(".")[0] for known in some)
    return f"RWKV-{' or '.join(numbers)}"


def with_tuned_state() -> str:
    """The :func:`families` whose initial state can be tuned."""
    return families(known for known in generations() if known.tunes_state)


def _loaded(place: str) -> "Architecture":
    module, name = place.split(".")
    found: Architecture = getattr(import_module(f"rwkv_rev.architectures.{module}"), name)
    return found
