"""Models of RWKV-7 whose states are lifted: every state exact, gradients those of ``checkpoint`` to the bit.

The bundled checkpoint, and the tiny one of a peer where it is there.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import (
    Outcome,
    assert_agree,
    assert_same_bits,
    differentiate,
    english,
    load,
    random_state,
    random_tokens,
    tiny_model,
)
from test_borders import borders_of

import rwkv_rev
from rwkv_rev import RwkvRevForCausalLM, StrategyError
from rwkv_rev.equivalence.reversal import ReversalCheck, check_reversal

PEER = Path(__file__).parents[2] / "shared" / "peer" / "tiny-rwkv-7v0-834K.pth"
SIZES = {"hidden_size": 32, "head_size": 16}


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the peer's checkpoint."""
    if not PEER.exists():
        pytest.skip("no checkpoint of a peer here")
    rwkv_rev.convert(PEER, folder := tmp_path_factory.mktemp("peer") / "model")
    return folder


def lifted(
    model: RwkvRevForCausalLM, strategy: str, chunk: int, remnants: str = "lifted", **inputs: Any
) -> Outcome:
    with model.set_bptt(strategy, remnants=remnants):
        return differentiate(model, strategy, chunk, **inputs)


def check(found: ReversalCheck) -> None:
    """Every state back, and by layer at most 1.2 bits above the entropy."""
    assert found.passed, found.mismatch
    for layer in found.layers:
        assert layer.theory is not None
        numbers = layer.whole / 32
        assert layer.remnants / numbers <= layer.theory / numbers + 1.2


@pytest.mark.parametrize(("context", "chunk"), [(16 * 5 + 5, 16), (64 * 3 + 1, 64), (512 * 2 + 77, 512)])
def test_every_state_of_the_bundled_model(shallow: dict[str, Path], context: int, chunk: int) -> None:
    found = check_reversal(load(shallow["7"]).eval(), english(context)[0], chunk=chunk)
    check(found)
    assert found.used_bits < 0.75 * found.whole_bits


@pytest.mark.parametrize(("context", "chunk"), [(16 * 3 + 3, 16), (256 * 2 + 9, 256)])
def test_every_state_of_a_peers_model(peer: Path, context: int, chunk: int) -> None:
    found = check_reversal(load(peer, layers=3).eval(), english(context)[0], chunk=chunk)
    check(found)
    assert found.used_bits < 0.5 * found.whole_bits


@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
def test_gradients_are_those_of_checkpoint_to_the_bit(half: bool) -> None:
    model, ids = tiny_model("7", **SIZES), random_tokens(40 * 2 + 7, batch=2)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        found, whole = (
            lifted(model, strategy, 40, input_ids=ids) for strategy in ("reversible", "checkpoint")
        )
        plain = lifted(model, "reversible", 40, "whole", input_ids=ids)
    assert_same_bits(found, whole)
    if not half:
        assert_agree(found, plain)
    assert found.report["tape_bytes"] < 0.75 * whole.report["tape_bytes"]


def test_gradients_of_a_trained_model(shallow: dict[str, Path]) -> None:
    model, ids = load(shallow["7"]), english(64 * 2 + 20)
    found, whole = (lifted(model, strategy, 64, input_ids=ids) for strategy in ("reversible", "checkpoint"))
    assert_same_bits(found, whole)
    assert_agree(found, lifted(model, "full", 300, input_ids=ids))


@pytest.mark.parametrize(
    ("tokens", "chunk", "half"), [(1024, 256, False), (512, 256, True)], ids=["float32", "autocast"]
)
def test_gradients_over_many_tokens(shallow: dict[str, Path], tokens: int, chunk: int, half: bool) -> None:
    """And five more, a chunk of their own; the whole table: ``examples/lifting/exact.py``."""
    model, ids = load(shallow["7"]), english(tokens + 5)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        assert_same_bits(*(lifted(model, s, chunk, input_ids=ids) for s in ("reversible", "checkpoint")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "tokens", "chunk", "half"),
    [
        pytest.param("bundled", 64, 32, True, id="bundled-64-32-autocast"),
        pytest.param("peer", 64, 32, False, id="peer-64-32-float32"),
    ],
)
def test_whole_models(
    request: pytest.FixtureRequest,
    bundled: dict[str, Path],
    which: str,
    tokens: int,
    chunk: int,
    half: bool,
) -> None:
    """Every state of every layer, its bits, and the gradient: two models, chunk lengths and precisions.

    Five tokens more are a chunk of their own. The lowest layers alone are tested over more chunks and by more pairs
    above; the whole table: ``examples/lifting/exact.py``.
    """
    folder = bundled["7"] if which == "bundled" else request.getfixturevalue("peer")
    model, ids = load(folder), english(tokens + 5)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        check(check_reversal(model.eval(), ids[0], chunk=chunk))
        model.train()
        assert_same_bits(*(lifted(model, s, chunk, input_ids=ids) for s in ("reversible", "checkpoint")))


def test_masks_borders_and_states_that_go_on() -> None:
    """Left padding, holes, right padding, a row of nothing; documents of which some begin inside of chunks."""
    model, ids = tiny_model("7", **SIZES), random_tokens(100, batch=3)
    mask = torch.ones(3, 100, dtype=torch.int64)
    mask[0, :45], mask[1, 30:75], mask[2, ::3] = 0, 0, 0
    masked = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    state = random_state(model, 3)
    packed = {"input_ids": ids, "borders": borders_of([100], [21, 50, 29], [1, 99])}
    for inputs in (masked, packed):
        found, whole = (
            lifted(model, strategy, 20, state=state, **inputs) for strategy in ("reversible", "checkpoint")
        )
        assert_same_bits(found, whole)
        assert_agree(found, lifted(model, "reversible", 20, "whole", state=state, **inputs))


def test_the_word_is_one_of_three_and_changes_nothing_else() -> None:
    model, ids = tiny_model("7", **SIZES), random_tokens(100)
    with pytest.raises(
        StrategyError, match=r"remnants = 'small' does not exist; use one of auto, whole, lifted"
    ):
        model.set_bptt("reversible", remnants="small")
    for remnants in ("auto", "whole"):
        assert_same_bits(
            lifted(model, "reversible", 40, remnants, input_ids=ids),
            differentiate(model, "checkpoint", 40, input_ids=ids),
        )
    other = tiny_model("6")
    with pytest.raises(
        StrategyError, match=r"states of RWKV-7, and this model is RWKV-6.*: use auto or whole"
    ):
        other.set_bptt("reversible", remnants="lifted")
    assert other.bptt.remnants == "auto"


@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("chunk", [64, 256, 500])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(bundled: dict[str, Path], chunk: int, half: bool) -> None:
    """4,096 tokens: states, bits, and gradients; in the fourth step by lasting recordings."""
    model, ids = load(bundled["7"]).cuda(), english(4096, batch=2).cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        check(check_reversal(model.eval(), ids[0], chunk=chunk))
        model.train()
        whole = lifted(model, "checkpoint", chunk, input_ids=ids)
        for _ in range(4):
            found = lifted(model, "reversible", chunk, input_ids=ids)
            assert_same_bits(found, whole)
            assert found.report["tape_bytes"] < 0.9 * whole.report["tape_bytes"]
