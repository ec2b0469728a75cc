"""Losses of several threads, of which one has its gradient taken in a thread of autograd's, as on a GPU."""

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import random_tokens, relative_error, tiny_model
from torch import Tensor

from rwkv_rev import RwkvRevForCausalLM, position_wise
from rwkv_rev.autograd import one_thread
from rwkv_rev.errors import StrategyError

CHUNK = 8
IDS = random_tokens(20)
LONG = 5.0
"""Seconds after which a test ends that would not."""
LABELS = pytest.mark.parametrize("labels", [True, False], ids=["labels", "logits"])


def loss_of(model: RwkvRevForCausalLM, labels: bool) -> Tensor:
    ids = IDS.to(model.head.weight.device)
    return model(ids, labels=ids).loss if labels else model(ids).logits.square().mean()


def gradients(model: RwkvRevForCausalLM, labels: bool) -> list[Tensor]:
    return list(torch.autograd.grad(loss_of(model, labels), list(model.parameters())))


def made(strategy: str, version: str = "5.2") -> RwkvRevForCausalLM:
    model = tiny_model(version, dtype=torch.float64)
    model.set_bptt(strategy, chunk_length=CHUNK)
    return model


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(one, truth, rtol=1e-7, atol=1e-12)


def calls_once(model: RwkvRevForCausalLM, inside: Callable[[], Any], *, in_autograd: bool) -> None:
    """Have ``inside`` called in the middle of a forward pass with a graph, or of a gradient."""
    calls: list[int] = []

    def once() -> None:
        calls.append(1)
        if calls == [1]:
            with torch.enable_grad():
                inside()

    @position_wise
    def hook(module: Any, given: Any, output: Any) -> None:
        if not in_autograd:
            once()
        elif output.requires_grad:
            output.register_hook(lambda gradient: once())

    model.blocks[1].channel_mix.value.register_forward_hook(hook)


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Say that threads of a pool are autograd's, of the device that is named."""
    monkeypatch.setattr(one_thread, "PATIENCE", 0.1, raising=False)

    def of(device: str) -> None:
        def here() -> torch.device | None:
            in_pool = threading.current_thread().name.startswith("autograd")
            return torch.device(device) if in_pool else None

        monkeypatch.setattr(one_thread, "autograds_device", here, raising=False)

    return of


def while_another_computes(
    other: RwkvRevForCausalLM, labels: bool, mine: RwkvRevForCausalLM, in_autograd: bool, at_most: float
) -> list[Tensor]:
    """The gradient of a loss on logits of ``mine``, which is asked for while the other's loss is computed.

    This waits for it, for ``at_most`` so many seconds: in its forward pass, or where autograd takes its gradient.
    """
    begun, done = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        done.wait(at_most)

    def take() -> list[Tensor]:
        assert begun.wait(LONG)
        try:
            return list(torch.autograd.grad(loss, list(mine.parameters())))
        finally:
            done.set()

    loss, expected = loss_of(mine, labels=False), gradients(other, labels)
    calls_once(other, wait, in_autograd=in_autograd)
    with ThreadPoolExecutor(1, "caller") as caller, ThreadPoolExecutor(1, "autograd") as autograd:
        theirs, found = caller.submit(gradients, other, labels), autograd.submit(take)
        assert_near(theirs.result(2 * LONG), expected)
        return found.result(2 * LONG)


@LABELS
@pytest.mark.parametrize(
    "strategy, version", [("checkpoint", "4"), ("reversible", "5.2"), ("reversible", "7")]
)
def test_who_is_waited_for_does_not_wait(
    strategy: str, version: str, labels: bool, as_on_a_device: Any
) -> None:
    as_on_a_device("cpu")
    mine = made("reversible", "6")
    with pytest.raises(StrategyError, match="another thread computes a loss meanwhile"):
        while_another_computes(made(strategy, version), labels, mine, True, LONG)
    assert not one_thread._owners
    assert_near(gradients(mine, labels), gradients(made("full", "6"), labels))


@LABELS
def test_who_is_not_waited_for_waits(labels: bool, as_on_a_device: Any) -> None:
    """In the other's forward pass."""
    as_on_a_device("cpu")
    found = while_another_computes(made("reversible"), labels, made("reversible", "6"), False, 0.2)
    assert_near(found, gradients(made("full", "6"), labels=False))


