"""How sweeps use CUDA graphs, on any machine: recordings are played by running the work again.

Like a graph's, the tensors that a replay fills are the same every time, and hold garbage until the first one.
"""

import dataclasses
import gc
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from bptt_cases import differentiate, random_like, random_state, random_tokens, tiny_model
from pairwise import every_two
from torch import Tensor

from rwkv_rev.autograd.outside_leaves import OutsideLeaves
from rwkv_rev.bptt import cuda_graphs, lasting, recordings
from rwkv_rev.bptt.backward_sweep import Sums
from rwkv_rev.bptt.chunk_gradients import Parameters
from rwkv_rev.bptt.strategy import LossInputs
from rwkv_rev.reversal.fixed_point import DecayPlan
from rwkv_rev.reversal.tape import FlatRecord

LENGTH, CHUNK = 48, 8


def pairs(first: Any, second: Any, seen: set[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Tensors at the same places of two results of the same work, but for those that both share."""
    if first is second or (id(first), id(second)) in seen:
        return
    seen.add((id(first), id(second)))
    if isinstance(first, Tensor):
        yield first, second
        return
    if isinstance(first, types.FunctionType):
        first, second = ([cell.cell_contents for cell in f.__closure__ or ()] for f in (first, second))
    elif dataclasses.is_dataclass(first):
        first, second = vars(first), vars(second)
    if isinstance(first, dict):
        first, second = list(first.values()), [second[name] for name in first]
    if isinstance(first, (list, tuple)):
        for one, other in zip(first, second, strict=True):
            yield from pairs(one, other, seen)


class Played:
    """Stands for a CUDA graph of ``work``; ``result`` are its static tensors."""

    replays = 0

    def __init__(self, work: Callable[[], Any], result: Any) -> None:
        self.work, self.result = work, result

    @torch.no_grad()
    def replay(self, behind_first: Callable[[], None] = lambda: None) -> None:
        Played.replays += 1
        for static, new in pairs(self.result, self.work(), set()):
            static.copy_(new)
        behind_first()


def held_by(work: Callable[..., Any]) -> list[Tensor]:
    """Tensors, and lists of tensors, that a function and the functions that it calls add to."""
    found: list[Tensor] = []
    for cell in work.__closure__ or ():
        content = cell.cell_contents
        if isinstance(content, types.FunctionType):
            found += held_by(content)
        held = content if isinstance(content, list) else [content]
        found += [value for value in held if isinstance(value, Tensor)]
    return found


def record(
    work: Callable[[], Any], device: torch.device, pool: Any = None, cut: Any = None
) -> tuple[Played, Any]:
    """Instead of :func:`recordings._capture`: nothing that the recording computes counts."""
    changed = held_by(work)
    kept = [tensor.detach().clone() for tensor in changed]
    result, another = work(), work()
    with torch.no_grad():
        for static, _ in pairs(result, another, set()):
            static.fill_(torch.nan if static.is_floating_point() else 1)
        for tensor, value in zip(changed, kept, strict=True):
            if not torch.equal(tensor, value):
                tensor.copy_(value)
    return Played(work, result), result


class Idle:
    """A device that always waits for the host."""

    def __init__(self, device: torch.device) -> None:
        pass

    def waits_for_host(self) -> bool:
        return True


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Switches graphs on and off; few chunks are worth a recording."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(cuda_graphs, "possible", lambda device: on)
        Played.replays = 0

    monkeypatch.setattr(recordings, "_capture", record)
    monkeypatch.setattr(lasting, "_can_last", lambda sweep: False)
    monkeypatch.setattr(cuda_graphs, "Pace", Idle)
    monkeypatch.setattr(cuda_graphs, "_failures", [])
    monkeypatch.setattr(cuda_graphs, "FEWEST_CHUNKS", 2)
    return switch


def holes() -> Tensor:
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, 34:38], mask[1, :5], mask[1, -5:] = 0, 0, 0
    return mask


def partly_labelled(ids: Tensor) -> Tensor:
    labels = ids.clone()
    labels[:, 32:44], labels[0, :28] = -100, -100
    return labels


@pytest.mark.parametrize(
    ("case", "version", "strategy"),
    every_two(
        ("plain", "masked", "labels", "loss weights", "states", "rising", "tied", "float64"),
        ("4", "5.2"),
        ("reversible", "checkpoint"),
    ),
)
def test_replays_are_what_would_have_run(
    played: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch, version: str, strategy: str, case: str
) -> None:
    """Every two of a case, a version and a strategy meet."""
    # chunks of one token, of which each adds the same to what hardly decays: grids rise
    length, chunk = (24, 1) if case == "rising" else (LENGTH, CHUNK)
    dtype = torch.float64 if case == "float64" else torch.float32
    model, ids = tiny_model(version, dtype=dtype), random_tokens(length, 2)
    if case == "rising":
        ids = torch.ones_like(ids)
        for block in model.blocks:
            torch.nn.init.constant_(block.time_mix.time_decay, -9.0)
    inputs: dict[str, Any] = {"input_ids": ids}
    if case == "masked":
        inputs["attention_mask"] = holes()
    elif case == "labels":
        inputs["labels"] = partly_labelled(ids)
    elif case == "loss weights":
        inputs["loss_weights"] = torch.rand(2, length, generator=torch.Generator().manual_seed(3))
    elif case == "states":
        inputs |= {"state": (state := random_state(model, 2)), "final_state_gradient": random_like(state)}
    elif case == "tied":
        model.model.blocks[1].channel_mix = model.model.blocks[0].channel_mix
        model.head.weight = model.model.embeddings.weight
        model.model.blocks[0].time_mix.requires_grad_(False)
    played(False)
    expected = differentiate(model, strategy, chunk, **inputs)
    assert Played.replays == 0
    played(True)
    rose: list[bool] = []
    keep = recordings.ForwardRecording.keep

    def counted(recording: recordings.ForwardRecording, tape: Any) -> Any:
        rose.append(recording._needs_more is not None and bool(recording._needs_more()))
        return keep(recording, tape)

    monkeypatch.setattr(recordings.ForwardRecording, "keep", counted)
    found = differentiate(model, strategy, chunk, **inputs)
    assert Played.replays >= 2 * cuda_graphs.FEWEST_CHUNKS
    assert any(rose) == (case == "rising" and version == "5.2" and strategy == "reversible")
    assert torch.equal(found.loss, expected.loss)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert torch.equal(found.gradients[name], gradient), name
    for one, other in zip(found.state.tensors(), expected.state.tensors(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("strategy", ["reversible", "checkpoint"])
def test_what_draws_is_not_recorded(played: Callable[[bool], None], strategy: str) -> None:
    """A replay would draw what its recording drew; the same numbers come again in both sweeps."""
    model, ids = tiny_model("5.2", dtype=torch.float64), random_tokens(LENGTH, 2)
    model.blocks[1].ln2 = torch.nn.Sequential(model.blocks[1].ln2, torch.nn.Dropout(0.5))
    found = []
    for on in (False, True):
        played(on)
        torch.manual_seed(0)
        found.append(differentiate(model, strategy, CHUNK, input_ids=ids))
        assert Played.replays == 0
    for name, gradient in found[0].gradients.items():
        assert torch.equal(found[1].gradients[name], gradient), name
    model.blocks[1].ln2[1].p = 0.0
    differentiate(model, strategy, CHUNK, input_ids=ids)
    assert Played.replays > 0


def test_layouts_are_made_before_a_recording(
    played: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layout comes from the host, which a recording does not allow."""
    recording: list[bool] = []
    made = DecayPlan.packing.func

    def packing(plan: DecayPlan) -> Any:
        assert not recording
        return made(plan)

    def watched(work: Callable[[], Any], device: torch.device, pool: Any = None, cut: Any = None) -> Any:
        recording.append(True)
        found = record(work, device)
        recording.clear()
        return found

    monkeypatch.setattr(DecayPlan.packing, "func", packing)
    monkeypatch.setattr(recordings, "_capture", watched)
    played(True)
    ids = random_tokens(LENGTH)
    differentiate(tiny_model("5.2"), "reversible", CHUNK, input_ids=ids)
    assert Played.replays


def test_a_failed_recording_leaves_no_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros would be gradients of parameters that have none."""

    def refuse(work: Callable[[], Any], device: torch.device, pool: Any = None, cut: Any = None) -> Any:
        raise RuntimeError("cannot be recorded")

    monkeypatch.setattr(recordings, "_capture", refuse)
    monkeypatch.setattr(cuda_graphs, "_failures", [])
    model, ids = tiny_model("4"), random_tokens(LENGTH)
    chunk = LossInputs(ids, None, None, ids, 1.0, random_state(model, 1)).chunks(CHUNK)[2]
    nothing = FlatRecord.of([[torch.zeros(4)]], ids.device)
    kept = torch.ones(3)
    sweep = types.SimpleNamespace(
        model=model,
        device=ids.device,
        parameters=Parameters(model, list(model.parameters())[:2], foreign=False),
    )
    sums = Sums([None, kept], OutsideLeaves([]), loss=torch.zeros(()))
    with pytest.warns(UserWarning, match="cannot be recorded"):
        made = cuda_graphs.attempt(lambda: recordings.BackwardRecording(sweep, sums, chunk, [], nothing, []))
    assert made is None
    assert sums.parameters[0] is None and sums.parameters[1] is kept


def test_work_is_cut_into_two_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is called behind the first is called before the second is launched."""
    events: list[str] = []

    class Graph:
        made = 0

        def __init__(self) -> None:
            Graph.made += 1
            self.name = str(Graph.made)

        def capture_begin(self, pool: object, capture_error_mode: str) -> None:
            events.append(f"begin {self.name}")

        def capture_end(self) -> None:
            events.append(f"end {self.name}")

        def replay(self) -> None:
            events.append(f"replay {self.name}")

    class Recorder:
        def __init__(self, graph: Graph, pool: object, stream: object, capture_error_mode: str) -> None:
            self.cuda_graph = graph

        def __enter__(self) -> None:
            self.cuda_graph.capture_begin(None, "")

        def __exit__(self, *_: object) -> None:
            self.cuda_graph.capture_end()

    @contextmanager
    def nothing(wanted: object) -> Iterator[None]:
        yield

    fakes = {"stream": nothing, "graph": Recorder, "device": nothing, "empty_cache": lambda: None}
    fakes |= {"CUDAGraph": Graph, "Stream": lambda device: None, "graph_pool_handle": object}
    fakes |= {"current_stream": lambda device: None}
    monkeypatch.setattr(recordings, "_streams", {})
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    cut = recordings._Cut()

    def work() -> int:
        assert not gc.isenabled()  # what is freed meanwhile may end a recording
        events.append("one")
        cut()
        events.append("other")
        return 7

    launches, found = recordings._capture(work, torch.device("cuda"), None, cut)
    assert found == 7 and gc.isenabled()
    launches.replay(lambda: events.append("behind the first"))
    made = ["begin 1", "one", "end 1", "begin 2", "other", "end 2"]
    assert events == [*made, "replay 1", "behind the first", "replay 2"]


def test_a_failed_recording_gives_the_stream_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in PyTorch, the end of an invalid recording raises before the stream before it is set again."""
    current = ["the caller's"]

    @contextmanager
    def stream(wanted: str) -> Iterator[None]:
        before, current[0] = current[0], wanted
        try:
            yield
        finally:
            current[0] = before

    @contextmanager
    def graph(graph: object, pool: object, stream: str, capture_error_mode: str) -> Iterator[None]:
        current[0] = stream
        try:
            yield
        finally:
            raise RuntimeError("capture was invalidated")

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        yield

    fakes = {"stream": stream, "graph": graph, "device": device, "empty_cache": lambda: None}
    fakes |= {"CUDAGraph": object, "Stream": lambda device: "its own", "graph_pool_handle": object}
    fakes |= {"current_stream": lambda device: current[0]}
    monkeypatch.setattr(recordings, "_streams", {})
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    with pytest.raises(RuntimeError, match="invalidated"):
        recordings._capture(lambda: None, torch.device("cuda"))
    assert current == ["the caller's"] and gc.isenabled()
