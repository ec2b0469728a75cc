"""The strategies against each other and against float64 back-propagation through the naive recurrence."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import geometric_mean

import pytest
import torch
from bptt_cases import (
    AS_CLOSE,
    VERSIONS,
    Outcome,
    assert_agree,
    assert_same_bits,
    differentiate,
    english,
    grouped_errors,
    load,
    naive_recomputed,
    random_like,
    random_state,
    random_tokens,
    relative_error,
    relative_errors,
    tiny_model,
)
from pairwise import every_two

from rwkv_rev import RwkvRevForCausalLM, RwkvRevState
from rwkv_rev.errors import StrategyError
from rwkv_rev.loss import IGNORE
from rwkv_rev.wkv import use_kernel

EXACT = ("full", "checkpoint", "reversible")
TWO_SWEEPS = ("checkpoint", "reversible")
LENGTH = 70
BUNDLED = ("4", "5.2", "6", "7")
WHOLE = ("4", "7")
"""Whose states are kept whole by either strategy, which then do the same."""
TEXTS = 4


# --- bundled checkpoints on real text ---------------------------------------------------------------------------


@dataclass
class Trained:
    """A trained model on a text, and what its gradients are held against."""

    model: RwkvRevForCausalLM
    wide: RwkvRevForCausalLM
    tokens: torch.Tensor
    truth: Outcome
    """``full`` in float64."""
    full: Outcome
    """In float32."""

    @classmethod
    def on(cls, directory: Path, length: int) -> "Trained":
        model, wide, tokens = load(directory), load(directory, torch.float64), english(length)
        truth, full = (differentiate(one, "full", input_ids=tokens) for one in (wide, model))
        return cls(model, wide, tokens, truth, full)

    def by(self, strategy: str, chunk: int) -> Outcome:
        return differentiate(self.model, strategy, chunk, input_ids=self.tokens)


@pytest.fixture(scope="module")
def trained(bundled: dict[str, Path]) -> Callable[[str], Trained]:
    """By version. The float64 truth is that of full back-propagation through the naive kernel."""

    @cache
    def of(version: str) -> Trained:
        found = Trained.on(bundled[version], LENGTH)
        with naive_recomputed():
            naive = differentiate(found.wide, "full", input_ids=found.tokens)
        assert max(relative_errors(found.truth.gradients, naive.gradients).values()) <= 1e-9
        return found

    return of


def over_several_texts(case: Trained, chunk: int) -> tuple[dict[str, float], dict[str, float]]:
    """RMS over texts of the errors of ``full`` and of ``reversible``, by kind of parameter.

    Of a single text the ratio of both is chance where few numbers make a gradient: of RWKV-7's ``rate_scale`` 0.6 to
    1.9 by the text, and as much between two ``full`` whose sub-chunks differ; over 24 texts it is 1.0 to 1.1.
    """
    model = case.model
    errors: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
    for text in english(case.tokens.shape[1], TEXTS):
        truth = differentiate(case.wide, "full", input_ids=text[None])
        for found, strategy in zip(errors, ("full", "reversible"), strict=True):
            outcome = differentiate(model, strategy, chunk, input_ids=text[None])
            found.append(grouped_errors(outcome.gradients, truth.gradients))
    least, found = ({group: rms([text[group] for text in by]) for group in by[0]} for by in errors)
    return least, found


def rms(values: list[float]) -> float:
    return math.hypot(*values) / math.sqrt(len(values))


@pytest.mark.parametrize("chunk", [30, 64])
@pytest.mark.parametrize("version", BUNDLED)
def test_bundled_checkpoints_on_real_text(
    trained: Callable[[str], Trained], version: str, chunk: int
) -> None:
    """Strategies agree to 1e-5, and are as close to float64 as ``full`` is; the two exact tapes agree to the bit.

    Where one kind of parameter is farther in this text, several texts say whether that is chance.
    """
    case = trained(version)
    truth, full = case.truth, case.full
    checkpoint, reversible = (case.by(strategy, chunk) for strategy in TWO_SWEEPS)

    assert_same_bits(reversible, checkpoint)
    assert_agree(reversible, full)
    least = grouped_errors(full.gradients, truth.gradients)
    found = grouped_errors(reversible.gradients, truth.gradients)
    if any(not error <= AS_CLOSE * least[group] for group, error in found.items()):
        least, found = over_several_texts(case, chunk)
    farther = {group for group, error in found.items() if not error <= AS_CLOSE * least[group]}
    assert not farther, {group: (found[group], least[group]) for group in farther}
    assert abs(reversible.loss.item() - truth.loss.item()) <= 1e-6 * truth.loss.item()
    assert_shorter_tape(reversible, checkpoint, version)


def assert_shorter_tape(reversible: Outcome, checkpoint: Outcome, version: str) -> None:
    assert (
        reversible.report["tape_bytes"] == 0
        or version in WHOLE
        or (reversible.report["tape_bytes"] < checkpoint.report["tape_bytes"])
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "length", "chunk"), [("4", 4096, 64), ("5.2", 4096, 256), ("6", 1100, 256), ("7", 4096, 1000)]
)
def test_long_texts(shallow: dict[str, Path], version: str, length: int, chunk: int) -> None:
    """Over thousands of tokens strategies agree as over fewer: nothing adds up from chunk to chunk."""
    case = Trained.on(shallow[version], length)
    reversible = case.by("reversible", chunk)
    if version not in WHOLE:
        checkpoint = case.by("checkpoint", chunk)
        assert_same_bits(reversible, checkpoint)
        assert_shorter_tape(reversible, checkpoint, version)
    assert_agree(reversible, case.full)
    found, least = (
        grouped_errors(outcome.gradients, case.truth.gradients)["all"] for outcome in (reversible, case.full)
    )
    assert found <= AS_CLOSE * least
    assert abs(reversible.loss.item() - case.truth.loss.item()) <= 1e-6 * case.truth.loss.item()


@pytest.mark.parametrize("version", BUNDLED)
def test_timestep_by_timestep(shallow: dict[str, Path], version: str) -> None:
    """C = 1, the single step of the EBRT papers."""
    model, tokens = load(shallow[version]), english(4)
    full = differentiate(model, "full", input_ids=tokens)
    reversible = differentiate(model, "reversible", 1, input_ids=tokens)
    assert_agree(reversible, full)
    assert_same_bits(reversible, differentiate(model, "checkpoint", 1, input_ids=tokens))


# --- tiny random models of every version ------------------------------------------------------------------------


def with_states(
    version: str, strategy: str, chunk: int | None, length: int
) -> tuple[Outcome, list[torch.Tensor | None]]:
    """Of an initial state with gradient, and a gradient arriving at the final one; and the gradient by the former."""
    model, tokens = tiny_model(version), random_tokens(length, batch=3)
    state = random_state(model, 3, learned=True)
    inputs = {"input_ids": tokens, "state": state, "final_state_gradient": random_like(state)}
    outcome = differentiate(model, strategy, chunk, **inputs)
    return outcome, [tensor.grad for tensor in state.tensors()]


@cache
def full_with_states(version: str, length: int) -> tuple[Outcome, list[torch.Tensor | None]]:
    return with_states(version, "full", None, length)


@pytest.mark.parametrize(
    ("version", "chunk"),
    [*((version, chunk) for version in VERSIONS for chunk in (5, 16)),
     *((version, chunk) for version in BUNDLED for chunk in (1, 64))],
)  # fmt: skip
def test_random_models(version: str, chunk: int) -> None:
    """Odd shapes, and states with gradients at both ends."""
    length = {1: 4, 5: 12}.get(chunk, 43)
    outcomes, by_state = {}, {}
    outcomes["full"], by_state["full"] = full_with_states(version, length)
    for strategy in TWO_SWEEPS:
        outcomes[strategy], by_state[strategy] = with_states(version, strategy, chunk, length)
    assert_same_bits(outcomes["reversible"], outcomes["checkpoint"])
    assert_agree(outcomes["reversible"], outcomes["full"])
    for found, twin, truth in zip(
        by_state["reversible"], by_state["checkpoint"], by_state["full"], strict=True
    ):
        assert found is not None and twin is not None and truth is not None
        assert truth.norm() > 0
        assert torch.equal(found, twin)
        assert relative_error(found, truth) <= 1e-5


@pytest.mark.parametrize("version", VERSIONS)
def test_random_models_against_float64(version: str) -> None:
    """No strategy is farther from the naive float64 scan than float32 is, by ``full`` or by the naive scan.

    In the geometric mean over texts: how a text happens to be rounded is another matter on every CPU.
    """
    truth_model, model = tiny_model(version, dtype=torch.float64), tiny_model(version)
    ratios: dict[str, list[float]] = {strategy: [] for strategy in TWO_SWEEPS}
    for seed in (1, 2, 3):
        tokens = random_tokens(34, batch=10, seed=seed)
        with use_kernel("naive"):
            truth, plain = (differentiate(one, "full", input_ids=tokens) for one in (truth_model, model))
        found = {name: differentiate(model, name, 16, input_ids=tokens) for name in ("full", *TWO_SWEEPS)}
        errors = {
            name: grouped_errors(outcome.gradients, truth.gradients)["all"]
            for name, outcome in (found | {"naive": plain}).items()
        }
        for strategy, of_texts in ratios.items():
            of_texts.append(errors[strategy] / max(errors["full"], errors["naive"]))
    for of_texts in ratios.values():
        assert geometric_mean(of_texts) <= AS_CLOSE, ratios


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("strategy", ["full", "reversible"])
def test_finite_differences(version: str, strategy: str) -> None:
    """The float64 gradient predicts how the loss changes along a random direction, state and embeddings included."""
    model = tiny_model(version, dtype=torch.float64)
    tokens, generator = random_tokens(16, batch=2), torch.Generator().manual_seed(5)
    state = random_state(model, 2, learned=True)
    outcome = differentiate(model, strategy, 6, input_ids=tokens, state=state)
    leaves = [*model.parameters(), *state.tensors()[: 3 if version != "4" else 2]]
    directions = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for leaf in leaves]
    slope = sum(float((leaf.grad * d).sum()) for leaf, d in zip(leaves, directions, strict=True))
    losses = []
    for sign in (1, -1):
        with torch.no_grad(), model.set_bptt("full"):
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf.add_(direction, alpha=sign * 1e-6)
            losses.append(model(tokens, labels=tokens, state=state).loss.item())
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf.sub_(direction, alpha=sign * 1e-6)
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)
    assert outcome.report["strategy"] == strategy


@pytest.mark.parametrize("version", VERSIONS)
def test_input_embeddings(version: str) -> None:
    """``inputs_embeds`` gets the gradient that ``full`` gives it."""
    model, labels = tiny_model(version), random_tokens(29, batch=2)
    gradients = {}
    for strategy in EXACT:
        embeds = torch.randn(2, 29, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        differentiate(model, strategy, 8, inputs_embeds=embeds, labels=labels)
        gradients[strategy] = embeds.grad
    assert torch.equal(gradients["reversible"], gradients["checkpoint"])
    assert relative_error(gradients["reversible"], gradients["full"]) <= 1e-5


@pytest.mark.parametrize("tape", ["host", "device", "disk"])
def test_tapes_give_the_same_bits(tape: str, tmp_path: Path) -> None:
    model, tokens = tiny_model("5.2"), random_tokens(25, batch=2)
    expected = differentiate(model, "checkpoint", 7, input_ids=tokens)
    with model.set_bptt("auto", tape=tape, tape_dir=str(tmp_path)):
        found = differentiate(model, "reversible", 7, input_ids=tokens)
    assert_same_bits(found, expected)
    assert list(tmp_path.iterdir()) == []


# --- masks and labels -------------------------------------------------------------------------------------------

ROW_LENGTHS = (37, 20, 3)
WIDTH, CUT = 41, 14
"""Three chunks, of which padding masks one altogether."""


def placed(padding: str, row: int, length: int) -> torch.Tensor:
    """Positions of a row's tokens within WIDTH."""
    if padding == "left":
        return torch.arange(WIDTH - length, WIDTH)
    if padding == "right":
        return torch.arange(length)
    generator = torch.Generator().manual_seed(row)
    return torch.randperm(WIDTH, generator=generator)[:length].sort().values


