"""The eps of a model's norms, which no tensor tells: those that are published, or what a ``config.json`` says.

RWKV-4 and 5 divide by ``head_size_divisor`` before a GroupNorm of eps 1e-5, the same as eps 1e-5 times its square
without the division.
"""

import math
from collections.abc import Mapping
from typing import Any

from rwkv_rev.printable import shortened

LAYER_NORM = 1e-5
GROUP_NORM = 64e-5


def number(config: Mapping[str, Any], name: str, usual: float, *, least: float, most: float) -> float:
    """A number of ``config.json``, ``usual`` where it says none.

    Raises:
        ValueError: if it is none, or not between the two.
    """
    value = config.get(name)
    found = usual if value is None else value
    is_number = isinstance(found, int | float) and not isinstance(found, bool)
    if not is_number or not least < found < most:
        kind = "" if is_number else "a number "
        raise ValueError(
            f"config.json says {name} = {shortened(repr(value))}; it must be {kind}above {least} and below {most}"
        )
    return float(found)


def understood(config: Mapping[str, Any], **usual: Any) -> None:
    """Refuse a ``config.json`` that says something else than these.

    Raises:
        ValueError: if it does.
    """
    for name, value in usual.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"config.json says {name} = {shortened(repr(config[name]))}: only {value!r} is understood"
            )


def divisor_of(group_norm_epsilon: float) -> float:
    """The ``head_size_divisor`` before a GroupNorm of eps 1e-5 that is this eps without it."""
    divisor = math.sqrt(group_norm_epsilon / 1e-5)
    return round(divisor) if math.isclose(divisor, round(divisor), rel_tol=1e-6) else divisor


def by_divisor(config: Mapping[str, Any], layout: str, head_size: int) -> tuple[float, float]:
    """Those of RWKV-4 and 5: of LayerNorm, and of GroupNorm without the division."""
    epsilon = number(config, "layer_norm_epsilon", LAYER_NORM, least=0, most=1)
    divisor = number(config, "head_size_divisor", 8, least=0.01, most=100)
    return epsilon, GROUP_NORM if divisor == 8 else 1e-5 * divisor**2
