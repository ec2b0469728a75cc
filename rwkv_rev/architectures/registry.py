"""The generations that there are: what is in :data:`ARCHITECTURES` can be converted, trained and exported."""

from collections.abc import Iterable

from rwkv_rev.architectures.architecture import Architecture
from rwkv_rev.architectures.rwkv4 import RWKV4
from rwkv_rev.architectures.rwkv5 import RWKV5_0, RWKV5_1, RWKV5_2

ARCHITECTURES: tuple[Architecture, ...] = (RWKV4, RWKV5_0, RWKV5_1, RWKV5_2)
"""From the oldest to the newest."""
UNKNOWN = {
    "6": r"\.att(ention)?\.time_maa_",
    "7": r"\.att(ention)?\.(x_[rwkvag]|r_k|k_[ka]|[wav][012])$|\.attn\.r_proj",
    "1": r"\.att\.time_(w|alpha|beta|gamma)$",
}
"""Other generations, by a pattern that one of their tensors' names fulfils: they are refused by name."""


def architecture(version: str) -> Architecture:
    """The generation called ``version``.

    Raises:
        ValueError: if there is none.
    """
    for known in ARCHITECTURES:
        if known.version == version:
            return known
    raise ValueError(
        f"rwkv_version = {version!r} must be one of {', '.join(k.version for k in ARCHITECTURES)}"
    )


def supported() -> str:
    """``RWKV-4, 5.0 and 5.1``, of all generations."""
    *versions, last = (known.version for known in ARCHITECTURES)
    return f"RWKV-{' and '.join([', '.join(versions), last] if versions else [last])}"


def families(some: Iterable[Architecture]) -> str:
    """``RWKV-5``, or ``RWKV-5 or 6``, of versions 5.0, 5.2 and 6."""
    numbers = dict.fromkeys(known.version.split(".")[0] for known in some)
    return f"RWKV-{' or '.join(numbers)}"


def with_tuned_state() -> str:
    """The :func:`families` whose initial state can be tuned."""
    return families(known for known in ARCHITECTURES if known.tunes_state)
