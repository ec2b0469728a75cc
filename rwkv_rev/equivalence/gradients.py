"""Every gradient strategy against float64: full back-propagation through the naive scan, the only oracle.

The reference is the same model in float64 with ``wkv`` scanned token by token and one graph over the whole context.
The question is posed at its hardest: the state before the first token is not empty, its gradient is compared too,
and a gradient arrives at the state after the last token. Two errors per tensor: relative RMS,
``||g - g64|| / ||g64||``, and the largest deviation relative to the largest element of g64. A group of parameters
reports its worst tensor.

What must hold: ``checkpoint`` and ``reversible`` give the gradient of ``full`` up to :data:`AGREEMENT`, their losses
are equal to the bit, and they are as close to float64 as ``full`` in float32 is: within a factor :data:`FACTOR` over
all tensors (root mean square of their relative errors) and in every group, plus a rounding error's worth
(:data:`OVERALL_FLOOR`; :data:`FLOOR` for groups, whose few tensors scatter more). Where one does not, it may be
rounding, and float64 decides: there it is within :data:`AGREEMENT` of the truth, or within :data:`GRID` of ``full``'s
error in float32; and in float32 it is at most :data:`.NOISE_FACTOR` times as far off as ``full``.
``truncated`` and ``reversible-lossy`` are shown beside them; the first is not the gradient of the context.

Cost: the naive scan in float64, a Python step per token; layers are recomputed one at a time in its backward pass, so
that one layer's states over the whole context are in memory at once.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.equivalence.reversal import chunk_for
from rwkv_rev.equivalence.tolerance import NOISE_FACTOR
from rwkv_rev.errors import StrategyError
from rwkv_rev.json_text import finite
from rwkv_rev.modeling import RwkvRevForCausalLM
from rwkv_rev.state import ModelState
from rwkv_rev.tables import aligned, wrapped
from rwkv_rev.wkv import use_kernel

CONTEXT = 512
CHUNK = 96
AGREEMENT = 1e-5
FACTOR = 1.5
FLOOR = 2e-6
"""Relative error of a group that is rounding in any case: 16 units of float32."""
OVERALL_FLOOR = 5e-7
"""The same over all tensors, 4 units: gradients summed over very many chunks round as often."""
GRID = 1 / 16
"""Rounding of boundary states on a grid of 2^-27 of the largest, which lifted ones have in float64 too, in terms of
float32's 2^-24."""
STRATEGIES = ("full", "checkpoint", "reversible", "reversible-lossy", "truncated")
EXACT = ("checkpoint", "reversible")
GROUPS = (
    "embeddings",
    "mixes",
    "decay",
    "bonus",
    "projections",
    "norms",
    "head",
    "initial state",
)
REMARKS = {"truncated": "not the full gradient", "reversible-lossy": "approximate"}


@dataclass(frozen=True)
class GroupError:
    """Worst tensor of a group: relative RMS error, largest deviation (both relative), and its name."""

    rms: float
    largest: float
    tensor: str


@dataclass(frozen=True)
class StrategyGradients:
    """What one strategy gave.

    Attributes:
        name: of the strategy.
        loss: its loss; None if it refused.
        overall: root mean square of all tensors' relative errors against float64.
        errors: per group, against float64.
        from_full: largest relative RMS distance of a tensor from ``full``'s gradient.
        refusal: why it would not run.
        failure: which of the promises it broke; None for strategies that make none.
        in_float64: the largest relative RMS distance of a tensor from the reference when the strategy itself runs in
            float64; None where nobody asked.
    """

    name: str
    loss: float | None = None
    overall: float | None = None
    errors: dict[str, GroupError] | None = None
    from_full: float | None = None
    refusal: str | None = None
    failure: str | None = None
    in_float64: float | None = None


