"""Models, cases and comparisons for the tests against the independent oracle.

Tests import it as ``from oracle_cases import Question``.
"""

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from bptt_cases import english, load, relative_error
from foreign import blinkdl_state_dict
from oracle import IGNORE, PARTS, PUBLISHED_GROUP_NORM, Answer, Case, State, solve
from torch import Tensor

import rwkv_rev
from rwkv_rev import RwkvRevForCausalLM, RwkvRevState

ROWS, LENGTH = 3, 16
MAPS_OF_7 = {"decay": "w", "rate": "a", "residual": "v", "gate": "g"}
OF_7 = {
    **{f".mix_before_{name}": f".x_{name[0]}" for name in ("receptance", "key", "value", "gate")},
    **{".mix_before_decay": ".x_w", ".mix_before_rate": ".x_a", ".bonus": ".r_k"},
    **{".removal_scale": ".k_k", ".rate_scale": ".k_a"},
    **{f".{name}_{part}": f".{letter}{place}" for name, letter in MAPS_OF_7.items()
       for part, place in (("base", 0), ("down.weight", 1), ("up.weight", 2))},
}  # fmt: skip
"""Ours in RWKV-7's blocks, and what the original calls them."""
MIXES_OF_6 = ("decay", "key", "value", "receptance", "gate")
OF_6 = {
    ".mix_before_input": ".time_maa_x",
    **{f".mix_before_{name}": f".time_maa_{'w' if name == 'decay' else name[0]}" for name in MIXES_OF_6},
    **{
        ".decay_base": ".time_decay",
        ".decay_down.weight": ".time_decay_w1",
        ".decay_up.weight": ".time_decay_w2",
    },
    ".bonus": ".time_faaaa",
}
"""The same of RWKV-6, but for the low-rank maps of its mixes, which lie in one tensor."""
MASKS = ("none", "left", "right", "holes", "documents", "empty row")
LABELS = ("all", "prompt", "scattered", "one", "trailing")
STATES = ("none", "given", "given, with objective")


# --- models -----------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """Original tensors, and the models converted from their file."""

    tensors: dict[str, Tensor]
    float32: RwkvRevForCausalLM
    float64: RwkvRevForCausalLM
    group_norm: tuple[float, float]

    @cached_property
    def given(self) -> State:
        """The state after some text, the same in all cases, in values that float32 holds."""
        before = english(20, batch=ROWS)[:, 10:]
        state = solve(self.tensors, Case(before, before, group_norm=self.group_norm)).state
        return State(*(part.float() for part in state.tensors()))


def make(name: str, folder: Path) -> Subject:
    """``VERSION [BONUS]`` is random; ``bundled VERSION`` and ``peer VERSION`` are trained.

    ``, LAYERS layers`` behind the name of a trained one: its lowest.
    """
    name, _, layers = name.partition(", ")
    kind, _, version = name.partition(" ")
    group_norm, epsilon = PUBLISHED_GROUP_NORM, None
    path = folder / "original.pth"
    if kind == "peer":
        path = peer_path(version)
        if version == "5.2":  # made without the division by 8
            group_norm, epsilon = (1e-5, 1.0), 1e-5
    elif kind == "bundled":
        path = bundled_path(version)
    else:
        bonus = "time_first" if name == "5.0" else "time_faaaa"
        torch.save(blinkdl_state_dict(kind, bonus=bonus, vocab=256), path)
    if layers:
        trained = torch.load(path, weights_only=True)
        higher = tuple(f"blocks.{layer}." for layer in range(int(layers.split()[0]), 100))
        kept = {key: tensor for key, tensor in trained.items() if not key.startswith(higher)}
        torch.save(kept, path := folder / "original.pth")
    rwkv_rev.convert(path, folder / "model", group_norm_eps=epsilon)
    model = load(folder / "model")
    return Subject(torch.load(path, weights_only=True), model, copy.deepcopy(model).double(), group_norm)


def bundled_path(version: str) -> Path:
    return Path(str(files("rwkv_rev.bundled") / f"rwkv-{version}.pth"))


def peer_path(version: str) -> Path:
    names = {"4": "tiny-rwkv-4v0-660K.pth", "5.2": "tiny-rwkv-5v2-730K.pth", "7": "tiny-rwkv-7v0-834K.pth"}
    name = names[version]
    path = Path(__file__).parents[2] / "shared" / "peer" / name
    if not path.exists():
        pytest.skip("needs the peers' checkpoints")
    return path


