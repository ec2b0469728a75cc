"""Recordings that last over steps, on any machine: they are played by running the work again (``test_cuda_graphs``)."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bptt_cases import random_like, random_state, random_tokens, tiny_model
from test_cuda_graphs import Idle, Played, record
from torch import Tensor

from rwkv_rev import RwkvRevForCausalLM
from rwkv_rev.bptt import cuda_graphs, lasting, recordings
from rwkv_rev.errors import ReversalMismatchError
from rwkv_rev.reversal.fixed_point import DecayPlan
from rwkv_rev.wkv import use_kernel

CHUNK = 4


@pytest.fixture(autouse=True)
def played(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Switches recordings on and off; layouts of other machines' kernels hold here where the widths are the same."""
    monkeypatch.setattr(recordings, "_capture", record)
    monkeypatch.setattr(cuda_graphs, "Pace", Idle)
    monkeypatch.setattr(cuda_graphs, "_failures", [])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 1))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(DecayPlan, "holds", lambda self, other: bool((self.widths() == other.widths()).all()))

    def switch(on: bool) -> None:
        monkeypatch.setattr(cuda_graphs, "possible", lambda device: on)
        Played.replays = 0

    return switch


@pytest.fixture
def lasted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Runs by lasting recordings are counted."""
    runs: list[int] = []
    begin = lasting.LastingRunner.begin
    monkeypatch.setattr(
        lasting.LastingRunner, "begin", lambda self, sums: runs.append(1) or begin(self, sums)
    )
    return runs


@pytest.fixture
def precision() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def train(
    version: str,
    strategy: str,
    batches: list[dict[str, Any]],
    lr: float,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Losses, gradients and final states of steps of plain gradient descent."""
    model = tiny_model(version, dtype=dtype)
    found: list[Tensor] = []
    with model.set_bptt(strategy, chunk_length=CHUNK), use_kernel("naive"):
        for batch in batches:
            model.zero_grad()
            output = model(**batch)
            output.loss.backward()
            found += [output.loss.detach().clone(), *(t.clone() for t in output.state.tensors())]
            found += [p.grad.clone() for p in model.parameters()]
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(lr * parameter.grad)
    return found


def batches(kind: str) -> list[dict[str, Any]]:
    model = tiny_model("5.2")
    found: list[dict[str, Any]] = []
    for step, length in enumerate((12, 16, 11, 12)):
        ids = random_tokens(length, 2, seed=step)
        batch: dict[str, Any] = {"input_ids": ids, "labels": ids.clone()}
        if kind == "labels":  # another divisor at each step, chunks that predict nothing
            batch["labels"][:, : 2 * step] = -100
        elif kind == "holes" and step == 2:
            batch["attention_mask"] = torch.ones_like(ids)
            batch["attention_mask"][0, 5:11] = 0
        elif kind == "loss weights" and step != 3:
            batch["loss_weights"] = torch.rand(
                2, length, generator=torch.Generator().manual_seed(step)
            ).round(decimals=1)
        elif kind == "states" and step > 0:
            state = random_state(model, 2, seed=step)
            batch |= {"state": state, "final_state_gradient": random_like(state, step)}
        found.append(batch)
    return found


KINDS = ("plain", "labels", "loss weights", "holes", "states")


