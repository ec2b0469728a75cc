"""The outcome of a verification: one row per oracle, further sections, a verdict, and all of it as text or JSON."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from rwkv_rev.equivalence.gradients import GradientCheck
from rwkv_rev.equivalence.logits import LogitComparison
from rwkv_rev.equivalence.reversal import ReversalCheck
from rwkv_rev.equivalence.weights import WeightComparison
from rwkv_rev.json_text import finite
from rwkv_rev.printable import counted
from rwkv_rev.tables import aligned, wrapped


@dataclass(frozen=True)
class InFloat64:
    """A converted model and an oracle once more, both in float64: what they differ by there is no rounding.

    Attributes:
        difference: largest |delta logit| between them, of at most ``tolerance``.
        noise: by how much float32 moves the converted model's logits, at most ``noise_tolerance``.
        oracle_noise: by how much it moves the oracle's, at most ``oracle_tolerance``; None where nobody asked.
    """

    difference: float
    tolerance: float
    noise: float
    noise_tolerance: float
    oracle_noise: float | None = None
    oracle_tolerance: float = math.inf

    @property
    def reason(self) -> str | None:
        """What is wrong, NaN included; None where nothing is."""
        if not self.difference <= self.tolerance:
            return f"differs by {self.difference:.1e} in float64, where {self.tolerance:.0e} is allowed"
        if not self.noise <= self.noise_tolerance:
            allowed = f"{self.noise_tolerance:.1e} is allowed"
            return f"agrees in float64, but float32 moves the model by {self.noise:.1e}, where {allowed}"
        if self.oracle_noise is not None and not self.oracle_noise <= self.oracle_tolerance:
            return f"is itself {self.oracle_noise:.1e} from the float64 scan, with which the model agrees"
        return None


@dataclass(frozen=True)
class Row:
    """One oracle's comparison, the largest |delta logit| that needs no explanation, and a look at it in float64."""

    oracle: str
    comparison: LogitComparison
    tolerance: float
    float64: InFloat64 | None = None

    @property
    def reason(self) -> str | None:
        """Why it fails; None if it passes. NaN is within no tolerance."""
        if self.float64 is not None:
            found = self.float64.reason
            return None if found is None else f"{self.oracle} {found}"
        if self.comparison.largest <= self.tolerance:
            return None
        return (
            f"{self.oracle} differs by {self.comparison.largest:.1e}, where {self.tolerance:.0e} is allowed"
        )

    @property
    def passed(self) -> bool:
        return self.reason is None

    @property
    def note(self) -> str | None:
        """What a reader should know of a distance that is more than usual, but only rounding."""
        wide = self.float64
        if wide is None or not self.passed or self.comparison.largest <= self.tolerance:
            return None
        return (
            f"{self.oracle}: {self.comparison.largest:.1e} is rounding, which in float32 moves it by "
            f"{wide.oracle_noise:.1e} and the converted model by {wide.noise:.1e}; in float64 they differ by "
            f"{wide.difference:.1e}"
        )


