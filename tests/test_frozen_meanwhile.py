"""Parameters that declared code freezes, or unfreezes, while a loss is computed: an error by name in chunks."""

from typing import Any

import pytest
import torch
from bptt_cases import assert_agree, differentiate, random_tokens, tiny_model

from rwkv_rev import RwkvRevForCausalLM, position_wise
from rwkv_rev.errors import StrategyError

IDS = random_tokens(13)
CHUNK = 5


def changing(freeze: bool, put_back: bool = False) -> RwkvRevForCausalLM:
    model = tiny_model("5.2", dtype=torch.float64)
    weight = model.blocks[1].time_mix.key.weight
    weight.requires_grad_(freeze)

    @position_wise
    def before(module: Any, given: Any) -> None:
        weight.requires_grad_(not freeze)
        if put_back:
            weight.requires_grad_(freeze)

    model.blocks[0].register_forward_pre_hook(before)
    return model


@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "unfrozen"])
@pytest.mark.parametrize("strategy", ["checkpoint", "reversible", "truncated"])
def test_refused_by_name(strategy: str, freeze: bool) -> None:
    words = f"time_mix.key.weight was {'frozen' if freeze else 'unfrozen'} while the loss was computed"
    model = changing(freeze)
    with model.set_bptt(strategy, chunk_length=CHUNK), pytest.raises(StrategyError, match=words):
        model(IDS, labels=IDS).loss.backward()
    if strategy != "truncated":  # which is for a labelled loss alone
        model = changing(freeze)
        with model.set_bptt(strategy, chunk_length=CHUNK), pytest.raises(StrategyError, match=words):
            model(IDS).logits.square().mean().backward()


def test_what_is_put_back_is_no_change() -> None:
    full = differentiate(changing(True, put_back=True), "full", input_ids=IDS)
    for strategy in ("checkpoint", "reversible"):
        assert_agree(
            differentiate(changing(True, put_back=True), strategy, CHUNK, input_ids=IDS), full, 1e-10
        )
