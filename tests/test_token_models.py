"""Small language models of cells that are stepped token by token: gradients, tape, forecast, refusals."""

import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import (
    assert_same_bits,
    checkpoint_blocks,
    differentiate,
    random_like,
    random_state,
    random_tokens,
    relative_errors,
)
from test_linear_attention import filled

from rwkv_rev import RwkvRevConfig, RwkvRevForCausalLM
from rwkv_rev.architectures import registry
from rwkv_rev.architectures.architecture import Part
from rwkv_rev.architectures.registry import architecture
from rwkv_rev.architectures.token_models import TokenCellState
from rwkv_rev.equivalence.naive_model import residual_streams
from rwkv_rev.equivalence.reversal import check_reversal
from rwkv_rev.errors import ConfigError, StrategyError
from rwkv_rev.forecast import forecast_memory, graph_bytes
from rwkv_rev.fresh import init
from rwkv_rev.reversal.stepped import GridOverflowError

NAMES = ("coupled", "reversible-gru", "reversible-lstm")
WIDTH, LENGTH, CHUNK = 12, 11, 4


def model_of(name: str, dtype: torch.dtype = torch.float64, **config: Any) -> RwkvRevForCausalLM:
    """Any that is no RWKV, linear attention too."""
    width = config.get("hidden_size", WIDTH)
    settings = {
        "hidden_size": width,
        "num_hidden_layers": 2,
        "vocab_size": 32,
        **architecture(name).sizes(width),
    }
    model = RwkvRevForCausalLM(RwkvRevConfig(rwkv_version=name, **(settings | config)))
    return filled(model).to(dtype).train()


def arguments(model: RwkvRevForCausalLM) -> dict[str, Any]:
    ids, mask = random_tokens(LENGTH, batch=2), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :5], mask[1, 5:9] = 0, 0
    state = random_state(model, 2)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "state": state,
        "final_state_gradient": random_like(state),
    }