def padded_rows() -> list[torch.Tensor]:
    return [random_tokens(length, seed=row) for row, length in enumerate(ROW_LENGTHS)]


@cache
def rows_alone(version: str) -> list[Outcome]:
    """What ``full`` makes of each row by itself, from its row of the state."""
    model = tiny_model(version, dtype=torch.float64)
    states = random_state(model, len(ROW_LENGTHS))
    return [
        differentiate(
            model, "full", input_ids=tokens, num_items_in_batch=7, state=states.rows(torch.tensor([row]))
        )
        for row, tokens in enumerate(padded_rows())
    ]


@pytest.mark.parametrize(
    ("version", "strategy", "padding"), every_two(BUNDLED, EXACT, ("left", "right", "holes"))
)
def test_padded_rows_are_as_alone(version: str, strategy: str, padding: str) -> None:
    """Loss, gradient and final state of a row do not depend on its padding, its holes and its neighbours.

    Every two of a version, a strategy and a kind of padding meet.
    """
    tolerance = 1e-10
    model = tiny_model(version, dtype=torch.float64)
    count = len(ROW_LENGTHS)
    state = random_state(model, count)
    batch, mask = random_tokens(WIDTH, batch=count, seed=9), torch.zeros(count, WIDTH, dtype=torch.int64)
    for row, (length, tokens) in enumerate(zip(ROW_LENGTHS, padded_rows(), strict=True)):
        positions = placed(padding, row, length)
        batch[row, positions], mask[row, positions] = tokens[0], 1
    inputs = {"input_ids": batch, "attention_mask": mask, "num_items_in_batch": 7, "state": state}

    alone = rows_alone(version)
    for row in range(count):
        labels = torch.full_like(batch, IGNORE)
        labels[row] = batch[row]
        among = differentiate(model, strategy, CUT, labels=labels, **inputs)
        among.state = among.state.rows(torch.tensor([row]))
        assert_agree(among, alone[row], tolerance)

    together = differentiate(model, strategy, CUT, **inputs)
    assert relative_error(together.loss, sum(outcome.loss for outcome in alone)) <= tolerance
    for name, gradient in together.gradients.items():
        assert relative_error(gradient, sum(outcome.gradients[name] for outcome in alone)) <= tolerance


