"""Weight gradients that are multiplied straight into their sums; without a GPU, by a product that adds afterwards."""

import pytest
import torch
from bptt_cases import differentiate, random_tokens, relative_error, tiny_model
from torch import Tensor, nn

from rwkv_rev import RwkvRevForCausalLM, position_wise
from rwkv_rev.autograd.weight_product import WeightProduct
from rwkv_rev.bptt import weight_products

CHUNKS, LENGTH = 4, 32


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Products are made on every device; their shapes are collected."""
    made: list[torch.Size] = []

    def add_to(self: WeightProduct, total: Tensor | None) -> Tensor:
        product = self.gradient.t() @ self.x
        made.append(product.shape)
        return product if total is None else total.add_(product)

    monkeypatch.setattr(weight_products, "_adds", lambda weight: True)
    monkeypatch.setattr(WeightProduct, "add_to", add_to)
    return made


def gradients(model: RwkvRevForCausalLM, strategy: str, **inputs: Tensor) -> dict[str, Tensor]:
    inputs.setdefault("input_ids", random_tokens(LENGTH, 2))
    return differentiate(model, strategy, LENGTH // CHUNKS, **inputs).gradients


@pytest.mark.parametrize("strategy", ["reversible", "checkpoint"])
@pytest.mark.parametrize("version", ["4", "5.2"])
def test_every_map_of_every_chunk(version: str, strategy: str, products: list[torch.Size]) -> None:
    model = tiny_model(version)
    expected = gradients(model, "full")
    assert products == []
    found = gradients(model, strategy)
    maps = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(products) == CHUNKS * len(maps)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert relative_error(gradient, expected[name]) < 1e-5, name
    assert not any("forward" in vars(module) for module in maps)


def test_what_is_no_plain_map_of_a_trained_weight_is_left_alone(products: list[torch.Size]) -> None:
    model = tiny_model("5.2")
    block = model.model.blocks[0]
    block.time_mix.key.weight.requires_grad_(False)

    @position_wise
    class Other(nn.Linear):
        pass

    block.time_mix.value.__class__ = Other
    found = [module for module, _ in weight_products.plain_maps(model, places(model))]
    assert block.time_mix.value not in found
    assert block.time_mix.key not in found
    assert block.time_mix.receptance in found
    expected = gradients(model, "full")
    for name, gradient in gradients(model, "reversible").items():
        assert relative_error(gradient, expected[name]) < 1e-5, name
    assert "model.blocks.0.time_mix.key.weight" not in expected


def places(model: RwkvRevForCausalLM) -> dict[int, int]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {id(parameter): index for index, parameter in enumerate(trained)}


def test_a_hook_hears_the_map_and_its_weight_once(products: list[torch.Size]) -> None:
    model = tiny_model("5.2")
    heard: list[str] = []
    key = model.model.blocks[1].channel_mix.key
    key.weight.register_hook(lambda gradient: heard.append("weight"))
    expected = gradients(model, "full")
    heard.clear()
    found = gradients(model, "reversible")
    assert heard == ["weight"]
    name = "model.blocks.1.channel_mix.key.weight"
    assert relative_error(found[name], expected[name]) < 1e-5


def test_autocast_computes_its_own(products: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type=None: device_type == "cuda")
    with weight_products.adding([(nn.Linear(2, 2, bias=False), 0)], lambda indices, found: None):
        pass
    gradients(tiny_model("4"), "reversible")
    assert products == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_closer_to_float64_than_sums_of_rounded_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 128, "head_size": 64, "intermediate_size": 256}
    model = tiny_model("5.2", dtype=torch.bfloat16, **sizes).cuda()
    ids = random_tokens(512, 2).cuda()
    truth = gradients(tiny_model("5.2", dtype=torch.float64, **sizes).cuda(), "full", input_ids=ids)
    errors = []
    for adds in (True, False):
        if not adds:
            monkeypatch.setattr(weight_products, "_adds", lambda weight: False)
        found = differentiate(model, "reversible", 16, input_ids=ids).gradients
        errors.append({name: relative_error(g, truth[name]) for name, g in found.items() if g.dim() == 2})
    for name, error in errors[0].items():
        assert error <= 1.05 * errors[1][name], (name, error, errors[1][name])
