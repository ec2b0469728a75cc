"""``num_items_in_batch``: what a summed loss can be divided by, and what it cannot."""

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from bptt_cases import random_tokens, tiny_model

IDS = random_tokens(20, batch=2)
STRATEGIES = ("full", "checkpoint", "reversible")

WRONG = {
    "100": "is a str: give a number",
    "": "is a str: give a number",
    (38,): "is a tuple: give a number",
    1j: "is a complex: give a number",
    Decimal(38): "is a Decimal: give a number",
    float("inf"): "= inf must be above 0, and finite",
    float("-inf"): "= -inf must be above 0, and finite",
    float("nan"): "= nan must be above 0, and finite",
    -1: "= -1 must be above 0, and finite",
    1e30: "is 1e[+]30, and a loss in torch.float32 can be divided by 5.4e-20 to 1.8e[+]19$",
}


@pytest.mark.parametrize("number", WRONG, ids=repr)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_no_divisor(strategy: str, number: Any) -> None:
    model = tiny_model("7", bptt=strategy, chunk_length=8)
    with pytest.raises(ValueError, match=f"^num_items_in_batch {WRONG[number]}"):
        model(IDS, labels=IDS, num_items_in_batch=number)


def test_a_tensor_that_is_no_divisor() -> None:
    model = tiny_model("7", bptt="reversible", chunk_length=8)
    for number in (torch.tensor(float("inf")), torch.tensor(1j)):
        with pytest.raises(ValueError, match=r"^num_items_in_batch "):
            model(IDS, labels=IDS, num_items_in_batch=number)


@pytest.mark.parametrize(
    "number", [76, 76.0, Fraction(76), np.int64(76), np.float32(76), torch.tensor(76), torch.tensor([76])]
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_numbers_of_every_kind(strategy: str, number: Any) -> None:
    model = tiny_model("7", bptt=strategy, chunk_length=8)
    half = model(IDS, labels=IDS).loss / 2
    torch.testing.assert_close(model(IDS, labels=IDS, num_items_in_batch=number).loss, half)
