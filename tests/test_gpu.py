"""The promises of the reversible trainer on a CUDA device (marker ``gpu``)."""

import copy
import gc
import math
import pydoc_data.topics
import weakref
from pathlib import Path

import pytest
import torch

import rwkv_rev
from rwkv_rev.benchmark.growth import longest_context
from rwkv_rev.benchmark.memory import cuda_point
from rwkv_rev.benchmark.models import benchmark_model
from rwkv_rev.benchmark.training import compare, random_tokens, step
from rwkv_rev.bptt import cuda_graphs, lasting, recordings
from rwkv_rev.errors import ReversalMismatchError
from rwkv_rev.reversal.tape import Tape
from rwkv_rev.state import RwkvRevState

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

DEVICE = torch.device("cuda")
TEXT = "\n".join(pydoc_data.topics.topics.values()).encode()
CONTEXT = 4096


def gradients(model, ids, strategy, chunk_length, autocast):
    model.zero_grad()
    with (
        model.set_bptt(strategy, chunk_length=chunk_length),
        torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast),
    ):
        loss = model(ids, labels=ids).loss
        loss.backward()
    flat = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    model.zero_grad()
    return loss.item(), flat


def relative(found, truth):
    return float((found - truth).norm() / truth.norm())


@pytest.fixture(scope="module", params=["bundled:rwkv-5.2", "bundled:rwkv-4"])
def trained(request, tmp_path_factory):
    directory = Path(tmp_path_factory.mktemp("model")) / "converted"
    rwkv_rev.convert(request.param, directory)
    ids = torch.tensor(list(TEXT[:CONTEXT]), device=DEVICE)[None]
    truth = rwkv_rev.RwkvRevForCausalLM.from_pretrained(directory, dtype=torch.float64).to(DEVICE)
    reference = gradients(truth, ids, "full", CONTEXT, autocast=False)
    model = rwkv_rev.RwkvRevForCausalLM.from_pretrained(directory, dtype=torch.float32).to(DEVICE)
    return model, ids, reference


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("chunk_length", [64, 256, 1000])
def test_strategies_give_the_gradient_of_the_whole_context(trained, chunk_length, autocast, capsys):
    model, ids, (_, truth) = trained
    full_loss, full = gradients(model, ids, "full", chunk_length, autocast)
    checkpoint_loss, checkpoint = gradients(model, ids, "checkpoint", chunk_length, autocast)
    reversible_loss, reversible = gradients(model, ids, "reversible", chunk_length, autocast)
    errors = {
        "full": relative(full, truth),
        "checkpoint": relative(checkpoint, truth),
        "reversible": relative(reversible, truth),
        "reversible to full": relative(reversible, full),
        "reversible to checkpoint": relative(reversible, checkpoint),
    }
    with capsys.disabled():
        print(
            f"\nRWKV-{model.config.rwkv_version} C={chunk_length} {'bf16' if autocast else 'fp32'}",
            {name: f"{error:.2e}" for name, error in errors.items()},
        )
    assert reversible_loss == checkpoint_loss
    assert errors["reversible to checkpoint"] <= 1e-5
    assert errors["reversible"] <= 1.5 * errors["full"] + 1e-7
    if not autocast:
        assert errors["reversible to full"] <= 1e-5
        assert reversible_loss == pytest.approx(full_loss, rel=1e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("strategy", ["checkpoint", "reversible"])
def test_graphs_change_no_bit(trained, strategy, autocast, monkeypatch):
    model, ids, _ = trained
    runs = []
    run = recordings.BackwardRecording.run
    monkeypatch.setattr(
        recordings.BackwardRecording, "run", lambda *arguments: runs.append(1) or run(*arguments)
    )
    with_graphs = gradients(model, ids, strategy, 128, autocast)
    assert len(runs) >= CONTEXT // 128 - 8
    monkeypatch.setenv(cuda_graphs.SWITCH, "0")
    without = gradients(model, ids, strategy, 128, autocast)
    assert len(runs) < CONTEXT // 128
    assert with_graphs[0] == without[0]
    assert torch.equal(with_graphs[1], without[1])


def test_graphs_of_a_frozen_base_with_low_rank_additions(trained, monkeypatch):
    peft = pytest.importorskip("peft")
    model, ids, _ = trained
    model = copy.deepcopy(model)
    settings = peft.LoraConfig(r=4, lora_dropout=0.0, target_modules=["key", "receptance"])
    wrapped = peft.get_peft_model(model, settings).train()
    state = model.model.initial_state(1)
    runs = []
    for switch in ("1", "0"):
        monkeypatch.setenv(cuda_graphs.SWITCH, switch)
        initial = RwkvRevState(*(t.detach().requires_grad_() for t in state.tensors()))
        wrapped.zero_grad()
        with model.set_bptt("reversible", chunk_length=128):
            loss = wrapped(input_ids=ids, labels=ids, state=initial).loss
            loss.backward()
        trained_only = {name: p.grad for name, p in wrapped.named_parameters() if p.grad is not None}
        assert trained_only and all("lora_" in name for name in trained_only)
        runs.append([loss.detach(), *trained_only.values(), *(t.grad for t in initial.tensors())])
    assert not cuda_graphs._failures
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_a_model_on_the_second_gpu(trained, autocast):
    """Kernels and graphs run where the tensors are, not on the current device."""
    model, ids, _ = trained
    expected = gradients(model, ids, "reversible", 128, autocast)
    moved = copy.deepcopy(model).to("cuda:1")
    found = gradients(moved, ids.to("cuda:1"), "reversible", 128, autocast)
    assert torch.cuda.current_device() == 0
    assert not cuda_graphs._failures
    assert found[0] == expected[0]
    assert torch.equal(found[1].cpu(), expected[1].cpu())


def test_a_wrong_state_is_noticed_in_a_graph(trained, monkeypatch):
    model, ids, _ = trained
    pop = Tape.pop_flat
    records = []

    def spoilt(tape):
        record = pop(tape)
        records.append(record)
        if len(records) == 9:  # well after the recording; the packed remnant, or the state, of layer 3
            record.tensors()[3 * 3 + 1][1].flatten().view(torch.uint8)[5] ^= 1
        return record

    monkeypatch.setattr(Tape, "pop_flat", spoilt)
    with pytest.raises(ReversalMismatchError, match="layer 3"):
        gradients(model, ids, "reversible", 128, False)


def test_recordings_that_last_change_no_bit(monkeypatch):
    """Steps of a training, with other data each and weights that move; and the model takes its recordings along."""
    batches = [torch.randint(256, (2, 1024), device=DEVICE) for _ in range(5)]
    runs = []
    begin = lasting.LastingRunner.begin
    monkeypatch.setattr(
        lasting.LastingRunner, "begin", lambda self, sums: runs.append(1) or begin(self, sums)
    )
    outcomes = []
    for switch in ("1", "0"):
        monkeypatch.setenv(cuda_graphs.SWITCH, switch)
        torch.manual_seed(0)
        model = benchmark_model("5.2-15m", DEVICE, torch.bfloat16).train()
        found = []
        with model.set_bptt("reversible", chunk_length=128):
            for step_number, ids in enumerate(batches):
                labels = ids.clone()
                labels[:, : 100 * step_number] = -100
                model.zero_grad()
                loss = model(ids, labels=labels).loss
                loss.backward()
                found += [loss.detach().clone(), *(p.grad.clone() for p in model.parameters())]
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.sub_(0.01 * parameter.grad)
        outcomes.append(found)
    assert not cuda_graphs._failures
    assert len(runs) >= 3, "recorded in the third step, and run from there on"
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_memory_does_not_grow_with_the_context(capsys):
    model = benchmark_model("5.2-0.1b", DEVICE, torch.bfloat16)
    peaks = {}
    for length in (16_384, 1_048_576):
        ids = random_tokens(model, 1, length)
        gc.collect()
        torch.cuda.empty_cache()
        with model.set_bptt("reversible", chunk_length=4096, tape="host"):
            torch.cuda.reset_peak_memory_stats()
            seconds, report = step(model, ids)
        # the token ids themselves, their targets and labels are the input, not the trainer's
        peaks[length] = torch.cuda.max_memory_allocated()
        with capsys.disabled():
            print(f"\nT={length} peak {peaks[length]} bytes {seconds:.2f} s {report}")
    assert peaks[1_048_576] <= 1.02 * peaks[16_384]


def test_cost_of_reversibility(capsys):
    """Two chunks of a context that `full` holds too: as long as the card allows, since a GPU that is given short chunks
    waits for the host to launch them."""
    model = benchmark_model("5.2-1.5b", DEVICE, torch.bfloat16)
    full_graph = {"strategy": "full"}
    tried = (2048, 4096)
    points = [cuda_point(model, length, full_graph) for length in tried]
    peaks = [point.get("peak_bytes", math.inf) for point in points]
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    context = 0 if math.inf in peaks else longest_context(tried, peaks, 0.95 * free, 4096)
    if context < 8192:
        pytest.skip(f"a card of {free} free bytes keeps `full` from contexts that are long enough to compare")
    context = min(context, 32_768)
    halves = {"strategy": "reversible", "chunk_length": context // 2}
    rows = compare(model, context, {"full": full_graph, "reversible": halves}, repeats=2)
    full, reversible = (row["seconds"] for row in rows)
    with capsys.disabled():
        print(
            f"\nT={context}: full {full:.3f} s, reversible {reversible:.3f} s, ratio {reversible / full:.2f}"
        )
    assert reversible <= 1.40 * full


@pytest.mark.parametrize("kernel", ["triton", "chunked", "naive"])
def test_the_variable_chooses_every_kernel(trained, kernel, monkeypatch):
    """``RWKV_REV_KERNEL`` speaks for the recurrence and for the exact update of its state alike."""
    monkeypatch.setenv("RWKV_REV_KERNEL", kernel)
    model, _, _ = trained
    plan = model.blocks[0].time_mix.plan(64).memory
    if plan is not None:  # RWKV-4 has no update of its own
        assert plan.reversal.kernels == (kernel == "triton")