@pytest.mark.parametrize("strategy", EXACT)
def test_padding_contents_do_not_matter(strategy: str) -> None:
    """Other tokens and labels under the mask give the same bits."""
    model, tokens = tiny_model("5.2"), random_tokens(30, batch=2)
    mask = torch.ones_like(tokens)
    mask[0, :11], mask[1, 5:9] = 0, 0
    other = torch.where(mask.bool(), tokens, (tokens + 3) % 32)
    first = differentiate(model, strategy, 8, input_ids=tokens, attention_mask=mask)
    second = differentiate(model, strategy, 8, input_ids=other, attention_mask=mask)
    assert first.loss == second.loss
    for a, b in zip(first.state.tensors(), second.state.tensors(), strict=True):
        assert torch.equal(a, b)
    for name, gradient in first.gradients.items():
        assert torch.allclose(gradient, second.gradients[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("version", "strategy"),
    [*((version, "reversible") for version in BUNDLED),
     *((version, EXACT[i % 2]) for i, version in enumerate(BUNDLED))],
)  # fmt: skip
def test_an_empty_row_changes_nothing(version: str, strategy: str) -> None:
    """A row that is all padding keeps its state to the bit and adds nothing to the loss."""
    model, tokens = tiny_model(version), random_tokens(20, batch=2)
    state = random_state(model, 2)
    mask = torch.ones_like(tokens)
    mask[1] = 0
    found = differentiate(model, strategy, 8, input_ids=tokens, attention_mask=mask, state=state)
    alone = differentiate(model, strategy, 8, input_ids=tokens[:1], state=state.rows(torch.tensor([0])))
    assert relative_error(found.loss, alone.loss) <= 1e-6
    for after, before in zip(found.state.tensors(), state.tensors(), strict=True):
        assert relative_error(after[:, 1], before[:, 1]) <= 1e-7


@pytest.mark.parametrize("version", BUNDLED)
def test_a_chunk_without_labels(version: str) -> None:
    """Chunks whose labels are all -100 still carry gradient through, and give no NaN."""
    model, tokens = tiny_model(version), random_tokens(22)
    labels = tokens.clone()
    labels[:, :9] = IGNORE
    labels[:, 12:19] = IGNORE
    full = differentiate(model, "full", input_ids=tokens, labels=labels)
    for strategy in (*TWO_SWEEPS, "truncated"):
        found = differentiate(model, strategy, 6, input_ids=tokens, labels=labels)
        assert torch.isfinite(found.loss)
        assert all(gradient.isfinite().all() for gradient in found.gradients.values())
        if strategy != "truncated":
            assert_agree(found, full)


@pytest.mark.parametrize("strategy", [*EXACT, "truncated"])
def test_no_labels_at_all(strategy: str) -> None:
    """Every label -100: the loss is 0 and every gradient zero, none NaN."""
    model, tokens = tiny_model("5.2"), random_tokens(20)
    found = differentiate(model, strategy, 8, input_ids=tokens, labels=torch.full_like(tokens, IGNORE))
    assert found.loss == 0
    assert found.gradients.keys() == dict(model.named_parameters()).keys()
    assert all(not gradient.any() for gradient in found.gradients.values())


@pytest.mark.parametrize("strategy", [*EXACT, "truncated"])
def test_num_items_in_batch(strategy: str) -> None:
    """The trainer's own divisor, as a number or a tensor."""
    model, tokens = tiny_model("5.2"), random_tokens(20, batch=2)
    mean = differentiate(model, strategy, 8, input_ids=tokens)
    for number in (100, torch.tensor(100)):
        found = differentiate(model, strategy, 8, input_ids=tokens, num_items_in_batch=number)
        assert found.loss.item() == pytest.approx(mean.loss.item() * 38 / 100, rel=1e-6)
        assert relative_error(found.gradients["head.weight"], mean.gradients["head.weight"] * 38 / 100) < 1e-6


def test_final_state_gradient_alone() -> None:
    """A gradient that only arrives at the final state, no label anywhere: back-propagation of a state objective."""
    model, tokens = tiny_model("5.2"), random_tokens(20, batch=2)
    arriving = random_like(model.model.initial_state(2))
    labels = torch.full_like(tokens, IGNORE)
    inputs = {"input_ids": tokens, "labels": labels, "final_state_gradient": arriving}
    model.zero_grad()
    model(tokens).state.inner(arriving).backward()
    truth = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert "head.weight" not in truth
    for strategy in EXACT:
        found = differentiate(model, strategy, 8, **inputs)
        assert found.loss == 0
        for name, gradient in truth.items():
            assert relative_error(found.gradients[name], gradient) <= 1e-5


def test_chained_contexts() -> None:
    """Two contexts one after the other, joined by hand through the state's gradient, equal one context.

    The pieces share no prediction: the last token of the first piece predicts the first of the second.
    """
    model, tokens = tiny_model("5.1", dtype=torch.float64), random_tokens(33)
    labels = tokens.clone()
    labels[:, 17] = IGNORE
    whole = differentiate(model, "full", input_ids=tokens, labels=labels, num_items_in_batch=1)
    with torch.no_grad():
        middle = model(tokens[:, :17]).state
    state = RwkvRevState(*(tensor.requires_grad_() for tensor in middle.tensors()))
    second = differentiate(
        model, "reversible", 8, input_ids=tokens[:, 17:], state=state, num_items_in_batch=1
    )
    arriving = RwkvRevState(*(tensor.grad for tensor in state.tensors()))
    first = differentiate(
        model, "reversible", 8, input_ids=tokens[:, :17], num_items_in_batch=1, final_state_gradient=arriving
    )
    assert float(first.loss + second.loss) == pytest.approx(float(whole.loss), rel=1e-6)
    for name, gradient in whole.gradients.items():
        assert relative_error(first.gradients[name] + second.gradients[name], gradient) <= 1e-6


def test_frozen_parameters_get_no_gradient() -> None:
    model, tokens = tiny_model("5.2"), random_tokens(20)
    whole = differentiate(model, "reversible", 8, input_ids=tokens).gradients
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("receptance" in name)
    found = differentiate(model, "reversible", 8, input_ids=tokens).gradients
    assert found.keys() == {name for name in whole if "receptance" in name}
    for name, gradient in found.items():
        assert relative_error(gradient, whole[name]) <= 1e-6


def test_without_gradients_the_loss_streams() -> None:
    """Under ``no_grad`` the same loss and state, chunk by chunk, for every strategy."""
    model, tokens = tiny_model("5.2"), random_tokens(50, batch=2)
    expected = differentiate(model, "full", input_ids=tokens)
    for strategy in (*EXACT, "truncated", "auto"):
        with torch.no_grad(), model.set_bptt(strategy, chunk_length=8):
            output = model(tokens, labels=tokens)
        assert not output.loss.requires_grad
        assert relative_error(output.loss, expected.loss) <= 1e-6
        for found, state in zip(output.state.tensors(), expected.state.tensors(), strict=True):
            assert relative_error(found, state) <= 1e-5


def test_backward_twice_is_refused() -> None:
    model, tokens = tiny_model("5.2"), random_tokens(20)
    with model.set_bptt("reversible", chunk_length=8):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="call the model again"):
        loss.backward()