@cache
def by_the_plain_loop(name: str, **config: Any) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss by autograd through :attr:`Architecture.scan`, which shares no code with the cells."""
    model, ids = model_of(name, **config), random_tokens(LENGTH, batch=2)
    tensors = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    losses = []
    for row in ids:
        *_, (_, hidden) = residual_streams(
            tensors,
            row,
            scan=model.config.architecture.scan(model.config),
            layer_norm_epsilon=model.config.layer_norm_epsilon,
            group_norm_epsilon=model.config.group_norm_epsilon,
        )
        losses.append(torch.nn.functional.cross_entropy(hidden[:-1] @ tensors["head.weight"].T, row[1:]))
    torch.stack(losses).mean().backward()
    return {name: tensor.grad for name, tensor in tensors.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("limit", [False, True], ids=["", "limited"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_plain_loop(
    name: str, limit: bool, dtype: torch.dtype, tolerance: float
) -> None:
    if limit and name == "coupled":
        pytest.skip("forgets nothing")
    ids, limits = random_tokens(LENGTH, batch=2), {"forget_limit": 2.0} if limit else {}
    model = model_of(name, dtype, **limits)
    expected = by_the_plain_loop(name, **limits)
    for strategy in ("reversible", "checkpoint", "full"):
        found = differentiate(model, strategy, CHUNK, input_ids=ids).gradients
        assert max(relative_errors(found, expected).values()) < tolerance


@pytest.mark.parametrize("again", [False, True], ids=["", "checkpointed-blocks"])
@pytest.mark.parametrize("name", NAMES)
def test_states_and_masks(name: str, again: bool) -> None:
    model = model_of(name)
    given = arguments(model)
    full = differentiate(model, "full", **given)
    if again:
        checkpoint_blocks(model)
    chunked = [differentiate(model, s, CHUNK, **given) for s in ("reversible", "checkpoint")]
    assert_same_bits(*chunked)
    assert max(relative_errors(chunked[0].gradients, full.gradients).values()) < 1e-10
    assert isinstance(full.state, TokenCellState)
    assert full.state.memory.shape == (2, 2, 4 if name == "reversible-lstm" else 2, 6)
    if again:
        return
    cut = differentiate(model, "truncated", CHUNK, **given)
    torch.testing.assert_close(cut.loss, full.loss, rtol=1e-9, atol=0)
    assert max(relative_errors(cut.gradients, full.gradients).values()) > 0.01


@pytest.mark.parametrize("name", (*NAMES, "linear-attention"))
def test_padding_and_rows_of_nothing_change_no_gradient(name: str) -> None:
    model, ids = model_of(name), random_tokens(8, batch=2)
    padded = torch.zeros(4, 11, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, start in ((0, 3), (1, 0)):  # on the left, on the right
        padded[row, start : start + 8], mask[row, start : start + 8] = ids[row], 1
    padded[2] = 3  # a row of tokens, none of which counts
    truth = differentiate(model, "full", input_ids=ids)
    ways = (("full", None), ("reversible", 1), ("checkpoint", 3), ("reversible", 8))
    for strategy, chunk in ways:
        found = differentiate(model, strategy, chunk, input_ids=padded, attention_mask=mask)
        torch.testing.assert_close(found.loss, truth.loss, rtol=1e-12, atol=0)
        assert max(relative_errors(found.gradients, truth.gradients).values()) < 1e-10
    for given in ({"input_ids": ids[:, :1]}, {"input_ids": padded, "attention_mask": torch.zeros_like(mask)}):
        alone = differentiate(model, "reversible", 1, **given)  # nothing to predict
        assert alone.loss == 0 and all(not grad.any() for grad in alone.gradients.values())


@pytest.mark.parametrize("name", (*NAMES, "linear-attention"))
def test_a_state_in_half_precision_goes_on_in_full(name: str) -> None:
    model, ids = model_of(name, torch.float32), random_tokens(12, batch=2)
    half = random_state(model, 2).each(torch.Tensor.half)
    truth = differentiate(model, "full", input_ids=ids, state=half.each(torch.Tensor.float))
    for strategy in ("full", "reversible"):
        found = differentiate(model, strategy, 5, input_ids=ids, state=half)
        assert all(tensor.dtype == torch.float32 for tensor in found.state.tensors())
        assert max(relative_errors(found.gradients, truth.gradients).values()) < 1e-5


@pytest.mark.parametrize("name", (*NAMES, "linear-attention"))
def test_what_is_not_finite_ends_in_a_loss_that_is_not(name: str) -> None:
    model = model_of(name, torch.float32)
    embeds = torch.randn(2, 10, WIDTH, generator=torch.Generator().manual_seed(0))
    for bad in (math.nan, math.inf):
        embeds[0, 5] = bad
        for strategy in ("full", "reversible", "checkpoint"):
            found = differentiate(model, strategy, 4, inputs_embeds=embeds, labels=random_tokens(10, batch=2))
            assert found.loss.isnan()


@pytest.mark.parametrize("name", (*NAMES, "linear-attention"))
def test_a_state_is_carried_from_call_to_call(name: str) -> None:
    """With its gradient, through chunks of both calls."""
    model, ids = model_of(name), random_tokens(7, batch=2)
    state, found = random_state(model, 2), []
    for strategy, chunk in (("full", None), ("reversible", 3), ("checkpoint", 1)):
        start = state.each(lambda tensor: tensor.detach().clone().requires_grad_())
        model.zero_grad()
        with model.set_bptt(strategy, chunk_length=chunk):
            first = model(input_ids=ids, labels=ids, state=start)
            second = model(input_ids=ids.flip(1), labels=ids.flip(1), state=first.state)
        (first.loss + second.loss).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        found.append(gradients | {"state": start.tensors()[0].grad})
    for chunked in found[1:]:
        assert max(relative_errors(chunked, found[0]).values()) < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_plain_division_is_refused_by_name(name: str) -> None:
    model = model_of(name, torch.float32)
    words = "reversible-lossy divides .* is stepped token by token: use 'reversible', which is exact"
    with pytest.raises(StrategyError, match=words):
        differentiate(model, "reversible-lossy", CHUNK, input_ids=random_tokens(LENGTH))


@pytest.mark.parametrize("name", NAMES)
def test_an_initial_state_is_tuned(name: str) -> None:
    model = model_of(name, torch.float32)
    model.add_initial_state()
    for number, memory in enumerate(model.model.initial_wkv):
        memory.data.fill_(0.1 * (number + 1))
    ids = random_tokens(LENGTH, batch=2)
    full, chunked = (differentiate(model, s, CHUNK, input_ids=ids) for s in ("full", "reversible"))
    assert all(float(full.gradients[f"model.initial_wkv.{layer}"].norm()) > 0 for layer in range(2))
    assert max(relative_errors(chunked.gradients, full.gradients).values()) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_the_way_back_is_measured(name: str) -> None:
    model = model_of(name, torch.float32).eval()
    check = check_reversal(model, random_tokens(32)[0], chunk=4, drift_steps=(4,))
    assert check.passed and check.theory_bits == (0 if name == "coupled" else None)
    assert (check.used_bits == 0) == (name == "coupled")


def test_nothing_of_a_coupled_state_is_on_the_tape() -> None:
    """A layer's inner chunk: prints of its input and of the state, 16 bytes, and a fingerprint, 8, laid out by 16."""
    for width, batch in ((12, 1), (24, 3)):
        model = model_of("coupled", torch.float32, hidden_size=width)
        ids = random_tokens(8 * CHUNK, batch=batch)
        found = differentiate(model, "reversible", CHUNK, input_ids=ids)
        assert found.report["tape_bytes"] == (8 - 2) * 2 * (16 + 16)


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_limit_bounds_the_tape_as_forecast(name: str) -> None:
    """A limit of one bit, a chunk of four tokens: less than the state, and never more than the forecast says."""
    ids, tapes = random_tokens(32, batch=2), []
    for limit in (0.0, 1.0):
        model = model_of(name, torch.float32, forget_limit=limit, hidden_size=64)
        tapes.append(differentiate(model, "reversible", 4, input_ids=ids).report["tape_bytes"])
        (forecast,) = forecast_memory(
            model.config,
            (),
            model.num_parameters(),
            context_length=32,
            chunk_length=4,
            batch_size=2,
            strategies=("reversible",),
        )
        prints = 16 * 2 * (8 - 2)
        assert 0.5 * tapes[-1] < forecast.tape + prints
        assert tapes[-1] <= forecast.tape + prints
    assert tapes[1] < 0.7 * tapes[0]


