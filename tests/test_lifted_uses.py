"""Lifted states with all that else a training run has: the gradient of ``checkpoint`` to the bit, or refused by name.

By a trained model: documents, masks, given and tuned states, adapters, quantised maps, losses of one's own, blocks that
are computed again, tapes anywhere, and what must not be lifted at all.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import (
    assert_agree,
    assert_same_bits,
    checkpoint_blocks,
    differentiate,
    english,
    load,
    random_state,
    random_tokens,
    relative_error,
    tiny_model,
)
from quantised_cases import quantised, with_lora
from test_borders import borders_of
from test_lifted_models import lifted
from torch import Tensor

from rwkv_rev import RwkvRevForCausalLM, StrategyError
from rwkv_rev.errors import ReversalMismatchError
from rwkv_rev.reversal.tape import Tape

LENGTH, CHUNK = 16 * 3 + 7, 16


def trained(folders: dict[str, Path]) -> RwkvRevForCausalLM:
    return load(folders["7"], layers=2)


def gradients(
    model: Any, called: Any, strategy: str, remnants: str = "lifted", **inputs: Any
) -> dict[str, Tensor]:
    """Of a wrapped model: the loss, and the gradients of what is trained."""
    called.zero_grad()
    with model.set_bptt(strategy, chunk_length=CHUNK, remnants=remnants):
        output = called(**inputs)
    output.loss.backward()
    found = {name: p.grad.clone() for name, p in called.named_parameters() if p.grad is not None}
    return found | {"loss": output.loss.detach()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_documents_masks_and_a_state(shallow: dict[str, Path]) -> None:
    model, ids = trained(shallow), english(LENGTH, 3)
    mask = torch.ones_like(ids)
    mask[0, :24], mask[1, 15:39], mask[2, ::3] = 0, 0, 0
    masked = {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    packed = {"borders": borders_of([LENGTH], [11, 26, LENGTH - 37], [1, LENGTH - 1])}
    state = random_state(model, 3)
    for more in (masked, packed, {}):
        inputs = {"input_ids": ids, "state": state, **more}
        found, there = (lifted(model, s, CHUNK, **inputs) for s in ("reversible", "checkpoint"))
        assert_same_bits(found, there)
        assert_agree(found, lifted(model, "full", CHUNK, **inputs))


def test_a_tuned_state(shallow: dict[str, Path]) -> None:
    model, ids = trained(shallow).requires_grad_(False), english(LENGTH)
    model.add_initial_state()
    model.model.initial_wkv.requires_grad_(True)
    inputs = {"input_ids": ids, "labels": ids}
    found = gradients(model, model, "reversible", **inputs)
    assert len(found) > 1
    assert same(found, gradients(model, model, "checkpoint", **inputs))
    whole = gradients(model, model, "reversible", "whole", **inputs)
    assert all(relative_error(found[name], whole[name]) <= 1e-5 for name in whole)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters(shallow: dict[str, Path]) -> None:
    model, ids = trained(shallow), english(LENGTH)
    wrapped = with_lora(model.requires_grad_(False))
    inputs = {"input_ids": ids, "labels": ids}
    found = gradients(model, wrapped, "reversible", **inputs)
    assert same(found, gradients(model, wrapped, "checkpoint", **inputs))
    full = gradients(model, wrapped, "full", **inputs)
    assert all(relative_error(found[name], full[name]) <= 1e-4 for name in full)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised(bundled: dict[str, Path], kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    model, ids = quantised(bundled["7"], kind), english(LENGTH)
    wrapped = with_lora(model)
    inputs = {"input_ids": ids, "labels": ids}
    assert same(*(gradients(model, wrapped, s, **inputs) for s in ("reversible", "checkpoint")))


@pytest.mark.parametrize("where", ["device", "host"])
def test_a_loss_of_ones_own(shallow: dict[str, Path], where: str) -> None:
    model, ids = trained(shallow), english(LENGTH, 2)

    def found(strategy: str, remnants: str) -> dict[str, Tensor]:
        model.zero_grad()
        with model.set_bptt(strategy, chunk_length=CHUNK, remnants=remnants, hidden_states=where):
            hidden = model.model(ids).last_hidden_state
            loss = hidden.to("cpu").square().logsumexp(1).mean()
            loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return gradients | {"loss": loss.detach()}

    back = found("reversible", "lifted")
    assert same(back, found("checkpoint", "lifted"))
    full = found("full", "whole")
    assert all(relative_error(back[name], full[name]) <= 1e-4 for name in full)


def test_tapes_and_blocks_that_are_computed_again(shallow: dict[str, Path], tmp_path: Path) -> None:
    model, ids = trained(shallow), english(LENGTH)
    expected = lifted(model, "checkpoint", CHUNK, input_ids=ids)
    checkpoint_blocks(model)
    for tape in ("host", "device", "disk"):
        with model.set_bptt("reversible", remnants="lifted", tape=tape, tape_dir=str(tmp_path)):
            found = differentiate(model, "reversible", CHUNK, input_ids=ids)
        assert_same_bits(found, expected)


def test_strategies_without_a_choice(shallow: dict[str, Path]) -> None:
    """``full`` and ``truncated`` keep nothing; what is divided is refused, as without."""
    model, ids = trained(shallow), english(LENGTH)
    for strategy in ("full", "truncated"):
        assert_same_bits(
            lifted(model, strategy, CHUNK, input_ids=ids),
            lifted(model, strategy, CHUNK, "whole", input_ids=ids),
        )
    with pytest.raises(StrategyError, match="cannot be divided back"):
        lifted(model, "reversible-lossy", CHUNK, input_ids=ids)


@pytest.mark.parametrize(
    ("length", "chunk"), [(1, 1), (2, 1), (4, 1), (64, 64), (65, 64), (5, 64)], ids=lambda value: str(value)
)
def test_few_tokens(shallow: dict[str, Path], length: int, chunk: int) -> None:
    """In float64, where a few tokens round as little as many."""
    model, ids = trained(shallow).double(), english(length)
    labels = {} if length > 1 else {"shift_labels": ids, "labels": None}
    inputs = {"input_ids": ids, "state": random_state(model, 1), **labels}
    found, there = (lifted(model, s, chunk, **inputs) for s in ("reversible", "checkpoint"))
    assert_same_bits(found, there)
    assert_agree(found, lifted(model, "full", chunk, **inputs))


@pytest.mark.parametrize("size", [16, 20, 36, 128])
def test_heads_of_other_sizes(size: int) -> None:
    model, ids = tiny_model("7", hidden_size=2 * size, head_size=size), random_tokens(39, 2)
    found, there = (lifted(model, s, 16, input_ids=ids) for s in ("reversible", "checkpoint"))
    assert_same_bits(found, there)
    assert_agree(found, lifted(model, "reversible", 16, "whole", input_ids=ids))


@pytest.mark.parametrize("place", range(0, 12, 3))
def test_a_fault_on_the_tape(shallow: dict[str, Path], monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """A bit of one of a record's tensors: bits, codes, grids, token shifts and what is compared."""
    model, ids, pop = trained(shallow), english(LENGTH), Tape.pop

    def damaged(tape: Tape) -> list[list[Tensor]]:
        record = pop(tape)
        there = [tensor for group in record for tensor in group if tensor.numel()]
        broken = there[place % len(there)].view(-1).view(torch.uint8)
        broken[len(broken) // 2] ^= 1 << 3
        return record

    monkeypatch.setattr(Tape, "pop", damaged)
    with pytest.raises(ReversalMismatchError):
        lifted(model, "reversible", CHUNK, input_ids=ids)


def test_the_report_says_so(shallow: dict[str, Path]) -> None:
    model, ids = trained(shallow), english(LENGTH)
    assert lifted(model, "reversible", CHUNK, input_ids=ids).report["remnants"] == "lifted"
    assert "remnants" not in lifted(model, "reversible", CHUNK, "auto", input_ids=ids).report