def test_the_loss_scales_and_adds() -> None:
    """The incoming gradient counts: a scaled loss, a sum of losses, a loss beside another term."""
    model, tokens = tiny_model("5.2"), random_tokens(20)
    once = differentiate(model, "reversible", 8, input_ids=tokens).gradients
    model.zero_grad()
    with model.set_bptt("reversible", chunk_length=8):
        total = 3 * model(tokens, labels=tokens).loss - model(tokens, labels=tokens).loss
    (total + model.head.weight.sum()).backward()
    for name, parameter in model.named_parameters():
        expected = 2 * once[name] + (1 if name == "head.weight" else 0)
        assert relative_error(parameter.grad, expected) <= 1e-5


# --- default, truncated, lossy ----------------------------------------------------------------------------------


def test_default_strategy() -> None:
    """``full`` up to one chunk, ``reversible`` above."""
    model = tiny_model("5.2", chunk_length=16)
    assert differentiate(model, "auto", input_ids=random_tokens(16)).report["strategy"] == "full"
    assert differentiate(model, "auto", input_ids=random_tokens(17)).report["strategy"] == "reversible"


@pytest.mark.parametrize("version", BUNDLED)
def test_truncated_is_another_gradient_and_says_so(version: str) -> None:
    model, tokens = tiny_model(version), random_tokens(24)
    full = differentiate(model, "full", input_ids=tokens)
    truncated = differentiate(model, "truncated", 8, input_ids=tokens)
    assert truncated.report["strategy"] == "truncated"
    assert relative_error(truncated.loss, full.loss) <= 1e-6
    assert grouped_errors(truncated.gradients, full.gradients)["all"] > 1e-3
    # one chunk: nothing to cut
    assert_agree(differentiate(model, "truncated", 24, input_ids=tokens), full)
    # what it is: the sum of the chunks' own gradients
    parts, state = [], None
    for start in range(0, 24, 8):
        labels = tokens[:, start : start + 9].clone()
        piece = torch.full((1, 24), IGNORE)
        piece[:, start : start + labels.shape[1]] = labels
        piece[:, start] = IGNORE
        model.zero_grad()
        output = model(tokens[:, start : start + 8], state=state)
        state = output.state.detach()
        targets = tokens[:, start + 1 : start + 9]
        logits = output.logits[:, : targets.shape[1]]
        loss = (
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / 23
        )
        loss.backward()
        parts.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in truncated.gradients.items():
        assert relative_error(gradient, sum(part[name] for part in parts)) <= 1e-5


