"""Memory and speed against context length as PNG files; needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rwkv_rev.training.plots import refuse_plot, write_png

__all__ = ["plot_memory", "plot_rows", "plot_speed", "refuse_plot"]

MEMORY_PLOT, SPEED_PLOT = "memory-by-context.png", "speed-by-context.png"
COLORS = {"full": "#c1432e", "reversible": "#1f6fb2", "checkpoint": "#3f8f4f", "truncated": "#8a6fb0"}
GB, MB = 10**9, 10**6


def plot_rows(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw what the rows hold into ``folder``: ``memory-by-context.png``, ``speed-by-context.png``."""
    points = [row for row in rows if not row.get("fit")]
    drawn = []
    if any("peak_bytes" in row for row in points):
        drawn.append(folder / MEMORY_PLOT)
        plot_memory(points, drawn[-1])
    if any("seconds" in row and "peer" not in row for row in points):
        drawn.append(folder / SPEED_PLOT)
        plot_speed(points, drawn[-1])
    return drawn


def plot_memory(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Peak memory over context length, one curve per setting, a cross where memory ran out."""
    figure, axes = _figure(rows, "Peak memory of one training step")
    limits = [row["limit_bytes"] for row in rows if row.get("limit_bytes")]
    top = max(row["peak_bytes"] for row in rows if "peak_bytes" in row)
    failed = [row for row in rows if "error" in row]
    unit, name = (GB, "GB") if max([top, *(limits if failed else [])]) >= GB else (MB, "MB")
    for setting, points in _by_setting(rows):
        good = [(row["tokens"], row["peak_bytes"] / unit) for row in points if "peak_bytes" in row]
        bad = [row["tokens"] for row in points if "error" in row]
        style = _style(setting, rows)
        if good:
            axes.plot(*zip(*good, strict=True), marker="o", label=setting, **style)
        if bad and limits:
            height = limits[0] / unit
            if good:
                axes.plot([good[-1][0], bad[0]], [good[-1][1], height], linestyle=":", **style)
            axes.plot([bad[0]], [height], marker="X", markersize=11, linestyle="none", **style)
            axes.annotate(
                "out of memory",
                (bad[0], height),
                textcoords="offset points",
                xytext=(10, -14),
                color=style["color"],
            )
    if failed and limits:
        axes.axhline(limits[0] / unit, color="#777777", linewidth=1, linestyle="--", zorder=0)
        axes.text(
            0.01, limits[0] / unit, f"limit {limits[0] / unit:.3g} {name}", color="#555555", va="bottom",
            transform=axes.get_yaxis_transform(),
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"peak memory ({name})")
    _finish(figure, axes, rows, path)


def plot_speed(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Tokens per second over context length, one curve per setting."""
    figure, axes = _figure(rows, "Speed of training steps")
    for setting, points in _by_setting(rows):
        good = [(row["tokens"], row["tokens_per_second"]) for row in points if "tokens_per_second" in row]
        if good:
            axes.plot(*zip(*good, strict=True), marker="o", label=setting, **_style(setting, rows))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens per second")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _finish(figure, axes, rows, path)


def _figure(rows: Sequence[dict[str, Any]], title: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    lengths = sorted({row["tokens"] for row in rows if "tokens" in row})
    axes.set_xticks(lengths, [_tokens(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("context length (tokens)")
    return figure, axes


def _finish(figure: Any, axes: Any, rows: Sequence[dict[str, Any]], path: Path) -> None:
    axes.legend(frameon=False)
    row = rows[0]
    about = [str(row[name]) for name in ("shape", "dtype", "hardware") if row.get(name)]
    if about:
        figure.supxlabel(", ".join(about), fontsize=8, color="#555555")
    write_png(figure, path, dpi=150)


def _by_setting(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    names = dict.fromkeys(row["setting"] for row in rows if "tokens" in row)
    return [
        (name, sorted((row for row in rows if row["setting"] == name), key=lambda row: row["tokens"]))
        for name in names
    ]


def _style(setting: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A strategy's own colour; its further settings are drawn lighter."""
    strategy = setting.split()[0]
    same = [name for name, _ in _by_setting(rows) if name.split()[0] == strategy]
    return {"color": COLORS.get(strategy, "#555555"), "alpha": max(0.35, 1 - 0.3 * same.index(setting))}


def _tokens(count: int) -> str:
    for size, unit in ((2**20, "M"), (2**10, "k")):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return f"{count:,}"
