"""What may be given to a loss: tensors with several roles, embeddings, labels, odd shapes and numbers."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import (
    Outcome,
    assert_agree,
    differentiate,
    grouped_errors,
    load,
    random_like,
    random_state,
    random_tokens,
    relative_error,
    relative_errors,
    tiny_model,
)
from pairwise import every_two
from torch import Tensor, nn

import rwkv_rev
from rwkv_rev import RwkvRevForCausalLM, RwkvRevState
from rwkv_rev.bptt import STRATEGIES, LossInputs

CHUNK = 8
EXACT = ("full", "auto", "checkpoint", "reversible")
AGREE = 1e-10
"""In float64."""


def gradients_of(
    model: RwkvRevForCausalLM, strategy: str, wanted: list[Tensor], *, factor: float = 1.0, **inputs: Any
) -> tuple[Tensor, list[Tensor]]:
    with model.set_bptt(strategy, chunk_length=CHUNK):
        loss = model(**inputs).loss
    return loss.detach(), list(torch.autograd.grad(factor * loss, wanted))


# --- one tensor, several roles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "factor", "version"),
    every_two(["auto", "checkpoint", "reversible"], [1.0, 0.25, 4.0], ["4", "5.2"]),
)
def test_one_tensor_as_both_shifts(version: str, strategy: str, factor: float) -> None:
    model, ids = tiny_model(version, dtype=torch.float64), random_tokens(27, batch=2)
    state = random_state(model, 2)
    shift = state.time_shift.clone().requires_grad_()
    inputs = {"input_ids": ids, "labels": ids, "state": RwkvRevState(shift, shift, state.wkv)}
    _, (expected,) = gradients_of(model, "full", [shift], factor=factor, **inputs)
    _, (found,) = gradients_of(model, strategy, [shift], factor=factor, **inputs)
    assert relative_error(found, expected) <= AGREE


@pytest.mark.parametrize(
    ("strategy", "role", "factor"),
    every_two(
        ["auto", "checkpoint", "reversible", "truncated"], ["state", "inputs_embeds", "both"], [1.0, 0.25]
    ),
)
def test_a_parameter_that_is_given_as_an_input(role: str, strategy: str, factor: float) -> None:
    """It is a parameter of the model, of which nothing else is made, and it is the state or the embeddings."""
    model = tiny_model("5.2", dtype=torch.float64)
    state = random_state(model, 1)
    own = nn.Parameter(state.time_shift.detach().clone())
    soft = nn.Parameter(
        torch.randn(1, 27, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    )
    model.model.register_parameter("own", own)
    model.model.register_parameter("soft", soft)
    labels = random_tokens(27)
    inputs: dict[str, Any] = {"labels": labels, "input_ids": labels}
    wanted: list[Tensor] = []
    if role in ("state", "both"):
        inputs["state"] = RwkvRevState(own, own, state.wkv)
        wanted.append(own)
    if role in ("inputs_embeds", "both"):
        del inputs["input_ids"]
        inputs["inputs_embeds"] = soft
        wanted.append(soft)
    chunks_agree = strategy != "truncated"
    loss, expected = gradients_of(model, "full", wanted, factor=factor, **inputs)
    if not chunks_agree:  # in one chunk nothing is cut
        with model.set_bptt("truncated", chunk_length=27):
            found = torch.autograd.grad(factor * model(**inputs).loss, wanted)
    else:
        other, found = gradients_of(model, strategy, wanted, factor=factor, **inputs)
        assert relative_error(other, loss) <= AGREE
    for one, another in zip(found, expected, strict=True):
        assert relative_error(one, another) <= AGREE


@pytest.mark.parametrize("strategy", ["checkpoint", "reversible"])
def test_the_embedding_matrix_given_as_embeddings(strategy: str) -> None:
    """A parameter with a use of its own inside the model besides: both parts of its gradient are there."""
    model = tiny_model("5.2", dtype=torch.float64)
    model.head.weight = model.model.embeddings.weight  # the head uses it
    given = {"inputs_embeds": model.model.embeddings.weight[None, :27], "labels": random_tokens(27)}
    _, (expected,) = gradients_of(model, "full", [model.head.weight], **given)
    _, (found,) = gradients_of(model, strategy, [model.head.weight], **given)
    assert relative_error(found, expected) <= AGREE


# --- embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_state", [False, True], ids=["empty", "state"])
@pytest.mark.parametrize(
    ("length", "strategy", "trailing"),
    every_two([9, 16, 17, 25], ["checkpoint", "reversible", "truncated"], [0, 1, 9]),
)
def test_embeddings_whose_last_chunk_has_no_target(
    strategy: str, length: int, trailing: int, with_state: bool
) -> None:
    model = tiny_model("5.2", dtype=torch.float64)
    embeds = torch.randn(2, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    labels = random_tokens(length, batch=2)
    if trailing:
        labels[:, -trailing:] = -100
    inputs: dict[str, Any] = {"labels": labels}
    if with_state:
        state = random_state(model, 2, learned=True)
        inputs |= {"state": state, "final_state_gradient": random_like(state)}
    leaf = embeds.requires_grad_()
    _, (expected,) = gradients_of(model, "full", [leaf], inputs_embeds=leaf, **inputs)
    _, (found,) = gradients_of(model, strategy, [leaf], inputs_embeds=leaf, **inputs)
    assert found.shape == leaf.shape
    if strategy != "truncated":
        assert relative_error(found, expected) <= AGREE


@pytest.mark.parametrize("strategy", EXACT)
def test_whatever_stands_at_masked_places(strategy: str) -> None:
    model = tiny_model("5.2")
    embeds = torch.randn(2, 27, 16, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 27, dtype=torch.int64)
    mask[0, :9], mask[1, 12:15] = 0, 0
    labels = random_tokens(27, batch=2)
    outcomes: list[Outcome] = []
    for value in (0.0, torch.inf, -torch.inf, torch.nan):
        given = embeds.masked_fill(mask[..., None] == 0, value).requires_grad_()
        inputs = {"inputs_embeds": given, "attention_mask": mask, "labels": labels}
        outcomes.append(differentiate(model, strategy, CHUNK, **inputs))
        assert given.grad is None or given.grad.isfinite().all()
        with torch.no_grad():
            assert model(inputs_embeds=given, attention_mask=mask).logits[mask.bool()].isfinite().all()
        assert_agree(outcomes[-1], outcomes[0], 0.0)


# --- shapes and numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", EXACT)
def test_each_token_needs_its_label(strategy: str) -> None:
    model, ids = tiny_model("5.2"), random_tokens(27, batch=2)
    for labels in (ids[:, :20], ids[:1], ids[:, :0], ids[0]):
        with pytest.raises(ValueError, match="give each token its label"), model.set_bptt(strategy):
            model(ids, labels=labels)


@pytest.mark.parametrize("shape", [(2, 0), (0, 8), (0, 0)])
def test_nothing_to_read_is_refused(shape: tuple[int, int]) -> None:
    model, ids = tiny_model("5.2"), torch.zeros(shape, dtype=torch.int64)
    for inputs in ({"input_ids": ids}, {"inputs_embeds": torch.zeros(*shape, 16)}):
        with pytest.raises(ValueError, match=rf"{shape[0]} rows of {shape[1]} tokens"):
            model(**inputs)
        for strategy in EXACT:
            with (
                pytest.raises(ValueError, match=rf"{shape[0]} rows of {shape[1]} tokens"),
                model.set_bptt(strategy),
            ):
                model(**inputs, labels=ids)


@pytest.mark.parametrize("strategy", [*EXACT, "truncated"])
def test_the_loss_has_the_models_precision(strategy: str) -> None:
    """Also where a chunk has no target, and where the divisor is a whole number that float32 cannot hold."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        model, ids = tiny_model("5.2", dtype=dtype), random_tokens(17)
        labels = ids.clone()
        labels[:, 9:] = -100
        with model.set_bptt(strategy, chunk_length=CHUNK):
            assert model(ids, labels=labels).loss.dtype == wide
            with torch.no_grad():
                assert model(ids, labels=labels).loss.dtype == wide
    model = tiny_model("5.2", dtype=torch.float64)
    divisor = torch.tensor(16_777_217)  # 2**24 + 1
    with model.set_bptt(strategy, chunk_length=CHUNK):
        loss = model(ids, labels=ids, num_items_in_batch=divisor).loss
        plain = model(ids, labels=ids, num_items_in_batch=1).loss
    assert relative_error(loss * 16_777_217, plain) <= 1e-15
    with model.set_bptt(strategy, chunk_length=CHUNK):  # a third has no float32 either
        third = model(ids, labels=ids, num_items_in_batch=torch.tensor(3)).loss
    assert relative_error(third * 3, plain) <= 1e-15


