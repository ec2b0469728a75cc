"""``torch.utils.checkpoint`` inside of a declared module: without ``use_reentrant``, which PyTorch refuses by name."""

import pytest
import torch
from bptt_cases import assert_agree, differentiate, random_tokens, tiny_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_rev import RwkvRevForCausalLM, position_wise

CHUNK = 8
IDS = random_tokens(20, batch=2)
AGREE = 1e-10
"""In float64."""


@position_wise
class Recomputed(nn.Module):
    def __init__(self, layer: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, x: Tensor) -> Tensor:
        def compute(given: Tensor) -> Tensor:
            return torch.tanh(self.layer(given))

        made: Tensor = checkpoint(compute, x, use_reentrant=self.reentrant)
        return made


def model_of(reentrant: bool) -> RwkvRevForCausalLM:
    model = tiny_model("7", dtype=torch.float64)
    cell = model.model.blocks[1].channel_mix
    cell.value = Recomputed(cell.value, reentrant)
    return model


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("strategy", ["checkpoint", "reversible"])
def test_inside_a_declared_module(strategy: str) -> None:
    full = differentiate(model_of(True), "full", input_ids=IDS)
    assert_agree(differentiate(model_of(False), strategy, CHUNK, input_ids=IDS), full, AGREE)
    model = model_of(True)
    with pytest.raises(RuntimeError, match="set use_reentrant=False"):
        differentiate(model, strategy, CHUNK, input_ids=IDS)
    model.set_bptt(strategy, chunk_length=CHUNK)
    with pytest.raises(RuntimeError, match="set use_reentrant=False"):
        model(IDS).logits.sum().backward()