@pytest.mark.parametrize("size", [64, 32])
@pytest.mark.parametrize("name", NAMES)
def test_the_forecast_counts_what_the_graph_keeps(name: str, size: int) -> None:
    model = model_of(name, torch.float32, hidden_size=128, cell_size=size)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.model(random_tokens(64)).last_hidden_state
    found = sum(storage.nbytes() for storage in kept.values())
    assert hidden.requires_grad
    assert abs(graph_bytes(model.config, 1, 64) / found - 1) < 0.05


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("coupled", {"forget_limit": 2.0}, "coupled additive cells has no field 'forget_limit'; there are"),
        ("reversible-gru", {"forget_limit": -1.0}, "forget_limit = -1.0 must be from 0 to 32"),
        ("reversible-lstm", {"wide": 1}, "wide = 1 must be true or false"),
        ("reversible-lstm", {"magnitude": 80}, "magnitude = 80 must be from -40 to 40"),
    ],
)
def test_refused(tmp_path: Path, name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        init(name, tmp_path / "model", settings=given)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_that_leaves_its_grid_is_named(name: str) -> None:
    model = model_of(name, torch.float32, magnitude=-6)
    with pytest.raises(
        GridOverflowError, match=r"layer 0 \(\w+\) has left its grid: .* magnitude=-3 or more"
    ):
        differentiate(model, "reversible", CHUNK, input_ids=random_tokens(LENGTH))


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_model_begins_as_no_more_than_its_embeddings(name: str) -> None:
    """Blocks are the identity at first, and the recurrence learns from the first step on."""
    settings = {"hidden_size": 12, "num_hidden_layers": 1, "vocab_size": 32, **architecture(name).sizes(12)}
    model = RwkvRevForCausalLM(RwkvRevConfig(rwkv_version=name, **settings))
    ids = random_tokens(32)
    found = differentiate(model, "full", input_ids=ids)
    assert math.isclose(float(found.loss), math.log(32), rel_tol=0.2)
    outs = [
        v
        for n, v in found.gradients.items()
        if n.endswith(("recurrence.output.weight", "reader.of_state.weight"))
    ]
    assert len(outs) == 1 and float(outs[0].norm()) > 0


@pytest.mark.parametrize(
    ("shape", "told"),
    [("M", "[6] (Part('M'))"), ("1 M", "[1, 6] (Part('1 M'))"), ("2 D", "[2, 12] (Part('2 D'))")],
)
def test_a_state_that_does_not_fit_the_parts_of_a_cell_is_refused_where_a_model_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shape: str, told: str
) -> None:
    monkeypatch.setattr(registry, "ARCHITECTURES", dict(registry.ARCHITECTURES))
    state = {"memory": Part(shape, wide=True)}
    registry.register(replace(architecture("reversible-gru"), version="other", title="others", state=state))
    words = re.escape(
        f"others: a layer's state has memory {told}, but its recurrence, ReversibleGru, has [2, 6], parts of its "
        'halves and numbers in each: Part("2 M") where M is 6'
    )
    with pytest.raises(ConfigError, match=f"^{words}$"):
        model_of("other")
    with pytest.raises(ConfigError, match=f"^{words}$"):
        init("other", tmp_path / "model", settings={"hidden_size": 12, "num_hidden_layers": 1})
    assert not (tmp_path / "model").exists()