def slow_decay(model: RwkvRevForCausalLM, log_bits: float) -> RwkvRevForCausalLM:
    """Set every decay so that a step forgets 2**log_bits bits."""
    with torch.no_grad():
        for cell in (block.time_mix for block in model.blocks):
            # bits = exp(time_decay) / log 2
            value = (2**log_bits * torch.log(torch.tensor(2.0))).log().item()
            if model.config.rwkv_version == "6":
                cell.decay_up.weight.zero_()
                cell.decay_base.fill_(value)
            else:
                cell.time_decay.fill_(value)
    return model


@pytest.mark.parametrize("version", ["5.2", "6"])
def test_lossy_reports_its_drift(version: str) -> None:
    """On decays slow enough plain division works, nearly; its drift stands in the report."""
    model, tokens = tiny_model(version), random_tokens(72)
    lossy = [
        differentiate(slow_decay(model, log_bits), "reversible-lossy", 8, input_ids=tokens)
        for log_bits in (-2, -1)
    ]
    # where decays are none of the weights', of the chunks that are divided back
    bits = 14 if version == "6" else 18
    assert lossy[0].report["predicted_bits_lost"] == pytest.approx(bits, rel=1e-4)
    drifts = [outcome.report["drift"] for outcome in lossy]
    assert 0 < drifts[0] < 1e-9
    assert drifts[1] > 1e-9, "36 bits of 52 lost must show"
    assert_agree(lossy[0], differentiate(slow_decay(model, -2), "full", input_ids=tokens))