@dataclass(frozen=True)
class Report:
    """Everything a verification found.

    Attributes:
        directory: the converted model.
        original: the SOURCE it was compared with.
        model: version and sizes in words.
        unit: what one token is, ``byte`` or ``token``.
        rows: one per oracle that ran.
        skipped: oracles that could not run, and why.
        weights: the comparison of the stored values.
        divergence: on FAIL, the first place that differs, in words.
        notes: what a reader should know about the figures.
        reversal: whether states come back to the bit; None if not asked for.
        gradients: every strategy against float64; None if not asked for.
        own_values: whether the original's values are the converted model's.
        others: whether anybody else implements the architecture.
        comparable: whether there is anything to compare the logits with; else the further checks alone decide.
    """

    directory: str
    original: str
    model: str
    unit: str
    rows: tuple[Row, ...]
    weights: WeightComparison
    skipped: dict[str, str] = field(default_factory=dict)
    divergence: str | None = None
    notes: tuple[str, ...] = ()
    reversal: ReversalCheck | None = None
    gradients: GradientCheck | None = None
    own_values: bool = False
    others: bool = True
    comparable: bool = True

    @property
    def equal(self) -> bool:
        """At least one oracle ran, all passed, and no stored value differs."""
        return bool(self.rows) and all(row.passed for row in self.rows) and self.weights.passed

    @property
    def passed(self) -> bool:
        """The models are equal, and every further check that ran passed."""
        further = [check for check in (self.reversal, self.gradients) if check is not None]
        whole = self.equal if self.comparable else bool(further) and self.weights.passed
        return whole and all(check.passed for check in further)

    @property
    def summary(self) -> str:
        """One line: the verdict, and on FAIL what failed and where."""
        if not self.comparable:
            checked = ["its states come back to the bit"] if self.reversal is not None else []
            checked += ["its gradients are those of float64"] if self.gradients is not None else []
            told = " and ".join(checked if self.passed else self._broken_checks())
            return f"{self.directory}: {told}; its logits were compared with nothing"
        if self.own_values and self.equal:
            who = "the original implementations make" if self.others else "a plain loop makes"
            found = f"{self.directory} computes what {who} of its own values"
            return found if self.passed else f"{found}, but {'; '.join(self._broken_checks())}"
        if self.passed:
            rounded = self.weights.rounded_to
            qualifier = f", up to rounding to {_dtype_name(rounded)}" if rounded else ""
            return f"{self.directory} computes what {self.original} computes{qualifier}"
        broken = self._broken_checks()
        if self.equal:
            return f"{self.directory} computes what {self.original} computes, but {'; '.join(broken)}"
        reasons = []
        failed = [row.reason for row in self.rows if row.reason is not None]
        if failed:
            reasons.append(f"logits: {', '.join(failed)}")
        if self.weights.different:
            first, more = self.weights.different[0], len(self.weights.different) - 1
            reasons.append(f"{first} differs" + (f" and {counted(more, 'more tensor')}" if more else ""))
        where = f"; first difference: {self.divergence}" if self.divergence else ""
        return f"{self.directory} differs from {self.original}: {'; '.join([*reasons, *broken])}{where}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; figures that are NaN or infinite become None."""
        rounded = self.weights.rounded_to
        return {
            "directory": self.directory,
            "original": self.original,
            "model": self.model,
            "passed": self.passed,
            "oracles": [_row_dict(row, self.unit) for row in self.rows],
            "skipped": dict(self.skipped),
            "weights": {
                "tensors": self.weights.tensors,
                "different": [
                    {"name": t.name, "values": t.values, "of": t.of} for t in self.weights.different
                ],
                "rounded_to": _dtype_name(rounded) if rounded else None,
                "passed": self.weights.passed,
            },
            "divergence": self.divergence,
            "notes": list(self.notes),
            "reversal": None if self.reversal is None else self.reversal.to_dict(),
            "gradients": None if self.gradients is None else self.gradients.to_dict(),
        }

    def table(self) -> str:
        """Markdown that reads as plain text too: a column for each oracle, then what is worth knowing."""
        theirs, ours = ("oracle", "model") if self.own_values else ("original", "converted")
        measures = (
            "tokens",
            "largest Δlogit",
            "allowed",
            "mean Δlogit",
            "KL (nats)",
            "same top-1",
            f"bits/{self.unit}, {theirs}",
            f"bits/{self.unit}, {ours}",
            "Δlogit in float64",
            "",
        )
        figures = list(zip(measures, *map(_cells, self.rows), strict=True))
        prose = [self._weights_line()]
        prose += [row.note for row in self.rows if row.note is not None]
        prose += [f"{name}: not run, {reason}" for name, reason in self.skipped.items()]
        prose += list(self.notes)
        if self.divergence:
            prose.append(f"first difference: {self.divergence}")
        lines = wrapped(f"{self.model}, against {self.original}")
        if self.rows:
            lines += ["", *aligned(["", *(row.oracle for row in self.rows)], figures)]
        lines.append("")
        for text in prose:
            lines += wrapped(text)
        sections = [section for section in (self.reversal, self.gradients) if section is not None]
        for section in sections:
            lines += ["", *section.lines()]
        if sections:
            lines.append("")
        lines.append("PASS" if self.passed else "FAIL")
        return "\n".join(lines)

    def _broken_checks(self) -> list[str]:
        """What the further checks found wrong, in words."""
        broken = []
        if self.reversal is not None and self.reversal.mismatch is not None:
            broken.append(f"states do not come back to the bit: {self.reversal.mismatch}")
        if self.gradients is not None and self.gradients.failure is not None:
            broken.append(f"gradients are wrong: {self.gradients.failure}")
        return broken

    def _weights_line(self) -> str:
        weights = self.weights
        if weights.different:
            shown = ", ".join(map(str, weights.different[:3]))
            more = len(weights.different) - 3
            return f"weights: FAIL, differ: {shown}" + (f" and {more} more" if more > 0 else "")
        if self.own_values:
            return f"weights: {weights.tensors} tensors, its own values; there is no other original"
        rounded = f" rounded to {_dtype_name(weights.rounded_to)}" if weights.rounded_to else ""
        return f"weights: {weights.tensors} tensors, every value the original's{rounded}"


def _row_dict(row: Row, unit: str) -> dict[str, Any]:
    c = row.comparison
    figures = {
        "largest_delta": c.largest,
        "mean_delta": c.mean,
        "kl_nats": c.kl,
        "top1_agreement": c.top1,
        f"bits_per_{unit}_original": c.original_bits,
        f"bits_per_{unit}_converted": c.converted_bits,
    }
    return {
        "oracle": row.oracle,
        "tokens": c.tokens,
        **finite(figures),
        "tolerance": row.tolerance,
        "float64": None if row.float64 is None else finite(asdict(row.float64)),
        "passed": row.passed,
    }


def _cells(row: Row) -> tuple[str, ...]:
    c = row.comparison
    return (
        f"{c.tokens}",
        f"{c.largest:.1e}",
        f"{row.tolerance:.1e}",
        f"{c.mean:.1e}",
        f"{c.kl:.1e}",
        f"{100 * c.top1:.2f} %",
        "-" if c.original_bits is None else f"{c.original_bits:.4f}",
        "-" if c.converted_bits is None else f"{c.converted_bits:.4f}",
        "-" if row.float64 is None else f"{row.float64.difference:.1e}",
        "PASS" if row.passed else "FAIL",
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