@dataclass(frozen=True)
class GradientCheck:
    """Outcome of :func:`check_gradients`; lengths in tokens."""

    context: int
    chunk: int
    strategies: tuple[StrategyGradients, ...]

    @property
    def passed(self) -> bool:
        """No strategy broke a promise."""
        return all(strategy.failure is None for strategy in self.strategies)

    @property
    def failure(self) -> str | None:
        """The first broken promise, in words."""
        return next((f"{s.name}: {s.failure}" for s in self.strategies if s.failure is not None), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; figures that are not finite become None."""
        return {
            "passed": self.passed,
            "context": self.context,
            "chunk": self.chunk,
            "reference": "float64, naive scan, full back-propagation",
            "strategies": [
                {
                    "strategy": s.name,
                    "loss": finite(s.loss),
                    "rms": finite(s.overall),
                    "relative_distance_from_full": finite(s.from_full),
                    "groups": {
                        group: {
                            "rms": finite(e.rms),
                            "largest": finite(e.largest),
                            "worst_tensor": e.tensor,
                        }
                        for group, e in (s.errors or {}).items()
                    },
                    "relative_error_in_float64": finite(s.in_float64),
                    "remark": REMARKS.get(s.name),
                    "refusal": s.refusal,
                    "failure": s.failure,
                }
                for s in self.strategies
            ],
        }

    def lines(self) -> list[str]:
        """The section for people."""
        ran = [s for s in self.strategies if s.errors is not None]
        header = ["relative RMS / largest", *(s.name for s in ran)]
        rows = [
            [group, *(_pair(s.errors[group]) if s.errors is not None else "" for s in ran)]
            for group in GROUPS
            if any(s.errors is not None and group in s.errors for s in ran)
        ]
        rows.append(["all tensors", *(_short(s.overall) for s in ran)])
        rows.append(["distance from full", *(_short(s.from_full) for s in ran)])
        verdicts = [REMARKS.get(s.name, "FAIL" if s.failure else "PASS") for s in ran]
        rows.append(["", *("-" if s.name == "full" else v for s, v in zip(ran, verdicts, strict=True))])
        table = aligned(header, rows)
        prose = [
            f"{s.name}: {s.from_full:.1e} from full is rounding; in float64 it is {s.in_float64:.1e} from the truth"
            for s in self.strategies
            if s.in_float64 is not None and s.failure is None
        ]
        prose += [
            f"{s.name}: not run: {s.refusal.removeprefix(f'{s.name} ')}"
            for s in self.strategies
            if s.refusal is not None
        ]
        if self.failure is not None:
            prose.append(f"gradients: FAIL, {self.failure}")
        title = (
            f"gradients over {self.context:,} tokens in chunks of {self.chunk:,}, non-zero initial state, gradient at "
            "the final state; error against float64 back-propagation through the naive scan"
        )
        return [*wrapped(title), *table, *(line for text in prose for line in wrapped(text))]


def check_gradients(model: RwkvRevForCausalLM, ids: Tensor, *, chunk: int | None = None) -> GradientCheck:
    """Compare every strategy's gradient with float64 over the text ``ids`` [T].

    Args:
        model: float32, in eval mode; left as it was.
        chunk: C; :data:`CHUNK`, or a quarter of a shorter text, when None.
    """
    context = len(ids)
    chunk = chunk_for(context, chunk, CHUNK)
    with torch.no_grad():
        state = model(input_ids=ids[None]).state  # reading the text a second time
    arriving = _some_gradient(state)
    reference = _reference(model, ids, state, arriving)
    found: dict[str, tuple[float, dict[str, Tensor]]] = {}
    refusals = {}
    for name in STRATEGIES:
        length = context if name == "full" else chunk
        try:
            with model.set_bptt(name, chunk_length=length, tape="host"):
                found[name] = _gradients(model, ids, state, arriving)
        except StrategyError as refusal:
            refusals[name] = str(refusal)
    errors = {name: _group_errors(gradients, reference) for name, (_, gradients) in found.items()}
    overall = {name: _overall(gradients, reference) for name, (_, gradients) in found.items()}
    full = found["full"][1]
    strategies = []
    for name in STRATEGIES:
        if name in refusals:
            strategies.append(StrategyGradients(name, refusal=refusals[name]))
            continue
        loss, gradients = found[name]
        distance = max(_relative(gradients[tensor], full[tensor])[0] for tensor in full)
        failure, in_float64 = None, None
        if name in EXACT:
            figures = overall[name], overall["full"], errors[name], errors["full"]
            failure = _broken_promise(distance, *figures, agreement=AGREEMENT)
            rounding = max(error.rms for error in errors["full"].values())
            if failure is not None:
                with model.set_bptt(name, chunk_length=chunk, tape="host"):
                    wide = _float64_gradients(model, ids, state, arriving)
                in_float64 = max(_relative(wide[tensor], reference[tensor])[0] for tensor in reference)
                failure = _broken_promise(
                    in_float64,
                    *figures,
                    agreement=max(AGREEMENT, GRID * rounding),
                    factor=NOISE_FACTOR,
                    truth="the truth in float64",
                )
            if failure is None and loss != found[EXACT[0]][0]:
                failure = f"the loss {loss} is not that of {EXACT[0]}, {found[EXACT[0]][0]}"
        elif name == "full" and not all(math.isfinite(e.rms) for e in errors[name].values()):
            failure = "the gradient is not finite"
        strategies.append(
            StrategyGradients(
                name, loss, overall[name], errors[name], distance, failure=failure, in_float64=in_float64
            )
        )
    return GradientCheck(context, chunk, tuple(strategies))


def group_of(name: str) -> str:
    """The group of :data:`GROUPS` that a parameter of a converted model belongs to."""
    last = name.split(".")[-1]
    if name.startswith("model.embeddings."):
        return "embeddings"
    if name.startswith("head."):
        return "head"
    if name.startswith("state."):
        return "initial state"
    if last.startswith("mix_"):
        return "mixes"
    if "decay" in last or last == "bonus":
        return "bonus" if last == "bonus" else "decay"
    return "norms" if ".ln" in name else "projections"


def _gradients(
    model: RwkvRevForCausalLM, ids: Tensor, state: ModelState, arriving: ModelState
) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the gradient by every parameter and by the initial state, under the model's setting."""
    start = state.each(lambda tensor: tensor.detach().requires_grad_())
    leaves: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    leaves |= {f"state.{name}": tensor for name, tensor in zip(start.names(), start.tensors(), strict=True)}
    with torch.enable_grad():
        loss = model(input_ids=ids[None], labels=ids[None], state=start, final_state_gradient=arriving).loss
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return float(loss.detach()), {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }


def _reference(
    model: RwkvRevForCausalLM, ids: Tensor, state: ModelState, arriving: ModelState
) -> dict[str, Tensor]:
    """Gradients of the float64 model through the naive scan."""
    with use_kernel("naive"), model.set_bptt("full"):
        return _float64_gradients(model, ids, state, arriving, recomputed=True)


def _float64_gradients(
    model: RwkvRevForCausalLM,
    ids: Tensor,
    state: ModelState,
    arriving: ModelState,
    *,
    recomputed: bool = False,
) -> dict[str, Tensor]:
    """:func:`_gradients` of a float64 copy of the model; its layers one at a time if ``recomputed``."""
    wide = copy.deepcopy(model).double()
    if recomputed:
        wide._set_gradient_checkpointing()
        wide.train()  # layers are recomputed in training mode only; there is no dropout
    return _gradients(
        wide,
        ids,
        state.each(Tensor.double),
        arriving.each(Tensor.double),
    )[1]


def _some_gradient(state: ModelState) -> ModelState:
    """A gradient for the final state, random from a fixed seed, whose inner product with it is of order one."""
    generator = torch.Generator().manual_seed(0)
    return state.each(
        lambda tensor: (
            torch.randn(tensor.shape, generator=generator).to(tensor) / tensor.norm().clamp(min=1e-30)
        )
    )


def _group_errors(gradients: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, GroupError]:
    worst: dict[str, GroupError] = {}
    for name, exact in reference.items():
        rms, largest = _relative(gradients[name], exact)
        group = group_of(name)
        if group not in worst:
            worst[group] = GroupError(rms, largest, name)
        elif not rms <= worst[group].rms:  # NaN is worse than any number
            worst[group] = GroupError(rms, max(largest, worst[group].largest), name)
        else:
            worst[group] = GroupError(
                worst[group].rms, max(largest, worst[group].largest), worst[group].tensor
            )
    return {group: worst[group] for group in GROUPS if group in worst}


def _overall(gradients: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    squares = [_relative(gradients[name], exact)[0] ** 2 for name, exact in reference.items()]
    return math.sqrt(math.fsum(squares) / len(squares)) if all(map(math.isfinite, squares)) else math.nan


def _relative(gradient: Tensor, exact: Tensor) -> tuple[float, float]:
    """Relative RMS and largest deviation, 0 where both are zero; what ``gradient``'s format cannot hold is zero."""
    floor = torch.finfo(gradient.dtype).tiny
    found, exact = (g.double().masked_fill(g.abs() < floor, 0.0) for g in (gradient, exact))
    difference = found - exact
    smallest = torch.finfo(torch.float64).tiny
    rms = difference.norm() / exact.norm().clamp(min=smallest)
    return float(rms), float(difference.abs().max() / exact.abs().max().clamp(min=smallest))


def _broken_promise(
    distance: float,
    overall: float,
    overall_of_full: float,
    errors: dict[str, GroupError],
    of_full: dict[str, GroupError],
    *,
    agreement: float,
    factor: float = FACTOR,
    truth: str = "full's",
) -> str | None:
    if not distance <= agreement:
        return f"the gradient is {distance:.1e} from {truth}, more than {agreement:.0e}"
    if not overall <= factor * overall_of_full + OVERALL_FLOOR:
        return f"the gradient is {overall:.1e} from float64, full's only {overall_of_full:.1e}"
    for group, error in errors.items():
        full = of_full[group].rms
        if not error.rms <= factor * full + FLOOR:
            return f"{group} ({error.tensor}) differ by {error.rms:.1e} from float64, full only by {full:.1e}"
    return None


def _pair(error: GroupError) -> str:
    return f"{_short(error.rms)} / {_short(error.largest)}"


def _short(value: float | None) -> str:
    """``1.2e-6``."""
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+")
