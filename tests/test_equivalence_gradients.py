"""The gradients section of ``verify``: exact strategies pass, approximate ones are shown, damage fails."""

import json
import re
from pathlib import Path

import pytest
import torch
from bptt_cases import tiny_model

from rwkv_rev.bptt.reversible import Reversible
from rwkv_rev.equivalence.gradients import AGREEMENT, GROUPS, STRATEGIES, check_gradients, group_of
from rwkv_rev.equivalence.text import default_text
from rwkv_rev.loss import FinishedGradients
from rwkv_rev.modeling import RwkvRevForCausalLM
from rwkv_rev.tables import WIDTH


@pytest.fixture(scope="module", params=["4", "5.2"])
def model(request: pytest.FixtureRequest, shallow: dict[str, Path]) -> RwkvRevForCausalLM:
    return RwkvRevForCausalLM.from_pretrained(shallow[request.param], dtype=torch.float32).eval()


def text(tokens: int) -> torch.Tensor:
    return torch.tensor(list(default_text().encode()[:tokens]))


def test_bundled_models_pass(model: RwkvRevForCausalLM) -> None:
    """In two chunks and a shorter one."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    found = check_gradients(model, text(60), chunk=24)
    assert found.passed, "\n".join(found.lines())
    by_name = {strategy.name: strategy for strategy in found.strategies}
    assert tuple(by_name) == STRATEGIES
    full = by_name["full"]
    assert full.overall is not None
    assert full.overall < 3e-6
    for name in ("checkpoint", "reversible"):
        strategy = by_name[name]
        assert strategy.errors is not None
        assert set(strategy.errors) == set(GROUPS)
        assert strategy.from_full is not None
        assert 0 < strategy.from_full <= 1e-5
    assert by_name["checkpoint"].loss == by_name["reversible"].loss == pytest.approx(full.loss, rel=1e-6)
    truncated = by_name["truncated"]
    assert truncated.errors is not None
    assert truncated.errors["decay"].rms > 0.1  # visibly not the gradient of the context
    assert "use 'reversible'" in str(by_name["reversible-lossy"].refusal)
    why = str(by_name["reversible-lossy"].refusal).removeprefix("reversible-lossy ")
    assert f"reversible-lossy: not run: {why}" in " ".join(found.lines())
    assert max(map(len, found.lines())) <= WIDTH
    json.dumps(found.to_dict(), allow_nan=False)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    assert model.bptt.strategy == "auto"


def test_lossy_is_shown_where_it_runs(model: RwkvRevForCausalLM) -> None:
    found = check_gradients(model, text(12), chunk=4)
    lossy = found.strategies[STRATEGIES.index("reversible-lossy")]
    if model.config.architecture.has_heads:
        assert lossy.errors is not None
        assert lossy.failure is None
        assert "approximate" in "\n".join(found.lines())
    else:
        assert lossy.refusal is not None
    assert found.passed


def test_a_wrong_gradient_fails(model: RwkvRevForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reversible strategy whose gradient of one group is off by 2e-5 does not pass."""
    honest = Reversible._sweep

    def wrong(self: Reversible, *arguments: object) -> tuple:
        loss, state, gradients = honest(self, *arguments)
        gradients[5] = gradients[5] * (1 + 2e-5)
        return loss, state, gradients

    monkeypatch.setattr(Reversible, "_sweep", wrong)
    found = check_gradients(model, text(40), chunk=16)
    assert not found.passed
    assert str(found.failure).startswith("reversible: the gradient is 2.0e-05 from the truth in float64")
    assert "gradients: FAIL, reversible" in "\n".join(found.lines())


@pytest.fixture(scope="module")
def noisy() -> RwkvRevForCausalLM:
    """A model whose gradient float32 rounds a lot: its heads' outputs nearly cancel before they are normalised."""
    model = tiny_model("5.0", num_hidden_layers=6, vocab_size=256).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.time_mix.receptance.weight *= 0.03
            block.time_mix.ln_x.eps = 1e-12
    return model


def test_rounding_is_no_wrong_gradient(noisy: RwkvRevForCausalLM) -> None:
    """Two strategies may be as far apart as float32 is from float64, in which they agree.

    How far that is differs from CPU to CPU; it must be more than what counts as agreement.
    """
    found = check_gradients(noisy, text(40), chunk=16)
    assert found.passed, "\n".join(found.lines())
    for name in ("checkpoint", "reversible"):
        strategy = found.strategies[STRATEGIES.index(name)]
        assert strategy.from_full > AGREEMENT
        assert strategy.in_float64 < 1e-10
        assert f"{name}: {strategy.from_full:.1e} from full is rounding" in "\n".join(found.lines())


def test_a_wrong_gradient_of_the_size_of_the_rounding_fails(
    noisy: RwkvRevForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Reversible._sweep

    def wrong(self: Reversible, *arguments: object) -> tuple:
        loss, state, gradients = honest(self, *arguments)
        gradients[5] = gradients[5] * (1 + 2e-4)
        return loss, state, gradients

    monkeypatch.setattr(Reversible, "_sweep", wrong)
    found = check_gradients(noisy, text(40), chunk=16)
    assert re.match(r"reversible: the gradient is [12]\.\de-04 from the truth in float64", str(found.failure))


def test_a_wrong_truth_fails(model: RwkvRevForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all strategies share is held against float64: NaN everywhere is no agreement."""
    backward = FinishedGradients.backward

    def nan(*arguments: object) -> tuple:
        return tuple(g if g is None else g * torch.nan for g in backward(*arguments))

    monkeypatch.setattr(FinishedGradients, "backward", staticmethod(nan))
    assert not check_gradients(model, text(16), chunk=4).passed


def test_one_token(model: RwkvRevForCausalLM) -> None:
    """Nothing is predicted; the gradient that arrives at the final state is all there is."""
    assert check_gradients(model, text(1)).passed


def test_every_parameter_has_a_group(model: RwkvRevForCausalLM) -> None:
    groups = {group_of(name) for name, _ in model.named_parameters()}
    assert groups == set(GROUPS) - {"initial state"}
    assert group_of("model.blocks.3.time_mix.ln_x.weight") == "norms"
    assert group_of("model.blocks.3.time_mix.key.weight") == "projections"
    assert group_of("model.ln_out.bias") == "norms"
