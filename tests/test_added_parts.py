"""What a subclass has beside our parts: initialised as transformers does, and no matter to chunks of the loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import assert_agree, differentiate, random_tokens, relative_error, tiny_model
from torch import Tensor, nn

import rwkv_rev
from rwkv_rev.base_model import RwkvRevModel, RwkvRevPreTrainedModel
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.errors import StrategyError
from rwkv_rev.modeling import RwkvRevForCausalLM

VERSIONS = ("4", "5.2", "6", "7")
STRATEGIES = ("checkpoint", "reversible")


def parts(width: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "linear": nn.Linear(width, 4 * width),
            "deep": nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)),
            "convolution": nn.Conv1d(width, width, 3),
            "attention": nn.MultiheadAttention(width, 2),
            "norm": nn.RMSNorm(width),
            "layer_norm": nn.LayerNorm(width, bias=False),
            "group_norm": nn.GroupNorm(2, width),
            "batch_norm": nn.BatchNorm1d(width),
            "embedding": nn.Embedding(64, width, padding_idx=0),
            "bag": nn.EmbeddingBag(64, width),
            "gru": nn.GRU(width, width),
            "lstm": nn.LSTM(width, width),
            "of_two": nn.Bilinear(width, width, 2),
            "prelu": nn.PReLU(),
        }
    )


class WithHead(RwkvRevForCausalLM):
    def __init__(self, config: RwkvRevConfig) -> None:
        super().__init__(config)
        self.parts = parts(config.hidden_size)
        self.post_init()


class Reward(RwkvRevPreTrainedModel):
    def __init__(self, config: RwkvRevConfig) -> None:
        super().__init__(config)
        self.model = RwkvRevModel(config)
        self.parts = parts(config.hidden_size)
        self.post_init()


class Renamed(RwkvRevPreTrainedModel):
    """Its base model is not where transformers looks for it."""

    def __init__(self, config: RwkvRevConfig) -> None:
        super().__init__(config)
        self.body = RwkvRevModel(config)
        self.parts = parts(config.hidden_size)
        self.parts.register_buffer("table", torch.ones(3), persistent=False)
        self.post_init()


class Inside(RwkvRevForCausalLM):
    """Further layers in a block and in a cell of this package."""

    def __init__(self, config: RwkvRevConfig) -> None:
        super().__init__(config)
        block: Any = self.model.blocks[0]
        block.own_parts = parts(config.hidden_size)
        getattr(block, block.names[0][1]).own_parts = parts(config.hidden_size)
        self.post_init()


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written to holds no numbers."""
    for name in ("empty", "empty_like"):
        made = getattr(torch, name)

        def poisoned(*args: Any, made: Any = made, **named: Any) -> Tensor:
            tensor: Tensor = made(*args, **named)
            if tensor.is_floating_point() and not tensor.is_meta:
                tensor.detach().fill_(float("nan"))
            return tensor

        monkeypatch.setattr(torch, name, poisoned)


def added(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if "parts." in name}


