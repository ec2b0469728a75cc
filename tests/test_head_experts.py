"""A declared head that uses other weights for other tokens: all of them are trained, however many logits are made."""

from typing import Any

import pytest
import torch
from bptt_cases import random_tokens, tiny_model
from test_between_layers import assert_same, outcome
from torch import Tensor, nn

from rwkv_rev import RwkvRevForCausalLM, position_wise
from rwkv_rev import loss as loss_module
from rwkv_rev.errors import StrategyError

LENGTH = 24
IDS = random_tokens(LENGTH)


def three_layers(version: str = "5.2") -> RwkvRevForCausalLM:
    return tiny_model(version, dtype=torch.float64, num_hidden_layers=3)


@position_wise
class Experts(nn.Module):
    """Two heads, the second one for tokens of which one number is large; it is called where there is such a token."""

    def __init__(self, head: nn.Linear, channel: int, bound: float) -> None:
        super().__init__()
        self.first, self.second = head, nn.Linear(16, 32, bias=False).to(head.weight)
        self.channel, self.bound = channel, bound
        with torch.no_grad():
            self.second.weight.copy_(head.weight.flip(0))

    def forward(self, x: Tensor) -> Tensor:
        logits, chosen = self.first(x), x[..., self.channel] > self.bound
        if chosen.any():
            logits = logits.clone()
            logits[chosen] = self.second(x[chosen])
        return logits


def of_later_tokens(model: RwkvRevForCausalLM, first: int) -> tuple[int, float]:
    """A number of the hidden states, and a bound that it passes for later tokens than the ``first`` ones alone."""
    with torch.no_grad():
        hidden = model.model(IDS).last_hidden_state[0, :-1]
    before, behind = hidden[:first].amax(0), hidden[first:].amax(0)
    channel = int((behind - before).argmax())
    assert behind[channel] > before[channel]
    return channel, float(before[channel] + behind[channel]) / 2


@pytest.mark.parametrize(("version", "at_once"), [("4", 4), ("5.2", 8), ("7", 8)])
@pytest.mark.parametrize(
    ("strategy", "chunk"), [("full", LENGTH), ("checkpoint", LENGTH), ("reversible", 12)]
)
def test_experts_of_later_tokens(
    monkeypatch: pytest.MonkeyPatch, strategy: str, chunk: int, version: str, at_once: int
) -> None:
    """Logits are made of so many tokens at once; those of the first ones use the first head alone."""
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", 32 * at_once)

    def made() -> RwkvRevForCausalLM:
        model = three_layers(version)
        model.head = Experts(model.head, *of_later_tokens(model, at_once))
        return model

    expected = outcome(made(), "full", False, LENGTH)
    assert expected["head.second.weight"] is not None
    assert_same(outcome(made(), strategy, True, chunk), expected)


def test_a_tensor_beside_the_parameters_of_later_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", 32 * 8)
    model, beside = three_layers(), torch.ones(32, dtype=torch.float64, requires_grad=True)
    channel, bound = of_later_tokens(model, 8)

    @position_wise
    def add(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        return output + beside if (given[0][..., channel] > bound).any() else output

    model.head.register_forward_hook(add)
    for strategy in ("full", "reversible"):
        with pytest.raises(StrategyError, match=r"a tensor of shape \[32\] that requires a gradient"):
            outcome(model, strategy, True, LENGTH)
