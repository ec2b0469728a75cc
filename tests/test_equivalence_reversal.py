"""The reversal section of ``verify``: bits come back, are counted, and damage to them is seen."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv_rev.cells.block import Block, BlockAgain
from rwkv_rev.equivalence.reversal import check_reversal
from rwkv_rev.equivalence.text import default_text
from rwkv_rev.modeling import RwkvRevForCausalLM
from rwkv_rev.reversal.drift import division_drift
from rwkv_rev.reversal.packing import BitPacking


@pytest.fixture(scope="module", params=["4", "5.2"])
def model(request: pytest.FixtureRequest, bundled: dict[str, Path]) -> RwkvRevForCausalLM:
    return RwkvRevForCausalLM.from_pretrained(bundled[request.param], dtype=torch.float32).eval()


def text(tokens: int) -> torch.Tensor:
    return torch.tensor(list(default_text().encode()[:tokens]))


@pytest.mark.parametrize(("context", "chunk"), [(300, 64), (430, 100), (1024, 256)], ids=lambda n: str(n))
def test_states_come_back_to_the_bit(model: RwkvRevForCausalLM, context: int, chunk: int) -> None:
    found = check_reversal(model, text(context), chunk=chunk, drift_steps=(16,))
    assert found.passed, found.mismatch
    assert (found.context, found.chunk, found.boundaries) == (context, chunk, -(-context // chunk))
    assert found.counted == context - chunk
    assert found.tape_bytes >= found.shift_bytes + found.used_bits / 8
    assert found.theory_bits <= found.used_bits + 1e-6
    if model.config.architecture.has_heads:
        # the promises of the project; theory is 24 % and 46 %
        share = {64: 0.36, 100: 0.42, 256: 0.57}[chunk]
        assert found.used_bits <= share * found.whole_bits
    else:
        assert found.used_bits == found.whole_bits  # the remnant of RWKV-4 is its state
    json.dumps(found.to_dict(), allow_nan=False)


def test_theory_is_what_the_decays_forget(model: RwkvRevForCausalLM) -> None:
    """Nine counted chunks of one token: log2(1/w) each, at most 32, per element of the layer's memory."""
    found = check_reversal(model, text(10), chunk=1, drift_steps=(1,))
    bits = 0.0
    for block in model.model.blocks:
        each = (
            torch.exp(block.time_mix.time_decay.detach().double()) / torch.log(torch.tensor(2.0).double())
        ).clamp(max=32)
        bits += float(each.sum()) * (model.config.head_size if model.config.architecture.has_heads else 3)
    assert found.theory_bits == pytest.approx(9 * bits, rel=1e-5)


def test_a_wrong_bit_on_the_tape_is_named(model: RwkvRevForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    if not model.config.architecture.has_heads:
        pytest.skip("RWKV-4 keeps its state whole, nothing is unpacked")
    unpack = BitPacking.unpack

    def damaged(self: BitPacking, packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        values = unpack(self, packed, shape)
        values.view(-1)[17] ^= 1
        return values

    monkeypatch.setattr(BitPacking, "unpack", damaged)
    found = check_reversal(model, text(64), chunk=16, drift_steps=(1,))
    assert not found.passed
    assert "layer 0 before chunk 3" in str(found.mismatch)
    assert "NO, " in "\n".join(found.lines())


def test_other_arithmetic_on_the_way_back_is_named(
    model: RwkvRevForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and token shifts are compared too: one ulp in a residual stream does not pass."""
    forward = Block.forward

    def disturbed(self: Block, x: torch.Tensor, asked: Any, mask: None = None) -> tuple[torch.Tensor, Any]:
        out, found = forward(self, x, asked, mask)
        if isinstance(asked, BlockAgain) and asked.remnants is not None and self.time_mix.layer == 2:
            out = torch.nextafter(out, torch.full_like(out, torch.inf))
        return out, found

    monkeypatch.setattr(Block, "forward", disturbed)
    found = check_reversal(model, text(64), chunk=16, drift_steps=(1,))
    assert found.mismatch == "the output of layer 2 differs before chunk 3"


def test_a_short_text_still_has_boundaries(model: RwkvRevForCausalLM) -> None:
    found = check_reversal(model, text(9), drift_steps=(1,))
    assert (found.chunk, found.boundaries, found.passed) == (2, 5, True)
    assert check_reversal(model, text(1), drift_steps=(1,)).passed


def test_plain_division_drifts_by_the_decay() -> None:
    """An error grows by 1/w per step: the slope of its logarithm is log2(1/w)."""
    bits = torch.tensor([[0.05, 0.5], [1.0, 2.0]], dtype=torch.float64)
    drift = division_drift(-bits * torch.log(torch.tensor(2.0)), (8, 16), torch.float64)
    assert drift.shape == (2, 2, 2)
    growth = torch.log2(drift[1] / drift[0]) / 8
    torch.testing.assert_close(growth[1], bits[1], rtol=0.2, atol=0)
    assert (drift[0] < 1e-10).all()
    lost = division_drift(-bits * torch.log(torch.tensor(2.0)), (8, 64), torch.float32)
    assert (lost[1, 1] > 1e6).all()
    assert division_drift(torch.tensor([-torch.inf]), (4,), torch.float64).isinf().all()
    assert (division_drift(torch.zeros(1), (64,), torch.float64) < 1e-13).all()