def look_at(model: nn.Module) -> None:
    """The values that transformers gives such layers."""
    found = added(model)
    assert found
    for name, tensor in found.items():
        assert tensor.isfinite().all(), name
    for name, tensor in found.items():
        if name.endswith(("linear.weight", "deep.0.weight", "convolution.weight", "embedding.weight")):
            assert 0.015 < tensor.std() < 0.025, name
        elif name.endswith(("linear.bias", "deep.0.bias", "convolution.bias", "norm.bias")):
            assert not tensor.any(), name
        elif name.endswith("norm.weight"):
            assert (tensor == 1).all(), name
        elif name.endswith(("gru.weight_hh_l0", "of_two.weight", "in_proj_weight", "lstm.weight_ih_l0")):
            assert 0.03 < tensor.std() < 0.5, name


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", [WithHead, Reward, Inside])
def test_loading_initialises_what_the_file_has_not(
    kind: Any, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tiny_model(version)
    saved.save_pretrained(tmp_path)
    poison(monkeypatch)
    model = kind.from_pretrained(tmp_path, dtype=torch.float32)
    look_at(model)
    for name, tensor in saved.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", [WithHead, Reward, Inside, Renamed])
def test_loading_keeps_what_the_file_has(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kind(tiny_model("7").config)
    look_at(model)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_()
    model.save_pretrained(tmp_path)
    poison(monkeypatch)
    loaded = kind.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


@torch.no_grad()
def test_the_models_own_parts_are_initialised_as_ever() -> None:
    """A subclass draws the same numbers for them, and what it has beside them is not one of them."""
    config = tiny_model("7").config
    torch.manual_seed(0)
    plain = RwkvRevForCausalLM(config)
    torch.manual_seed(0)
    model = WithHead(config)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert plain.get_input_embeddings().weight.abs().max() <= 1e-4
    wider = plain.resize_token_embeddings(64, mean_resizing=False)
    assert wider.weight.abs().max() <= 1e-4


class ValueHead(nn.Module):
    """Of a class that nobody has declared; looks at positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return self.outer(torch.tanh(self.inner(hidden.cumsum(1))))


def with_value_head(version: str) -> Any:
    model: Any = tiny_model(version, dtype=torch.float64)
    torch.manual_seed(0)
    model.value_head = ValueHead(model.config.hidden_size).double()
    return model


@pytest.mark.parametrize("length", [11, 24])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_value_head_beside_the_loss(version: str, length: int) -> None:
    """No strategy calls it within the labelled loss, and a loss of one's own calls it on whole contexts."""
    model, ids = with_value_head(version), random_tokens(length, 2)

    def gradients(strategy: str) -> dict[str, Tensor]:
        model.zero_grad()
        with model.set_bptt(strategy, chunk_length=8):
            loss = model(ids, labels=ids).loss
            loss = loss + model.value_head(model.model(ids).last_hidden_state).pow(2).mean()
            loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    truth = gradients("full")
    for strategy in STRATEGIES:
        found = gradients(strategy)
        assert found.keys() == truth.keys()
        for name, gradient in found.items():
            assert relative_error(gradient, truth[name]) < 1e-9, (strategy, name)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_stands_beside_the_head_and_a_declared_hook_calls(strategy: str) -> None:
    model, ids = with_value_head("7"), random_tokens(24)
    model.gate = nn.Sequential(nn.Linear(16, 16), nn.Sigmoid()).double()

    @rwkv_rev.position_wise
    def scaled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * model.gate(output)

    model.model.ln_out.register_forward_hook(scaled)
    truth = differentiate(model, "full", input_ids=ids).gradients
    found = differentiate(model, strategy, 8, input_ids=ids).gradients
    assert found.keys() == truth.keys() and "gate.0.weight" in truth
    for name, gradient in found.items():
        assert relative_error(gradient, truth[name]) < 1e-9, name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_a_declared_hook_calls_there_and_writes_to_is_refused(strategy: str) -> None:
    model, ids = with_value_head("7"), random_tokens(24)

    @rwkv_rev.position_wise
    def counted(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        model.value_head.calls += 1
        return output * model.value_head.calls

    model.model.ln_out.register_forward_hook(counted)
    with pytest.raises(rwkv_rev.StrategyError, match=r"value_head\.calls was written to"):
        differentiate(model, strategy, 8, input_ids=ids)


@pytest.mark.parametrize("place", ["model.ln_out", "head", "top"])
def test_undeclared_code_that_the_loss_calls_is_still_refused(place: str) -> None:
    model, ids = with_value_head("7"), random_tokens(24)
    if place == "top":  # one that the head is part of
        model.head = nn.Sequential(model.value_head.inner, ValueHead(16).double(), model.head)
    else:
        model.get_submodule(place).register_forward_hook(lambda module, args, output: output.cumsum(1))
    with pytest.raises(rwkv_rev.StrategyError, match="is not known to treat each position by itself"):
        differentiate(model, "reversible", 8, input_ids=ids)


@pytest.mark.parametrize("strategy", ["full", *STRATEGIES])
def test_a_head_that_has_no_shape_before_its_first_call(strategy: str) -> None:
    model, ids = tiny_model("5.2", dtype=torch.float64), random_tokens(12)
    model.head = nn.LazyLinear(model.config.vocab_size, dtype=torch.float64)
    with (
        model.set_bptt(strategy, chunk_length=4),
        pytest.raises(StrategyError, match=r"nn\.LazyLinear\): call the model once without labels"),
    ):
        model(ids, labels=ids)
    with torch.no_grad():
        model(ids)
    assert_agree(
        differentiate(model, strategy, 4, input_ids=ids), differentiate(model, "full", input_ids=ids), 1e-10
    )