@LABELS
def test_who_waits_for_another_device_is_waited_for(labels: bool, as_on_a_device: Any) -> None:
    as_on_a_device("cuda:1")
    found = while_another_computes(made("reversible"), labels, made("reversible", "6"), True, 0.3)
    assert_near(found, gradients(made("full", "6"), labels=False))


class Deeper(torch.autograd.Function):
    """A gradient within a gradient, and so on: below the 60th autograd goes on in a thread of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int, inside: Callable[[], Any]) -> Tensor:
        ctx.rest = depth, inside
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        depth, inside = ctx.rest
        with torch.enable_grad():
            if depth:
                in_a_thread_of_autograds(inside, depth - 1)
            else:
                inside()
        return gradient, None, None


def in_a_thread_of_autograds(inside: Callable[[], Any], depth: int = 70) -> None:
    x = torch.zeros((), requires_grad=True)
    torch.autograd.grad(Deeper.apply(x, depth, inside), x)


@LABELS
@pytest.mark.parametrize("inner", [True, False], ids=["labels inside", "logits inside"])
@pytest.mark.parametrize("strategy", ["full", "checkpoint", "reversible"])
def test_losses_inside_of_a_loss_in_autograds_thread(strategy: str, inner: bool, labels: bool) -> None:
    outer: list[Tensor] = []
    found: list[list[Tensor]] = []
    other = made("reversible", "6")

    def inside() -> None:
        assert isinstance(threading.current_thread(), threading._DummyThread)  # none of Python's
        found.append(gradients(other, inner))

    model = made(strategy)
    calls_once(model, lambda: in_a_thread_of_autograds(inside), in_autograd=False)
    thread = threading.Thread(target=lambda: outer.extend(gradients(model, labels)), daemon=True)
    thread.start()
    thread.join(LONG)
    assert not thread.is_alive()
    assert_near(outer, gradients(made("full"), labels))
    assert_near(found[0], gradients(made("full", "6"), inner))


GPU = """
import faulthandler, os, sys, test_losses_in_threads as cases
faulthandler.dump_traceback_later(100, exit=True)
print(getattr(cases, sys.argv[1])(), flush=True)
os._exit(0)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", ["labels_and_logits", "logits_and_logits", "inside_of_a_gradient"])
def test_on_a_gpu(case: str) -> None:
    """In a process, which can be ended where autograd's thread of the device hangs."""
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    ended = subprocess.run(
        [sys.executable, "-c", GPU, case], env=environment, capture_output=True, text=True, timeout=150
    )
    assert ended.returncode == 0 and ended.stdout.strip() == "None", ended.stdout + ended.stderr


def on_gpu(strategy: str, version: str) -> RwkvRevForCausalLM:
    model = tiny_model(version).cuda()
    model.set_bptt(strategy, chunk_length=CHUNK)
    return model


def flat(found: list[Tensor]) -> Tensor:
    return torch.cat([one.double().flatten() for one in found])


def in_two_threads(first: bool, second: bool, *, refused: bool) -> None:
    """20 gradients each: with labels or on logits. Each is right, or is refused where that may be."""
    one_thread.PATIENCE = 0.1
    models = [on_gpu("reversible", "5.2"), on_gpu("reversible", "6")]
    expected = [flat(gradients(model, labels)) for model, labels in zip(models, (first, second), strict=True)]

    def loop(model: RwkvRevForCausalLM, labels: bool, right: Tensor) -> int:
        count = 0
        for _ in range(20):
            try:
                assert relative_error(flat(gradients(model, labels)), right) < 1e-4
            except StrategyError:
                count += 1
        return count

    with ThreadPoolExecutor(2) as pool:
        counts = list(pool.map(loop, models, (first, second), expected))
    assert counts[0] == 0 and (refused or counts[1] == 0), counts


def labels_and_logits() -> None:
    in_two_threads(True, False, refused=True)


def logits_and_logits() -> None:
    in_two_threads(False, False, refused=False)


def inside_of_a_gradient() -> None:
    for labels, inner, in_autograd in itertools.product([True, False], repeat=3):
        model, other = on_gpu("reversible", "5.2"), on_gpu("reversible", "6")
        expected, right = flat(gradients(model, labels)), flat(gradients(other, inner))
        found: list[Tensor] = []
        inside = partial(lambda found, *given: found.append(flat(gradients(*given))), found, other, inner)
        calls_once(model, inside, in_autograd=in_autograd)
        assert relative_error(flat(gradients(model, labels)), expected) < 1e-4
        assert relative_error(found[0], right) < 1e-4