@pytest.mark.parametrize("strategy", [*EXACT, "truncated"])
@pytest.mark.parametrize("dtype", [torch.float16, "autocast"], ids=str)
def test_float16_gradients_of_a_large_batch(dtype: Any, strategy: str) -> None:
    """A million items a step: each gradient is a millionth, which float16 cannot hold without a loss scale inside."""
    model, ids = tiny_model("5.2"), random_tokens(40, batch=2)
    chunk = 40 if strategy == "truncated" else CHUNK
    inputs = {"input_ids": ids, "num_items_in_batch": torch.tensor(1_000_000)}
    truth = differentiate(model.double(), "full", **inputs)
    model = tiny_model("5.2")
    if dtype == "autocast":
        with torch.autocast("cpu", torch.float16):
            found = differentiate(model, strategy, chunk, **inputs).gradients
    else:
        model = model.half()
        with model.set_bptt(strategy, chunk_length=chunk):
            loss = model(ids, labels=ids, num_items_in_batch=torch.tensor(1_000_000)).loss
        # a trainer scales the loss: nothing was lost before
        named = dict(model.named_parameters())
        gradients = torch.autograd.grad(loss * 65536.0, list(named.values()))
        found = {name: g.double() / 65536.0 for name, g in zip(named, gradients, strict=True)}
    errors = relative_errors(found, truth.gradients)
    assert errors["head.weight"] <= 3e-3
    assert max(errors.values()) <= 3e-2, max(
        errors, key=errors.__getitem__
    )  # what has vanished is wrong by 1
    assert grouped_errors(found, truth.gradients)["all"] <= 1.5e-2


