"""Chunk length ``auto``: by faked free memory, once, the same in every process; numbers stay what they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import random_tokens, tiny_model
from processes import in_ranks
from torch import Tensor, nn
from transformers.utils import logging

from rwkv_rev import RwkvRevForCausalLM, chunk_length, position_wise
from rwkv_rev.bptt import choose_strategy
from rwkv_rev.bptt_settings import CHUNK_LENGTH
from rwkv_rev.chunk_length import LENGTHS, ON_CPU, USABLE, choose

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MUCH, LITTLE = 1 << 50, 1
IDS = random_tokens(600)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the free memory of a device that is the CPU and is treated like a GPU."""
    monkeypatch.setattr(chunk_length, "FORECAST_ON", ("cpu",))

    def be(number: int) -> None:
        monkeypatch.setattr(chunk_length, "free_bytes", lambda device: number)

    be(MUCH)
    return be


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(logging.get_logger("rwkv_rev.modeling"), "warning", found.append)
    return found


def report(model: RwkvRevForCausalLM, ids: Tensor = IDS) -> tuple[str, int]:
    found = model(ids, labels=ids).report
    return found["strategy"], found["chunk_length"]


@pytest.mark.parametrize(
    ("free_bytes", "tokens"),
    [(MUCH, 16384), (16384 * 1000, 8192), (5000 * 1000, 4096), (256 * 1000 / USABLE, 256), (0, 256)],
)
def test_the_longest_that_fits(monkeypatch: pytest.MonkeyPatch, free_bytes: int, tokens: int) -> None:
    monkeypatch.setattr(chunk_length, "free_bytes", lambda device: free_bytes)
    chosen = choose("auto", CUDA, lambda chunk: 1000 * chunk)
    assert chosen.tokens == tokens
    assert "GB" in chosen.why and ("may not fit" in chosen.why) == (free_bytes == 0)


def test_what_does_not_depend_on_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_length, "free_bytes", lambda device: MUCH)
    for strategy in ("full", "truncated", "reversible-lossy"):
        for device in (CPU, CUDA):
            assert choose(strategy, device, lambda chunk: 0).tokens == CHUNK_LENGTH
    assert choose("reversible", CPU, None).tokens == ON_CPU
    assert choose("reversible", CUDA, None).tokens == CHUNK_LENGTH
    assert choose("auto", torch.device("xpu"), lambda chunk: 0).tokens == CHUNK_LENGTH


def test_it_is_the_default_and_no_number_is_touched(free: Callable[[int], None]) -> None:
    model = tiny_model("5.2")
    assert model.bptt.chunk_length == "auto"
    assert report(model) == ("full", 600)
    with model.set_bptt("auto", chunk_length=100):
        assert report(model) == ("reversible", 100)
    with model.set_bptt("reversible"):
        assert report(model) == ("reversible", LENGTHS[-1])


@pytest.mark.parametrize("version", ["4", "5.2"])
def test_little_memory_is_the_gradient_of_short_chunks(version: str, free: Callable[[int], None]) -> None:
    """The same bits as with that number, from the model's own loss and from one of somebody else's."""
    free(LITTLE)
    model = tiny_model(version)
    assert report(model) == ("reversible", LENGTHS[0])
    found = []
    for length in ("auto", LENGTHS[0]):
        with model.set_bptt("auto", chunk_length=length):
            own = torch.autograd.grad(model(IDS, labels=IDS).loss, list(model.parameters()))
            others = torch.autograd.grad(model(IDS).logits.square().mean(), list(model.parameters()))
            found.append([*own, *others])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_chosen_once(free: Callable[[int], None], told: list[str]) -> None:
    model = tiny_model("5.2")
    short = IDS[:, : LENGTHS[0]]
    free(LITTLE)
    assert report(model, short) == ("full", LENGTHS[0])  # nothing to choose: the first longer one does
    free(MUCH)
    with model.set_bptt("reversible"):
        assert report(model) == ("reversible", LENGTHS[-1])
        free(LITTLE)
        assert report(model) == ("reversible", LENGTHS[-1])
        assert report(model, short) == ("reversible", LENGTHS[-1])
        assert not told
        # more rows take more memory
        assert report(model, IDS.expand(2, -1)) == ("reversible", LENGTHS[0])
        assert "was 16,384 tokens and is 256 from now on, for 2 rows" in told[0] and len(told) == 1
        free(MUCH)
        assert report(model) == ("reversible", LENGTHS[0])
    with model.set_bptt("reversible", chunk_length="auto"):
        assert report(model) == ("reversible", LENGTHS[-1])
    assert len(told) == 1


def test_what_is_cut_does_not_depend_on_what_was_chosen(free: Callable[[int], None]) -> None:
    model = tiny_model("5.2")
    ids = random_tokens(CHUNK_LENGTH + 10)
    for _ in range(2):
        with model.set_bptt("reversible"):
            assert report(model, ids) == ("reversible", LENGTHS[-1])
        with model.set_bptt("truncated"):
            assert report(model, ids) == ("truncated", CHUNK_LENGTH)


def test_more_trained_weights_choose_anew(free: Callable[[int], None], told: list[str]) -> None:
    model = tiny_model("5.2")
    model.head.requires_grad_(False)
    model.model.embeddings.requires_grad_(False)
    model.set_bptt("reversible")
    report(model)
    free(LITTLE)
    assert report(model)[1] == LENGTHS[-1]
    model.requires_grad_(True)
    assert report(model)[1] == LENGTHS[0] and len(told) == 1