@pytest.mark.parametrize(
    ("version", "strategy", "kind"),
    [
        (version, ("reversible", "checkpoint")[(row + column) % 2], kind)
        for row, kind in enumerate(KINDS)
        for column, version in enumerate(("4", "5.2"))
    ],
)
def test_steps_are_what_they_would_have_been(
    played: Callable[[bool], None], lasted: list[int], version: str, strategy: str, kind: str
) -> None:
    """To the bit, over steps of other tokens, weights, lengths, labels, masks and states.

    Every two of version, strategy and kind meet.
    """
    given = batches(kind)
    if kind == "states" and version == "4":
        model = tiny_model("4")
        for step, batch in enumerate(given[1:]):
            batch["state"] = state = random_state(model, 2, seed=step)
            batch["final_state_gradient"] = random_like(state, step)
    lr = 0.0 if kind == "states" else 0.02  # random gradients of a state are no way down
    played(False)
    expected = train(version, strategy, given, lr)
    assert not lasted
    played(True)
    found = train(version, strategy, given, lr)
    steps = 2 if kind in ("loss weights", "states") else 3  # one step is of another kind there
    assert len(lasted) >= steps and Played.replays > 4 * steps
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("strategy", ["reversible", "checkpoint"])
@pytest.mark.parametrize("version", ["5.2", "6"])
def test_steps_in_float64(
    played: Callable[[bool], None], lasted: list[int], version: str, strategy: str
) -> None:
    """Whose memories are integers of another width."""
    given = batches("plain")[:3]
    played(False)
    expected = train(version, strategy, given, 0.02, torch.float64)
    played(True)
    found = train(version, strategy, given, 0.02, torch.float64)
    assert len(lasted) >= 2
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def step(model: RwkvRevForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    with model.set_bptt("reversible", chunk_length=CHUNK), use_kernel("naive"):
        model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("version", "strategy"),
    [("4", "checkpoint"), ("5.2", "reversible"), ("7", "reversible"), ("7", "checkpoint")],
)
def test_a_state_that_begins_narrower_than_it_goes_on(
    played: Callable[[bool], None], lasted: list[int], version: str, strategy: str
) -> None:
    """As where a model in 16 bits is trained under autocast, whose LayerNorms give float32 to the token shift."""
    model, given = tiny_model(version), []
    for number in range(3):
        ids, state = random_tokens(12, 2, seed=number), random_state(model, 2, seed=number)
        narrow = [part.bfloat16() if number_ < 2 else part for number_, part in enumerate(state.tensors())]
        given.append({"input_ids": ids, "labels": ids, "state": type(state)(*narrow)})
    played(False)
    expected = train(version, strategy, given, 0.02)
    played(True)
    found = train(version, strategy, given, 0.02)
    assert len(lasted) == 2
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("change", ["frozen", "moved", "hook", "eval", "autocast", "rows", "precision"])
def test_other_work_is_not_run_by_old_recordings(
    played: Callable[[bool], None], lasted: list[int], change: str, precision: None
) -> None:
    ids, model = random_tokens(12), tiny_model("4")
    played(True)
    for _ in range(2):
        step(model, ids)
    assert len(lasted) == 1
    twin = tiny_model("4")
    for one in (model, twin):
        block = one.blocks[1]
        if change == "frozen":
            block.time_mix.requires_grad_(False)
        elif change == "moved":
            block.time_mix.key.weight = torch.nn.Parameter(2 * block.time_mix.key.weight.detach())
        elif change == "hook":
            block.time_mix.key.register_forward_pre_hook(lambda module, given: (given[0] * 2,))
            from rwkv_rev import position_wise

            for hook in block.time_mix.key._forward_pre_hooks.values():
                position_wise(hook)
        elif change == "eval":
            one.eval()
    if change == "rows":
        ids = random_tokens(12, 3)
    elif change == "precision":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        found = step(model, ids)
        played(False)
        expected = step(twin, ids)
    assert len(lasted) == 1
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def grown(model: RwkvRevForCausalLM) -> RwkvRevForCausalLM:
    """With layers of PyTorch's own inside, which need no declaration."""
    model.blocks[1].ln2 = torch.nn.Sequential(model.blocks[1].ln2, torch.nn.Dropout(0.0), torch.nn.Identity())
    return model