def original_name(model: RwkvRevForCausalLM, name: str) -> str:
    """What the original calls the parameter that the model calls ``name``."""
    name = name.replace("model.ln0.", "blocks.0.ln0.").replace("model.embeddings.", "emb.")
    name = name.removeprefix("model.").replace(".time_mix.", ".att.").replace(".channel_mix.", ".ffn.")
    if model.config.rwkv_version in ("6", "7"):
        for ours, theirs in (OF_6 if model.config.rwkv_version == "6" else OF_7).items():
            name = name.replace(ours, theirs)
        return name
    for mix in ("key", "value", "receptance", "gate"):
        name = name.replace(f".mix_{mix}", f".time_mix_{mix[0]}")
    exponential = model.config.rwkv_version == "4" or model.config.bonus_is_exponential
    return name.replace(".bonus", ".time_first" if exponential else ".time_faaaa")


# --- cases ------------------------------------------------------------------------------------------------------


def mask_of(kind: str, length: int) -> Tensor | None:
    """[ROWS, length] bool."""
    if kind == "none":
        return None
    valid = torch.ones(ROWS, length, dtype=torch.bool)
    for row, padding in enumerate((0, 3, length // 2)):
        if kind == "left":
            valid[row, :padding] = False
        elif kind == "right":
            valid[row, length - padding :] = False
    if kind == "holes":
        valid = torch.rand(valid.shape, generator=seeded(1)) < 0.7
    elif kind == "documents":  # one token; padded on both sides; a hole longer than a chunk
        valid[0, 1:] = False
        valid[1, :2] = valid[1, -5:] = False
        valid[2, 4:13] = False
    elif kind == "empty row":
        valid[1] = False
    return valid


def labels_of(kind: str, tokens: Tensor, valid: Tensor | None) -> Tensor:
    """[ROWS, T], not shifted."""
    labels, length = tokens.clone(), tokens.shape[1]
    if kind == "prompt":
        labels[:, : length // 3] = IGNORE
    elif kind == "scattered":
        labels[torch.rand(labels.shape, generator=seeded(2)) < 0.5] = IGNORE
    elif kind == "trailing":  # none in the last chunk, nor in the one before if chunks are short
        labels[:, length - 7 :] = IGNORE
    elif kind == "one":  # two tokens before the end of the last row, and not what the text says
        labels[:] = IGNORE
        places = range(length) if valid is None else valid[2].nonzero()[:, 0].tolist()
        labels[2, places[-3]] = 7
    return labels


def case_of(
    subject: Subject,
    mask: str,
    labels: str,
    state: str,
    *,
    embedded: bool = False,
    divisor: float | None = None,
    length: int = LENGTH,
) -> Case:
    """A case in values that float32 holds."""
    tokens = english(length + 20, batch=ROWS)[:, 20:]
    valid = mask_of(mask, length)
    case = Case(labels_of(labels, tokens, valid), tokens, valid=valid, group_norm=subject.group_norm)
    if embedded:
        embeds = subject.tensors["emb.weight"].float()[tokens]
        embeds += 0.1 * embeds.std() * torch.randn(embeds.shape, generator=seeded(3))
        case = replace(case, tokens=None, embeds=embeds)
    if state != "none":
        case = replace(case, state=subject.given)
        if state == "given, with objective":
            arriving = [
                0.1 * torch.randn(part.shape, generator=seeded(4)) for part in subject.given.tensors()
            ]
            case = replace(case, final_objective=State(*arriving))
    return replace(case, divisor=divisor)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- answers ----------------------------------------------------------------------------------------------------


class Question:
    """A case with the oracle's answer, computed once for all strategies."""

    def __init__(self, subject: Subject, case: Case) -> None:
        self.subject, self.case = subject, case
        self.answer = solve(subject.tensors, case)
        self.gradients = named(self.answer)
        self.size = total_norm(self.gradients)

    @cached_property
    def noise(self) -> dict[str, float]:
        """By gradient, what float32 makes of it: weights changed by up to half an ulp, and the oracle in float32.

        At least the share that a tensor has in the change of the whole gradient, as one draw may be a lucky one.
        """
        tensors = self.subject.tensors
        squares = dict.fromkeys(self.gradients, 0.0)
        for answer in [
            solve(nudged(tensors, seed=5), self.case),
            solve(nudged(tensors, seed=6), self.case),
            solve(tensors, self.case, torch.float32),
        ]:
            for name, gradient in named(answer).items():
                squares[name] += float((gradient.double() - self.gradients[name]).square().sum())
        relative = sum(squares.values()) ** 0.5 / self.size
        return {
            name: max(squares[name] ** 0.5, relative * float(gradient.norm()))
            for name, gradient in self.gradients.items()
        }

    def check(self, strategy: str, chunk: int, bounds: "Bounds", dtype: torch.dtype = torch.float32) -> None:
        """Ask the model, and hold what it says to the oracle's answer."""
        model = self.subject.float64 if dtype == torch.float64 else self.subject.float32
        self.compare(ask(model, self.case, strategy, chunk), bounds)

    def compare(self, found: Answer, bounds: "Bounds") -> None:
        """Hold an answer to the oracle's."""
        truth = self.answer
        assert abs(found.loss - truth.loss) <= bounds.loss * max(truth.loss, 0.1)
        for mine, theirs in zip(found.state.quantities(), truth.state.quantities(), strict=True):
            assert relative_error(mine, theirs) <= bounds.state
        gradients = named(found)
        assert gradients.keys() == self.gradients.keys()
        differences = {name: gradients[name].double() - theirs for name, theirs in self.gradients.items()}
        error = total_norm(differences)
        assert error <= self.allowed(bounds.overall * self.size, error, bounds, *differences), (
            error / self.size
        )
        for name, difference in differences.items():
            error, size = float(difference.norm()), float(self.gradients[name].norm())
            strict = bounds.each * size + UNDERFLOW * self.size
            assert error <= self.allowed(strict, error, bounds, name), (name, error / size)

    def allowed(self, strict: float, error: float, bounds: "Bounds", *names: str) -> float:
        """``strict``; in a case that is conditioned worse, what such roundings do to the oracle's own gradient."""
        if error <= strict or not bounds.rounding:
            return strict
        noise = sum(self.noise[name] ** 2 for name in names) ** 0.5
        return max(strict, AS_CLOSE * noise * bounds.rounding / HALF_ULP)


HALF_ULP = 2.0**-24
AS_CLOSE = 8
"""How much farther from the truth than float32's noise a badly conditioned gradient may be."""

UNDERFLOW = 1e-30
"""Of the whole gradient: what lies below it may be lost in float32."""


@dataclass(frozen=True)
class Bounds:
    """Largest relative errors: of the loss, the final state, the whole gradient, and each tensor's.

    Attributes:
        rounding: relative rounding error of the arithmetic; 0 where a case's condition is no excuse.
    """

    loss: float
    state: float
    overall: float
    each: float
    rounding: float = 0.0


FLOAT32 = Bounds(5e-7, 5e-6, overall=2e-6, each=1e-5, rounding=HALF_ULP)
FLOAT64 = Bounds(1e-12, 1e-12, overall=1e-11, each=1e-10)
LOSSY = Bounds(1e-6, 1e-6, overall=2e-6, each=2e-5)


def ask(model: RwkvRevForCausalLM, case: Case, strategy: str, chunk: int) -> Answer:
    """What :func:`oracle.solve` answers, from the model."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.to(model.dtype, copy=True).requires_grad_()

    given = None if case.state is None else RwkvRevState(*map(leaf, case.state.tensors()))
    embeds = None if case.embeds is None else leaf(case.embeds)
    objective = case.final_objective
    model.zero_grad()
    with model.set_bptt(strategy, chunk_length=chunk):
        output = model(
            input_ids=case.tokens,
            inputs_embeds=embeds,
            attention_mask=None if case.valid is None else case.valid.long(),
            labels=case.labels,
            state=given,
            num_items_in_batch=case.divisor,
            loss_weights=case.weights,
            final_state_gradient=None
            if objective is None
            else RwkvRevState(*(part.to(model.dtype) for part in objective.tensors())),
        )
    output.loss.backward()

    def gradient(tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad

    gradients = {
        # low-rank maps lie transposed
        original_name(model, name): gradient(p).mT
        if name.endswith(("_down.weight", "_up.weight"))
        else gradient(p)
        for name, p in model.named_parameters()
    }
    return Answer(
        output.loss.item(),
        State(*output.state.tensors()),
        joined_of_6(gradients) if model.config.rwkv_version == "6" else gradients,
        {} if given is None else dict(zip(PARTS, map(gradient, given.tensors()), strict=True)),
        None if embeds is None else gradient(embeds),
    )


def joined_of_6(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the low-rank maps of the mixes in one tensor, as the original has them."""
    for att in sorted({name.split(".att.")[0] + ".att" for name in found if "_mix_down" in name}):
        down = [found.pop(f"{att}.{name}_mix_down.weight") for name in MIXES_OF_6]
        up = [found.pop(f"{att}.{name}_mix_up.weight") for name in MIXES_OF_6]
        found[f"{att}.time_maa_w1"], found[f"{att}.time_maa_w2"] = torch.cat(down, 1), torch.stack(up)
    return found


def nudged(tensors: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The tensors with every number changed by up to half a float32 ulp."""
    generator = seeded(seed)

    def nudge(tensor: Tensor) -> Tensor:
        return tensor.double() * (1 + HALF_ULP * (2 * torch.rand(tensor.shape, generator=generator) - 1))

    return {name: nudge(tensor) for name, tensor in tensors.items()}


def named(answer: Answer) -> dict[str, Tensor]:
    """All gradients of an answer, flat, by name."""
    found = answer.gradients | {f"state {part}": gradient for part, gradient in answer.by_state.items()}
    if answer.by_embeds is not None:
        found["embeds"] = answer.by_embeds
    return {name: gradient.flatten() for name, gradient in found.items()}


def total_norm(tensors: dict[str, Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors.values()) ** 0.5
