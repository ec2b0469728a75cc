"""``next-token``: every token that has loss counts the same.

w_t = 1
"""

from dataclasses import dataclass
from typing import ClassVar

from rwkv_rev.training.objectives.objective import Objective


@dataclass(frozen=True)
class NextToken(Objective):
    """See the module's docstring."""

    name: ClassVar[str] = "next-token"
