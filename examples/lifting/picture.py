"""Draws docs/lifting.png: how one column of a state goes through the factors, and what is left on the tape.

python examples/lifting/picture.py docs/lifting.png
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

N = 4
SHEAR, SCALE, REMNANT, PLAIN = "#1f6fb2", "#c1432e", "#8a6fb0", "#333333"
FIRST, SCALED, SECOND, ADDED, END = 1.0, 4.4, 6.1, 9.6, 11.0


def lane(number: int) -> float:
    """The height of the line of number 1 to N."""
    return float(N - number)


def shear(axes: Axes, start: float, letter: str, order: list[int]) -> None:
    """Each number takes a rounded sum of others: of those behind it (R) or before it (L)."""
    for place, target in enumerate(order):
        x = start + 0.8 * place
        sources = [
            other for other in range(1, N + 1) if (other > target if letter == "R" else other < target)
        ]
        for source in sources:
            axes.plot([x - 0.32, x], [lane(source), lane(source)], color=SHEAR, linewidth=1.2)
            axes.annotate(
                "",
                (x, lane(target)),
                (x, lane(source)),
                arrowprops={"arrowstyle": "->", "color": SHEAR, "shrinkB": 6, "linewidth": 1.2},
            )
            axes.plot([x], [lane(source)], marker="o", markersize=3.5, color=SHEAR)
        if sources:
            axes.plot([x], [lane(target)], marker="o", markersize=12, color="white", markeredgecolor=SHEAR)
            axes.text(x, lane(target), "+", color=SHEAR, ha="center", va="center", fontsize=11)
    middle = start + 0.4 * (N - 1)
    axes.text(middle, N - 0.35, f"x + round({letter} x)", color=SHEAR, ha="center", va="bottom", fontsize=11)


def draw(path: Path) -> None:
    figure, axes = plt.subplots(figsize=(10, 4.1))
    for number in range(1, N + 1):
        axes.plot([0.2, END], [lane(number)] * 2, color=PLAIN, linewidth=0.9, zorder=0)
        axes.text(0.1, lane(number), f"$x_{number}$", ha="right", va="center", fontsize=12)
        axes.text(END + 0.1, lane(number), f"$S'_{number}$", ha="left", va="center", fontsize=12)
        axes.text(
            SCALED,
            lane(number),
            f"$d_{number}$",
            ha="center",
            va="center",
            fontsize=11,
            color=SCALE,
            bbox={"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": SCALE},
        )
        axes.annotate(
            "",
            (SCALED + 0.62, lane(number) - 0.52),
            (SCALED + 0.22, lane(number) - 0.08),
            arrowprops={"arrowstyle": "->", "color": REMNANT, "linewidth": 1.2},
        )
        axes.text(
            SCALED + 0.68, lane(number) - 0.55, rf"$\rho_{number}$", color=REMNANT, va="center", fontsize=11
        )
        axes.text(
            ADDED,
            lane(number),
            "+",
            ha="center",
            va="center",
            fontsize=11,
            bbox={"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": PLAIN},
        )
    shear(axes, FIRST, "R", [1, 2, 3, 4])
    shear(axes, SECOND, "L", [4, 3, 2, 1])
    axes.text(SCALED, N - 0.35, "round(d t)", color=SCALE, ha="center", va="bottom", fontsize=11)
    axes.text(ADDED, N - 0.35, "round(U / g)", color=PLAIN, ha="center", va="bottom", fontsize=11)
    axes.text(
        SCALED,
        -1.15,
        r"to the tape: $\log_2 1/|d_j|$ bits of each number",
        color=REMNANT,
        ha="center",
        fontsize=11,
    )
    axes.text(
        FIRST + 1.2, -1.75, "undone from the last number to the first", color=SHEAR, ha="center", fontsize=10
    )
    axes.text(
        SECOND + 1.2, -1.75, "undone from the first number to the last", color=SHEAR, ha="center", fontsize=10
    )
    axes.set_xlim(-0.5, END + 0.8)
    axes.set_ylim(-2.1, N + 0.1)
    axes.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