@pytest.mark.parametrize("strategy", ["checkpoint", "reversible"])
def test_a_spike_is_told_of(strategy: str) -> None:
    """A head that was 1e10 times larger keeps the grid that this needed; without a spike there is no warning."""
    model, ids = tiny_model("5.2"), random_tokens(60)
    with torch.no_grad():
        model.blocks[1].time_mix.time_decay[1] = 0.0  # w = 1/e: the spike is forgotten within the context
    state = random_state(model, 1)
    differentiate(model, strategy, CHUNK, input_ids=ids, state=state)
    state.wkv[1, 0, 1] *= 1e10
    with pytest.warns(UserWarning, match="layer 1, head 1"):
        differentiate(model, strategy, CHUNK, input_ids=ids, state=state)
    # also where the state has grown again before the last chunk, so that its grid suits it at the end
    value = model.blocks[1].time_mix.value
    seen: list[Tensor] = []
    handle = value.register_forward_hook(lambda module, given, out: seen.append(given[0][0].detach()))
    model(ids)
    handle.remove()
    features = torch.cat([seen[0], -seen[0]], 1)  # of which one is largest late, in the last chunk but one
    feature = next(i for i, place in enumerate(features.argmax(0).tolist()) if 48 <= place < 56)
    second, first = features[:, feature].sort().values[-2:]

    @rwkv_rev.position_wise
    def spike(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        found = torch.cat([given[0], -given[0]], -1)[..., feature, None] > (first + second) / 2
        return torch.where(found, 1e9 * out, out)

    value.register_forward_hook(spike)
    with pytest.warns(UserWarning, match="layer 1, head 1"):
        differentiate(model, strategy, CHUNK, input_ids=ids, state=state)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("name", STRATEGIES)
def test_labels_are_refused_before_tokens_are_embedded(name: str, gradient: bool) -> None:
    """Wrong ids on a GPU end the process's use of it."""
    model, ids = tiny_model("5.2"), torch.full((1, 12), 10**6)

    def refuse() -> None:
        raise ValueError("labels hold 1000000")

    inputs = LossInputs(ids, None, None, ids, 1.0, model.initial_state(1), refuse=refuse)
    with torch.set_grad_enabled(gradient), pytest.raises(ValueError, match="labels hold"):
        STRATEGIES[name](4).loss(model, inputs)


@pytest.mark.parametrize("version", ["5.2", "6"])
@pytest.mark.parametrize("size", [1.0, 30.0, 300.0, 3e4])
def test_a_gradient_that_is_off_is_told_of(bundled: dict[str, Path], version: str, size: float) -> None:
    """A state that is handed over is many times larger than the trained model's own: float32 beside float64."""
    ids = random_tokens(100, vocab=256)
    outcomes = []
    for dtype, strategy in ((torch.float64, "full"), (torch.float32, "full"), (torch.float32, "reversible")):
        model = load(bundled[version], dtype, layers=3)
        state = model.initial_state(1)
        given = torch.randn(state.wkv.shape, generator=torch.Generator().manual_seed(0)).to(state.wkv)
        state = replace(state, wkv=size * given)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            outcomes.append(differentiate(model, strategy, 33, input_ids=ids, state=state))
    truth, full, found = (outcome.gradients for outcome in outcomes)
    own = max(relative_error(full[name], truth[name]) for name in truth)
    error = max(relative_error(found[name], truth[name]) for name in truth)
    coarse = [warning for warning in told if "its grid stays as coarse" in str(warning.message)]
    assert error <= own + 1e-5 or coarse
    assert (size > 1) == (len(coarse) == 1) or 1 < size < 300


def test_what_gets_no_gradient_may_not_want_one() -> None:
    model, ids = tiny_model("5.2"), random_tokens(9)
    probe = model(ids).state.detach().each(lambda tensor: tensor.requires_grad_())
    for strategy in ("full", "reversible"):
        with model.set_bptt(strategy, chunk_length=4):
            with pytest.raises(ValueError, match=r"final_state_gradient requires a gradient.*\.detach\(\)"):
                model(ids, labels=ids, final_state_gradient=probe)
            with pytest.raises(ValueError, match="num_items_in_batch requires a gradient"):
                model(ids, labels=ids, num_items_in_batch=torch.tensor(8.0, requires_grad=True))
            model(ids, labels=ids, final_state_gradient=probe.detach(), num_items_in_batch=torch.tensor(8.0))