def test_lossy_refuses_what_would_be_noise() -> None:
    model, tokens = slow_decay(tiny_model("5.2"), -2), random_tokens(256)
    with pytest.raises(StrategyError, match=r"64 bits over 256 tokens.*'reversible'"):
        differentiate(model, "reversible-lossy", 16, input_ids=tokens)
    with pytest.raises(StrategyError, match=r"56 bits over 256 tokens.*'reversible'"):
        differentiate(slow_decay(tiny_model("6"), -2), "reversible-lossy", 16, input_ids=tokens)
    # the first chunk's state is given, the last one's is what is divided: of two chunks nothing is lost
    outcome = differentiate(slow_decay(tiny_model("6"), -2), "reversible-lossy", 128, input_ids=tokens)
    assert outcome.report["predicted_bits_lost"] == 0
    with pytest.raises(StrategyError, match=r"RWKV-5.*'reversible'"):
        differentiate(tiny_model("4"), "reversible-lossy", 16, input_ids=tokens)
    with pytest.raises(
        StrategyError, match=r"RWKV-7, whose transition is not elementwise and can be singular"
    ):
        differentiate(tiny_model("7"), "reversible-lossy", 16, input_ids=tokens)


@pytest.mark.parametrize("version", ["5.2", "6"])
def test_lossy_on_the_bundled_checkpoint_refuses(bundled: dict[str, Path], version: str) -> None:
    """A trained model forgets more than float64 holds within a few hundred tokens."""
    with pytest.raises(StrategyError, match="'reversible'"):
        differentiate(load(bundled[version]), "reversible-lossy", 64, input_ids=english(512))
