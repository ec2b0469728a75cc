"""Parameters of a test of which every two values meet, where what is claimed is no more than that.

Tests import it as ``from pairwise import every_two``.
"""

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any


def every_two(
    first: Iterable[Any], second: Iterable[Any], third: Iterable[Any]
) -> list[tuple[Any, Any, Any]]:
    """Rows of one value each: all of the first with all of the second, and the third goes round.

    The third may have no more values than either of the others. A fault that needs a value of each of the three is
    found where those three meet; one that needs two of them is found in any case.
    """
    values = [tuple(first), tuple(second), tuple(third)]
    rows = [
        (a, b, values[2][(i + j) % len(values[2])])
        for (i, a), (j, b) in product(enumerate(values[0]), enumerate(values[1]))
    ]
    for one, other in combinations(range(3), 2):
        assert {(row[one], row[other]) for row in rows} == set(product(values[one], values[other]))
    return rows