@pytest.mark.parametrize("change", ["dropout", "train", "activation", "strides"])
def test_other_layers_are_not_run_by_old_recordings(
    played: Callable[[bool], None], lasted: list[int], change: str
) -> None:
    """What they go by is no tensor's address: the step is run anew, and is that of a model without recordings."""
    ids, model, twin = random_tokens(12), grown(tiny_model("4")), grown(tiny_model("4"))
    for one in (model, twin):
        if change == "train":
            one.blocks[1].ln2[1].p = 0.5
            one.blocks[1].ln2[1].eval()
    played(True)
    for _ in range(2):
        step(model, ids)
    assert len(lasted) == 1
    for one in (model, twin):
        layers, weight = one.blocks[1].ln2, one.blocks[1].time_mix.key.weight
        if change == "dropout":
            layers[1].p = 0.5
        elif change == "train":
            layers.train()
        elif change == "activation":
            layers[2] = torch.nn.Tanh()
        else:
            weight.data = weight.data.t()
    torch.manual_seed(0)
    found = step(model, ids)
    assert len(lasted) == 1
    played(False)
    torch.manual_seed(0)
    expected = step(twin, ids)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters(played: Callable[[bool], None], lasted: list[int]) -> None:
    """LoRA's recordings last, are those of the weights of the day, and not of another scale, mode or adapter."""
    peft = pytest.importorskip("peft")
    found: list[dict[str, Tensor]] = []
    counts: list[int] = []
    for on in (True, False):
        played(on)
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["receptance", "key"], init_lora_weights=False)
        model = peft.get_peft_model(tiny_model("4"), config)
        lasted.clear()
        for number in range(8):
            layer = model.base_model.model.blocks[0].time_mix.key
            if number == 3:
                layer.scaling["default"] *= 2
            elif number == 5:
                layer.lora_dropout["default"] = torch.nn.Dropout(0.5)
            elif number == 6:
                model.eval()
            elif number == 7:
                layer.merge()
            gradients = step(model, random_tokens(12, seed=number))
            found.append(gradients)
            counts.append(len(lasted))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in gradients:
                        parameter.sub_(0.01 * gradients[name])
    steps = len(found) // 2
    assert counts[:steps] == [0, 1, 2, 2, 3, 3, 3, 3] and counts[steps:] == [0] * steps
    for one, other in zip(found[:steps], found[steps:], strict=True):
        assert one.keys() == other.keys() and one
        for name, gradient in one.items():
            assert torch.equal(gradient, other[name]), name
    gone = weakref.ref(model.base_model.model)
    del model, layer
    gc.collect()
    assert gone() is None


def test_gradients_outlive_the_next_step(played: Callable[[bool], None]) -> None:
    """What was handed out is not written to by recordings that run again."""
    model = tiny_model("4")
    played(True)
    kept = []
    for seed in range(4):
        gradients = step(model, random_tokens(12, seed=seed))
        kept.append((gradients, {name: g.clone() for name, g in gradients.items()}))
        handed_out = {name: p.grad for name, p in model.named_parameters()}
        copies = {name: g.clone() for name, g in handed_out.items() if g is not None}
        model.zero_grad(set_to_none=True)
        step(model, random_tokens(12, seed=9))
        for name, gradient in handed_out.items():
            if gradient is not None:
                assert torch.equal(gradient, copies[name]), name
    for gradients, copies in kept:
        assert all(torch.equal(g, copies[name]) for name, g in gradients.items())


@pytest.mark.parametrize("free", [100, 10**9])
def test_made_by_the_first_step_where_an_optimizer_has_room(
    played: Callable[[bool], None], lasted: list[int], monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    """So that the second one only replays; else at its begin. What the first step hands out stays as it is."""
    model, ids = tiny_model("4"), random_tokens(24)
    played(True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 100))
    first = step(model, ids)
    assert (lasting._kept[model].recordings is not None) == (free > 100)
    replays, handed_out = Played.replays, {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    second = step(model, ids)
    assert len(lasted) == 1 and Played.replays > replays + 10
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]) and torch.equal(gradient, handed_out[name]), name


def test_little_memory_drops_them(
    played: Callable[[bool], None], lasted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("4")
    played(True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 100))
    for _ in range(5):
        step(model, random_tokens(12))
    assert len(lasted) == 1


def test_a_model_that_changes_its_group_keeps_no_recordings() -> None:
    """They hold the communicator of the group before, and NCCL waits for them when that is ended."""
    model = tiny_model("5.2")
    lasting._kept[model] = lasting.Kept("what was done")
    model.set_context_parallel(None)
    assert model not in lasting._kept


def test_another_first_chunk_is_found(
    played: Callable[[bool], None], lasted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose comparison is started before its gradients are made."""
    played(True)
    model, ids = tiny_model("5.2"), random_tokens(20, 2)
    for _ in range(3):
        step(model, ids)
    assert lasted
    advance = lasting.LastingRunner.advance

    def changing(self: Any, chunk: Any, states: Any) -> Any:
        after = advance(self, chunk, states)
        if chunk.index == 0:
            self.sweep.prints[0][1] += 1
        return after

    monkeypatch.setattr(lasting.LastingRunner, "advance", changing)
    with pytest.raises(ReversalMismatchError, match=r"layer 1 .* chunk 0"):
        step(model, ids)
