"""Prove that a converted model computes what its original computes.

    weights   every stored value against the original's (weights.py)
    logits    the converted model, in float32 through the ordinary ``from_pretrained``, against every oracle that
              can run for this original (oracles.py), over one text; what is too far apart for float32's usual
              rounding, and the naive scan always, is compared in float64 (float64.py, tolerance.py)
    expected  logits that lie beside the original checkpoint, where there are any (expected.py)
    where     on FAIL, the first sub-layer whose residual stream differs (divergence.py)
    reversal  on request, whether states run backwards come back to the bit (reversal.py)
    gradients on request, every gradient strategy against float64 (gradients.py)

The original is the SOURCE that ``conversion.json`` remembers, or the one given. Costs one float32 model in
memory, one block in float64, and its logits once, 4*T*V bytes; oracles are read in pieces.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.arguments import checked
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.converters.converted import ConvertedModel
from rwkv_rev.counts import MOST
from rwkv_rev.equivalence.divergence import Divergence, first_divergence, place_of
from rwkv_rev.equivalence.expected import ExpectedLogits, read_expected
from rwkv_rev.equivalence.float64 import float64_logits
from rwkv_rev.equivalence.gradients import CONTEXT as GRADIENT_CONTEXT
from rwkv_rev.equivalence.gradients import check_gradients
from rwkv_rev.equivalence.itself import as_original
from rwkv_rev.equivalence.logits import Beside, compare_logits, largest_difference
from rwkv_rev.equivalence.naive_model import PUBLISHED_GROUP_NORM_EPSILON
from rwkv_rev.equivalence.oracles import ORACLES, OracleUnavailable
from rwkv_rev.equivalence.original import OWN_VALUES, Original, RoundedTensors, open_original, source_of
from rwkv_rev.equivalence.report import InFloat64, Report, Row
from rwkv_rev.equivalence.reversal import CONTEXT as REVERSAL_CONTEXT
from rwkv_rev.equivalence.reversal import check_reversal
from rwkv_rev.equivalence.text import default_text, encode_text, read_text
from rwkv_rev.equivalence.tolerance import NOISE_FACTOR, tolerance
from rwkv_rev.equivalence.weights import WeightComparison, compare_weights
from rwkv_rev.errors import ConfigError, DataError, RwkvRevError
from rwkv_rev.folders.source import Source
from rwkv_rev.loading import load_model, without_bars
from rwkv_rev.modeling import RwkvRevForCausalLM
from rwkv_rev.printable import counted
from rwkv_rev.progress import Progress

ORACLE_CHOICES = ("auto", *ORACLES)
SMALL_MODEL = 50_000_000
"""Parameters below which reversal and gradients are checked unasked (``None``): seconds to minutes on a CPU."""
LEAST = 4
"""Tokens that prove something: the first reads no state, the second none that has decayed, the third a single decay."""
# Without and with the division by 8 before the GroupNorm.
GROUP_NORM_EPSILONS = (1e-5, PUBLISHED_GROUP_NORM_EPSILON)


@checked
def verify_directory(
    directory: str | Path,
    *,
    original: str | Source | None = None,
    file: str | None = None,
    revision: str | None = None,
    oracle: str = "auto",
    text: str | Path | None = None,
    tokens: int = 1024,
    reversal: bool | None = False,
    gradients: bool | None = False,
    context: int | None = None,
    chunk: int | None = None,
    progress: bool = False,
) -> Report:
    """Compare a converted model with its original.

    Args:
        directory: what ``convert`` wrote.
        original: SOURCE to compare with; None for the one the conversion remembers. ``directory`` itself, and None for
            a fine-tuned model and a fresh one: its own values, run by the original implementations, or by a plain loop
            where there is none.
        file: which checkpoint of a repository or folder, with ``original``.
        revision: branch, tag or commit of a Hub repository, with ``original``.
        oracle: ``auto`` (every oracle that can run), ``rwkv``, ``transformers`` or ``naive``.
        text: the text to read, or the ``Path`` of a UTF-8 file; None for Python's language reference.
        tokens: how many tokens of it; fewer if the text is shorter, with a note.
        reversal: also check that states come back to the bit; None: if the model has less than
            :data:`SMALL_MODEL` parameters.
        gradients: also compare every gradient strategy with float64; None as for ``reversal``.
        context: tokens that these two read, fewer if the text is shorter; 4,096 and 512 when None.
        chunk: their chunk length in tokens, less than they read: borders between chunks are what they compare. 256 and
            96 when None, less for a short text.
        progress: tell on stderr how far it is, downloads too.

    Returns:
        The report; ``report.passed`` is the verdict.

    Raises:
        SourceError, CheckpointError: the directory or its original cannot be read.
        DataError: no text of four tokens, or no tokenizer.
        OracleUnavailable: the oracle asked for by name cannot run for this original.
        ConfigError: an unknown oracle, too few tokens to prove anything, or a setting of checks that do not run.
    """
    if oracle not in ORACLE_CHOICES:
        raise ConfigError(f"oracle {oracle!r} must be one of {', '.join(ORACLE_CHOICES)}")
    for name, count, least in (("tokens", tokens, LEAST), ("context", context, LEAST), ("chunk", chunk, 1)):
        if count is not None and not least <= count <= MOST:
            raise ConfigError(f"{name} = {count} must be at least {least} and at most {MOST}")
    directory = Path(directory)
    with (
        ConvertedModel(directory) as converted,
        Progress("verifying", 4, "checks", wanted=progress, scaled=False) as shown,
    ):
        record = converted.record
        config = converted.config
        parameters = sum(torch.Size(converted.shape(name)).numel() for name in converted.names())
        wanted = {"reversal": reversal, "gradients": gradients}
        left_out = [name for name, asked in wanted.items() if asked is None and parameters >= SMALL_MODEL]
        lengths = {
            name: context or usual
            for name, usual in (("reversal", REVERSAL_CONTEXT), ("gradients", GRADIENT_CONTEXT))
            if name not in left_out and wanted[name] is not False
        }
        for name, given in (("context", context), ("chunk", chunk)):
            if given is not None and not lengths:
                raise ConfigError(
                    f"{name} = {given} is without effect: neither --reversal nor --gradients is checked here; name one"
                )
        content = read_text(text) if isinstance(text, Path) else default_text() if text is None else text
        needed = max([tokens, *lengths.values()])
        ids = encode_text(content, directory, vocabulary=config.vocab_size, tokens=needed)
        if len(ids) < LEAST:
            raise DataError(
                f"the text has {counted(len(ids), 'token')}; at least {LEAST} prove something: the first ones read no "
                "state that has decayed"
            )
        for name, length in lengths.items():
            if chunk is not None and chunk >= (read := min(length, len(ids))):
                raise ConfigError(
                    f"chunk = {chunk} leaves no border between chunks to compare in the {read:,} tokens that the check "
                    f"of {name} reads; use at most {read - 1}, or a longer context and text"
                )
        opening: AbstractContextManager[Original]
        alone = not config.architecture.layouts or bool(record.get("finetuned")) or "initialised" in record
        own = _is(directory, original) or (original is None and alone)
        if own and (file, revision) == (None, None):
            opening = nullcontext(as_original(converted))
        else:
            source = source_of(directory, record, original, file, revision)
            opening = open_original(
                source, group_norm_epsilon=record.get("group_norm_eps"), progress=progress
            )
        with opening as opened:
            _refuse_other_architecture(directory, config, opened)
            if opened.scan is None and not lengths:
                next(ORACLES["naive"](opened, ids))  # which says that there is nothing to compare with
            weights = compare_weights(opened.own_tensors, converted)
            shown.add(1)
            model = _load(directory)
            verification = _Verification(converted, model, opened, weights, ids[:tokens], tokens)
            report = verification.report(oracle)
            shown.add(1)
        notes = list(report.notes)
        if left_out:
            flags = " ".join(f"--{name}" for name in left_out)
            notes.append(
                f"{' and '.join(left_out)}: not checked unasked, the model has {parameters:,} parameters; use {flags}"
            )
        if context is not None and len(ids) < context:
            notes.append(f"the text has {counted(len(ids), 'token')}, fewer than the context of {context}")
        found: dict[str, Any] = {}
        for name, check in (("reversal", check_reversal), ("gradients", check_gradients)):
            if name in lengths:
                found[name] = check(model, ids[: lengths[name]], chunk=chunk)
            shown.add(1)
        return replace(report, notes=tuple(notes), **found)


@dataclass
class _Verification:
    stored: ConvertedModel
    model: RwkvRevForCausalLM
    original: Original
    weights: WeightComparison
    ids: Tensor
    asked: int

    def report(self, oracle: str) -> Report:
        config = self.stored.config
        expected = None
        if oracle == "auto" and self.original.expected is not None:
            expected = read_expected(self.original.expected, config.vocab_size)
        rows, skipped = self._oracle_rows(oracle, _logits(self.model, self.ids))
        notes = []
        if len(self.ids) < self.asked:
            notes.append(
                f"the text has {counted(len(self.ids), 'token')}, fewer than the {self.asked} asked for"
            )
        divergence = None
        if not (all(row.passed for row in rows) and self.weights.passed):
            divergence = self._divergence()
        if expected is not None:
            notes.append(f"expected: {expected.name}, beside the original")
            row = self._expected_row(expected)
            rows.append(row)
            if not row.passed and divergence is None:
                allowed = row.tolerance if row.float64 is None else row.float64.tolerance
                divergence = self._divergence_from_expected(expected, allowed)
        return Report(
            directory=str(self.stored.directory),
            original=self.original.label,
            model=_describe(config),
            unit="byte" if config.vocab_size == 256 else "token",
            rows=tuple(rows),
            weights=self.weights,
            skipped=skipped,
            divergence=divergence,
            notes=tuple(notes),
            own_values=self.original.tensors_are_own,
            others=self.original.is_known,
            comparable=self.original.scan is not None,
        )

    def _oracle_rows(self, oracle: str, logits: Tensor) -> tuple[list[Row], dict[str, str]]:
        rows, skipped = [], {}
        rounded_to = self.weights.rounded_to
        allowed = self._tolerance(rounded_to)
        for name, compute in ORACLES.items():
            if oracle not in ("auto", name):
                continue
            try:
                if name == "naive" and rounded_to is None:
                    rows.append(self._naive_row(name, logits))
                    continue
                comparison = compare_logits(compute(self.original, self.ids), logits, self.ids)
            except OracleUnavailable as unavailable:
                if oracle != "auto":
                    raise
                skipped[name] = unavailable.reason
                continue
            row = Row(name, comparison, allowed)
            if not row.passed and rounded_to is None:
                row = replace(row, float64=self._in_float64(name, logits))
            rows.append(row)
        if rounded_to is not None and oracle in ("auto", "naive"):
            rows.append(self._naive_row("naive, rounded", logits))
        return rows, skipped

    def _naive_row(self, name: str, logits: Tensor) -> Row:
        """Against the scan over the values as they are stored; in float64 too, since the scan is."""
        both = Beside(ORACLES["naive"](self._as_stored, self.ids), self._float64_logits(self.ids))
        comparison = compare_logits(both, logits, self.ids)
        usual = self._tolerance()
        seen = InFloat64(both.largest, self._tolerance(torch.float64), comparison.largest, usual)
        if not comparison.largest <= usual:
            noise = self._scan_noise(self.ids)
            seen = replace(seen, noise_tolerance=max(usual, NOISE_FACTOR * noise), oracle_noise=noise)
        return Row(name, comparison, usual, seen)

    def _in_float64(self, name: str, logits: Tensor) -> InFloat64:
        """Both in float64: the converted model and an oracle that it is far from in float32.

        For an oracle that has no float64 the scan stands in; float32 must then move it no more than the model.
        """
        compute, wide, original, ids = ORACLES[name], torch.float64, self.original, self.ids
        allowed = max(self._tolerance(), NOISE_FACTOR * self._scan_noise(ids))
        exact, allowed_to_oracle = compute, math.inf
        try:
            both = Beside(exact(original, ids, wide), self._float64_logits(ids))
            noise = largest_difference(both, [logits])
        except OracleUnavailable:
            exact, allowed_to_oracle = ORACLES["naive"], allowed
            both = Beside(exact(original, ids, wide), self._float64_logits(ids))
            noise = largest_difference(both, [logits])
        return InFloat64(
            difference=both.largest,
            tolerance=self._tolerance(wide),
            noise=noise,
            noise_tolerance=allowed,
            oracle_noise=largest_difference(compute(original, ids), exact(original, ids, wide)),
            oracle_tolerance=allowed_to_oracle,
        )

    def _scan_noise(self, ids: Tensor) -> float:
        """What float32 makes of the naive scan: the logits' largest move."""
        scan, original = ORACLES["naive"], self._as_stored
        return largest_difference(scan(original, ids, torch.float32), scan(original, ids))

    def _float64_logits(self, ids: Tensor) -> Iterator[Tensor]:
        return float64_logits(self.model, self.stored, ids)

    def _tolerance(self, kind: torch.dtype | None = None) -> float:
        return tolerance(self.stored.config.num_hidden_layers, self.stored.config.hidden_size, kind)

    @property
    def _as_stored(self) -> Original:
        """The original with its values rounded as the converted model's are."""
        if self.weights.rounded_to is None:
            return self.original
        tensors = RoundedTensors(self.original.tensors, self.weights.rounded_to)
        return replace(self.original, tensors=tensors)

    def _first_divergence(self, original: Original, ids: Tensor) -> Divergence | None:
        return first_divergence(self.model, self.stored, original, ids, self._tolerance(torch.float64))

    def _divergence(self) -> str:
        found = self._first_divergence(self._as_stored, self.ids)
        if found is not None:
            return str(found)
        if self.weights.different:  # of a token that the text lacks
            return place_of(self.weights.different[0].name, self.model.blocks[0].names)
        return "in no layer: in float64 the model is the scan of the original's tensors"

    def _expected_row(self, expected: ExpectedLogits) -> Row:
        last = _logits(self.model, expected.prompt)[-1:]
        comparison = compare_logits([expected.logits[None]], last, expected.prompt[-1:])
        row = Row("expected", comparison, self._tolerance(self.weights.rounded_to))
        if row.passed or self.weights.rounded_to is not None:
            return row
        # somebody's float32: as far from float64 as the scan is, whatever the converted model's own rounding
        *_, exact = self._float64_logits(expected.prompt)
        allowed = max(row.tolerance, NOISE_FACTOR * self._scan_noise(expected.prompt))
        difference = largest_difference([expected.logits[None]], [exact[-1:]])
        noise = largest_difference([last], [exact[-1:]])
        return replace(row, float64=InFloat64(difference, allowed, noise, allowed, difference, allowed))

    def _divergence_from_expected(self, expected: ExpectedLogits, allowed: float) -> str:
        """All oracles agree with the model, the expected logits do not: look for an eps that explains it."""
        for epsilon in GROUP_NORM_EPSILONS if self.original.has_group_norm else ():
            other = replace(self.original, group_norm_epsilon=epsilon)
            *_, last = ORACLES["naive"](other, expected.prompt)
            if (last[-1] - expected.logits).abs().max() <= allowed:
                found = self._first_divergence(other, expected.prompt)
                return f"{found}; the expected logits fit --group-norm-eps {epsilon:g}"
        return "in no layer: the expected logits are not those of the original's tensors"


