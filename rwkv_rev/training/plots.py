"""Curves as PNG files. Drawn without a display; needs matplotlib (``pip install 'rwkv-rev[train]'``)."""

import io
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rwkv_rev.errors import OutputError, RwkvRevError
from rwkv_rev.folders.safe_output import check_place

_PNG = b"\x89PNG"


def has_matplotlib() -> bool:
    """Whether curves can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def refuse_without_matplotlib() -> None:
    """Raise RwkvRevError when a curve was asked for that cannot be drawn."""
    if not has_matplotlib():
        raise RwkvRevError("drawing needs matplotlib: pip install 'rwkv-rev[train]'")


def refuse_plot(path: Path) -> None:
    """Refuse, before anything is computed, a drawing that could not be written, or only in place of something else.

    Raises:
        RwkvRevError: without matplotlib.
        OutputError: for a name that does not end in .png, a folder, a file that is no drawing, a place without access.
    """
    refuse_without_matplotlib()
    if path.suffix.lower() != ".png":
        raise OutputError(f"--plot {path}: drawings are PNG files, so end the name in .png")
    check_place(path)
    try:
        with path.open("rb") as file:
            start = file.read(len(_PNG))
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"--plot {path}: {error.strerror}; choose another name") from error
    if start and start != _PNG:
        raise OutputError(f"--plot {path} exists and is no PNG file; choose another name")


def write_png(figure: Any, path: Path, **options: Any) -> None:
    """Write a figure whole or not at all.

    Raises:
        OutputError: where the system refuses to write.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", **options)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(drawn.getvalue())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def plot_losses(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Training loss by step from log rows, and held-out loss where there is any; nats per token."""
    axes, save = _axes(title)
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    if train:
        axes.plot(*zip(*train, strict=True), label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), marker="o", label="held-out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    if train or held_out:
        axes.legend()
    save(path)


def plot_buckets(
    names: Sequence[str], curves: dict[str, Sequence[float]], path: Path, title: str, unit: str
) -> None:
    """One curve per name over buckets of positions."""
    axes, save = _axes(title)
    _draw_buckets(axes, names, curves, unit)
    save(path)


def bucket_image(names: Sequence[str], curves: dict[str, Sequence[float]], title: str, unit: str) -> Any:
    """:func:`plot_buckets` as a numpy array [height, width, 3] of uint8."""
    import numpy as np

    axes, _ = _axes(title)
    _draw_buckets(axes, names, curves, unit)
    canvas = axes.figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_buckets(axes: Any, names: Sequence[str], curves: dict[str, Sequence[float]], unit: str) -> None:
    for label, values in curves.items():
        axes.plot(range(len(values)), values, marker="o", label=label)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel("position in the context (tokens)")
    axes.set_ylabel(unit)
    if len(curves) > 1:
        axes.legend()


def _axes(title: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.grid(alpha=0.3)
    return axes, lambda path: write_png(figure, path)
