"""How cost grows with the context: least-squares fits of measured rows.

A power law ``cost = a T^b`` is a straight line of slope b in logarithms: b is 1 where every token costs the same, 0
where the cost does not depend on T. Rows are from :mod:`rwkv_rev.benchmark.training` or
:mod:`rwkv_rev.benchmark.memory`.

The tape holds a record for every chunk but the first and the last, so that at few chunks its bytes rise faster than
T; its exponent is fitted against the tokens that have one, ``T - 2 C``.
"""

import math
from collections.abc import Sequence
from typing import Any

LEAST_POINTS = 3


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """b of ``cost = a size^b`` by least squares in logarithms; all values positive."""
    return slope([math.log(x) for x in sizes], [math.log(y) for y in costs])[0]


def slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept of the line with the least squared errors in y."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    rise = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    return rise, mean_y - rise * mean_x


def longest_context(tokens: Sequence[int], peaks: Sequence[float], limit: float, multiple: int) -> int:
    """The longest context, a multiple of ``multiple``, whose peak on the line of measured ones is at most ``limit``."""
    per_token, start = slope(tokens, peaks)
    return max(0, int((limit - start) / per_token) // multiple * multiple)


def fits(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per setting that has enough contexts: exponents of time, tape and memory over T.

    ``time_exponent`` is that of seconds, so time per token grows with that less 1; likewise for the tape.
    ``cpu_time_exponent`` is that of the process's own seconds.
    ``bytes_per_token`` is the slope of peak memory over T. Where a limit is known, ``runs_out_at`` is the context
    at which that line meets it.
    """
    found = []
    for name in dict.fromkeys(row["setting"] for row in rows):
        points = [row for row in rows if row["setting"] == name and "error" not in row]
        if len({row["tokens"] for row in points}) < LEAST_POINTS:
            continue
        tokens = [row["tokens"] for row in points]
        fit: dict[str, Any] = {"setting": name, "fit": True, "contexts": tokens}
        if all("seconds" in row for row in points):
            fit["time_exponent"] = exponent(tokens, [row["seconds"] for row in points])
        if all("cpu_seconds" in row for row in points):
            fit["cpu_time_exponent"] = exponent(tokens, [row["cpu_seconds"] for row in points])
        taped = [
            row for row in points if row.get("tape_bytes", 0) > 0 and row["tokens"] > 2 * row["chunk_length"]
        ]
        if len(taped) >= LEAST_POINTS:
            on_tape = [row["tokens"] - 2 * row["chunk_length"] for row in taped]
            fit["tape_exponent"] = exponent(on_tape, [row["tape_bytes"] for row in taped])
            fit["tape_bytes_per_token"] = taped[-1]["tape_bytes"] / on_tape[-1]
        if all(row.get("peak_bytes", 0) > 0 for row in points):
            peaks = [row["peak_bytes"] for row in points]
            fit["memory_exponent"] = exponent(tokens, peaks)
            fit["bytes_per_token"], start = slope(tokens, peaks)
            limit = points[-1].get("limit_bytes")
            if limit and fit["bytes_per_token"] * tokens[-1] > 0.1 * peaks[-1]:
                fit["runs_out_at"] = round((limit - start) / fit["bytes_per_token"])
        found.append(fit)
    return found
