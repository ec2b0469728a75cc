"""The benchmarks by name: measure, add the fits, and name hardware, versions, dtype and command in every row."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from rwkv_rev.arguments import checked
from rwkv_rev.benchmark.environment import environment
from rwkv_rev.benchmark.growth import fits
from rwkv_rev.benchmark.settings import BenchSettings
from rwkv_rev.device import choose_device
from rwkv_rev.errors import ConfigError
from rwkv_rev.printable import shortened

Kind = Literal["kernels", "training", "memory", "cpu", "convert"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Row = dict[str, Any]


@checked
def run_benchmark(
    kind: Kind, settings: BenchSettings, on_row: Callable[[Row], object] | None = None
) -> list[Row]:
    """Rows of one benchmark as plain values.

    Args:
        kind: ``kernels`` (the recurrences alone), ``training`` (seconds, tape and their growth), ``memory`` (peak
            against context), ``cpu`` (against other implementations) or ``convert`` (against the disk).
        settings: what to measure.
        on_row: called with each row as soon as it is there, without the fields they have in common.

    Raises:
        RwkvRevError: for what this machine or these settings cannot measure.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind = {shortened(repr(kind))} must be one of {', '.join(KINDS)}")
    choose_device(str(settings.device))
    on_row = on_row or (lambda row: None)
    common: Row = {"bench": kind, "shape": settings.shape}
    common |= environment(settings.device, settings.dtype, settings.command)
    return [common | row for row in _measure(kind, settings, on_row)]


def _measure(kind: Kind, settings: BenchSettings, on_row: Callable[[Row], object]) -> list[Row]:
    if kind == "kernels":
        from rwkv_rev.benchmark.kernels import kernel_rows

        return kernel_rows(settings.device, on_row=on_row)
    if kind == "training":
        from rwkv_rev.benchmark.training import training_rows

        rows = training_rows(settings, on_row)
        return rows + fits(rows)
    if kind == "memory":
        from rwkv_rev.benchmark.memory import memory_rows

        rows = memory_rows(settings, on_row)
        return rows + fits(rows)
    if kind == "cpu":
        from rwkv_rev.benchmark.cpu_compare import cpu_rows

        return cpu_rows(settings, on_row)
    from rwkv_rev.benchmark.conversion import conversion_rows

    rows = conversion_rows(settings, Path.cwd())
    on_row(rows[0])
    return rows
