"""The recurrences of RWKV-4 to RWKV-7, each with several kernels (see :mod:`rwkv_rev.wkv.dispatch`)."""

from rwkv_rev.wkv.dispatch import (
    KERNELS,
    KernelError,
    Wkv5Handover,
    choose_kernel,
    decayed,
    is_fused,
    use_kernel,
    wkv4,
    wkv5,
    wkv5_contribution,
    wkv5_plan,
    wkv6,
    wkv6_contribution,
    wkv7,
    wkv7_transition,
)
from rwkv_rev.wkv.naive import EMPTY_EXPONENT

__all__ = [
    "EMPTY_EXPONENT",
    "KERNELS",
    "KernelError",
    "Wkv5Handover",
    "choose_kernel",
    "decayed",
    "is_fused",
    "use_kernel",
    "wkv4",
    "wkv5",
    "wkv5_contribution",
    "wkv5_plan",
    "wkv6",
    "wkv6_contribution",
    "wkv7",
    "wkv7_transition",
]