def test_without_gradients_nothing_is_chosen(free: Callable[[int], None]) -> None:
    free(LITTLE)
    model = tiny_model("5.2")
    with torch.no_grad():
        assert report(model) == ("full", CHUNK_LENGTH)
        assert model.model.chunk_length(1, 5000, CPU) == CHUNK_LENGTH
    free(MUCH)
    with model.set_bptt("reversible"):
        assert report(model)[1] == LENGTHS[-1]


def declared(model: RwkvRevForCausalLM) -> Any:
    @position_wise
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * 1

    model.model.blocks[0].channel_mix.key.register_forward_hook(hook)
    return model


def adapted(model: RwkvRevForCausalLM) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["key"]))


def test_what_cannot_be_forecast(free: Callable[[int], None], told: list[str]) -> None:
    model = declared(tiny_model("5.2"))
    model.set_bptt("reversible")
    for _ in range(2):
        assert report(model)[1] == CHUNK_LENGTH
    (line,) = told
    assert "declared.<locals>.hook on blocks.0.channel_mix.key keeps is not forecast" in line
    assert "chunk_length=4096" in line and "\n" not in line


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_forecast(free: Callable[[int], None]) -> None:
    """They are trained in as long chunks as fit, also where they come later; what they keep is counted."""
    model = tiny_model("5.2")
    model.set_bptt("reversible")
    assert report(model)[1] == LENGTHS[-1]
    ids = random_tokens(4000)
    model.requires_grad_(False)  # as below
    plain = least(model, free, 512, input_ids=ids, handed_out=False)
    free(MUCH)
    changed = adapted(model)
    assert changed(input_ids=IDS, labels=IDS).report["chunk_length"] == LENGTHS[-1]
    kept = least(model, free, 512, input_ids=ids, handed_out=False)
    # per layer two maps of 16 + 16 and 16 + 32, one adapter each; its weights are few
    assert (kept - plain) * USABLE >= 2 * 512 * (32 + 48) * 4


def test_a_model_that_is_not_ours() -> None:
    assert choose_strategy("auto", 2000, chunk_length="auto").chunk_length == CHUNK_LENGTH
    assert choose_strategy("auto", CHUNK_LENGTH, chunk_length="auto").name == "full"


def least(model: RwkvRevForCausalLM, free: Callable[[int], None], tokens: int, **inputs: Any) -> int:
    """The free memory from which on ``tokens`` are chosen for a loss on logits, by bisection."""
    low, high = 0, 1 << 40
    while high - low > 1:
        free(middle := (low + high) // 2)
        model.model.auto_length = chunk_length.AutoLength()
        ids = inputs["input_ids"]
        enough = model.model.chunk_length(*ids.shape, CPU, handed_out=inputs["handed_out"]) >= tokens
        low, high = (low, middle) if enough else (middle, high)
    return high


def test_what_is_counted(free: Callable[[int], None]) -> None:
    """Optimizer and accumulated gradients, hidden states that are handed out, and a tape on the device."""
    model = tiny_model("5.2")
    count = sum(parameter.numel() for parameter in model.parameters())
    ids = random_tokens(4000)
    plain = least(model, free, 512, input_ids=ids, handed_out=False)
    given = least(model, free, 512, input_ids=ids, handed_out=True)
    assert (given - plain) * USABLE == pytest.approx(3 * 4 * 4000 * 16, rel=0.01)
    with model.set_bptt("reversible", hidden_states="host"):
        assert least(model, free, 512, input_ids=ids, handed_out=True) == plain
    with model.set_bptt("reversible", tape="device"):
        assert least(model, free, 512, input_ids=ids, handed_out=False) > plain
    assert least(model, free, 512, input_ids=ids.expand(2, -1), handed_out=False) > 1.5 * plain
    model.requires_grad_(False)
    frozen = least(model, free, 512, input_ids=ids, handed_out=False)
    # no gradient, its sum, moments and a further copy, 4 bytes each
    assert (plain - frozen) * USABLE >= 4 * 4 * count


def test_a_shared_tape_is_counted_once(free: Callable[[int], None]) -> None:
    """Of each rank its share, where the tape lies on the device."""
    model, device = tiny_model("7"), torch.device("cpu")
    needs = {}
    for tape, ranks in (("host", 1), ("device", 1), ("device", 2)):
        model.set_bptt("reversible", tape=tape)
        needs[tape, ranks] = chunk_length._need(model.model, 1, 60000 // ranks, device, ranks, False, (0, 0))(
            64
        )
    whole, share = (needs["device", ranks] - needs["host", 1] for ranks in (1, 2))
    assert 0 < share < 0.3 * whole  # half as many chunks, of which half a record each


def in_a_rank(rank: int) -> list[tuple[int, Tensor]]:
    """One device has little memory left; its first context is a long one, the other's a short one."""
    chunk_length.FORECAST_ON = ("cpu",)
    chunk_length.free_bytes = lambda device: LITTLE if rank else MUCH
    model = tiny_model("5.2")
    model.set_bptt("reversible")
    found = []
    for ids in (IDS if rank else IDS[:, :100], IDS, IDS.expand(2 - rank, -1)):
        output = model(ids, labels=ids)
        found.append((output.report["chunk_length"], output.loss.detach()))
    return found


@pytest.mark.dist
def test_several_processes_take_the_shortest(tmp_path: Path) -> None:
    one, other = in_ranks(in_a_rank, 2, tmp_path)
    assert [length for length, _ in one + other] == [LENGTHS[0]] * 6
    assert torch.equal(one[1][1], other[1][1])