def _is(directory: Path, original: str | Source | None) -> bool:
    """Whether the original that was named is the folder itself."""
    try:
        return isinstance(original, str) and directory.samefile(original)
    except (OSError, ValueError):  # no path, or no file there
        return False


def _refuse_other_architecture(directory: Path, config: RwkvRevConfig, original: Original) -> None:
    fields = (
        "rwkv_version",
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "bonus_is_exponential",
        *config.architecture.fields,
    )
    for name in fields:
        here, there = getattr(config, name), getattr(original.config, name)
        if here != there:
            raise RwkvRevError(
                f"{original.label} is not the original of {directory}: {name} is {there}, in the converted "
                f"model {here}; name another original, or {OWN_VALUES} {directory}"
            )


def _load(directory: Path) -> RwkvRevForCausalLM:
    with without_bars():
        model: RwkvRevForCausalLM = load_model(directory, "cpu", torch.float32).eval()
    return model


@torch.no_grad()
def _logits(model: RwkvRevForCausalLM, tokens: Tensor) -> Tensor:
    """``[T, V]`` of one forward over the whole text."""
    logits: Tensor = model(input_ids=tokens[None]).logits
    return logits[0]


def _describe(config: RwkvRevConfig) -> str:
    return (
        f"{config.architecture.called}, {config.num_hidden_layers} layers of {config.hidden_size}, "
        f"vocabulary {config.vocab_size}"
    )
