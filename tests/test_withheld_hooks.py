"""Hooks on weights hear each finished gradient once, whatever another thread computes by the same model meanwhile."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from bptt_cases import random_tokens, tiny_model
from torch import Tensor

import rwkv_rev
from rwkv_rev import RwkvRevForCausalLM
from rwkv_rev.autograd.weight_product import WeightProduct
from rwkv_rev.bptt import sweep, weight_products

IDS, SHORT, CHUNK = random_tokens(20), random_tokens(6), 8


def hooked(version: str = "5.2") -> tuple[RwkvRevForCausalLM, list[Tensor]]:
    """A model, and two of its weights whose hooks change their gradients."""
    model = tiny_model(version, dtype=torch.float64)
    weights = [model.model.blocks[1].time_mix.key.weight, model.head.weight]
    for weight in weights:
        weight.register_hook(lambda gradient: 0.5 * gradient)
        weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    return model, weights


def loss_of(model: RwkvRevForCausalLM, ids: Tensor, *, labels: bool) -> Tensor:
    if labels:
        return model(ids, labels=ids).loss
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())


def by(loss: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, weights))


def agree(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=0)


@pytest.fixture
def during(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Has something done once, in the middle of the next second sweep."""
    waiting: list[Callable[[], None]] = []
    replay = sweep.replay_layers

    def replay_layers(*given: Any, **named: Any) -> Any:
        found = replay(*given, **named)
        if waiting and torch.is_grad_enabled():
            waiting.pop()()
        return found

    monkeypatch.setattr(sweep, "replay_layers", replay_layers)
    return waiting.append


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("strategy", ["checkpoint", "reversible"])
def test_gradients_that_another_thread_takes_during_a_sweep(strategy: str, labels: bool, during: Any) -> None:
    """Of a short context, and of a loss that has its gradient already: neither waits for the sweep."""
    model, weights = hooked()
    short, finished = (by(loss_of(model, SHORT, labels=which), weights) for which in (False, True))
    with ThreadPoolExecutor(1) as pool, model.set_bptt(strategy, chunk_length=CHUNK):
        expected = by(loss_of(model, IDS, labels=labels), weights)
        ready, found = loss_of(model, SHORT, labels=True), []

        def beside() -> None:
            found.append(pool.submit(lambda: by(loss_of(model, SHORT, labels=False), weights)).result(10))
            found.append(pool.submit(by, ready, weights).result(10))

        during(beside)
        agree(by(loss_of(model, IDS, labels=labels), weights), expected)
    assert len(found) == 2
    agree(found[0], short)
    agree(found[1], finished)


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("labels", [True, False])
def test_a_loss_that_another_thread_begins_during_a_sweep(labels: bool, declared: bool, during: Any) -> None:
    model, weights = hooked()
    if declared:
        model.model.blocks[0].register_forward_hook(rwkv_rev.position_wise(lambda module, given, out: out))

    def gradient() -> list[Tensor]:
        return by(loss_of(model, IDS, labels=labels), weights)

    begun: list[Future[list[Tensor]]] = []
    with ThreadPoolExecutor(1) as pool, model.set_bptt("reversible", chunk_length=CHUNK):
        expected = gradient()

        def beside() -> None:
            begun.append(pool.submit(gradient))
            with pytest.raises(TimeoutError):  # it waits
                begun[0].result(0.1)

        during(beside)
        agree(gradient(), expected)
        agree(begun[0].result(10), expected)


@pytest.mark.parametrize("strategy", ["full", "reversible"])
def test_threads_in_any_order(strategy: str) -> None:
    model, weights = hooked()
    with model.set_bptt(strategy, chunk_length=CHUNK), ThreadPoolExecutor(2) as pool:
        expected = {labels: by(loss_of(model, IDS, labels=labels), weights) for labels in (True, False)}
        asked = [True, False, True, False]
        for labels, found in zip(
            asked, pool.map(lambda which: by(loss_of(model, IDS, labels=which), weights), asked), strict=True
        ):
            agree(found, expected[labels])


def test_hooks_are_the_same_ones_afterwards() -> None:
    """But for one that was taken off by code inside the model."""
    model, (weight, _) = hooked()
    handle = weight.register_hook(lambda gradient: gradient)
    before = dict(weight._backward_hooks)
    with model.set_bptt("reversible", chunk_length=CHUNK):
        loss_of(model, IDS, labels=True)
        assert dict(weight._backward_hooks) == before

        @rwkv_rev.position_wise
        def takes_off(module: Any, given: Any, out: Any) -> None:
            handle.remove()

        model.model.blocks[0].register_forward_hook(takes_off)
        loss_of(model, IDS, labels=True)
    before.pop(handle.id)
    assert dict(weight._backward_hooks) == before


def test_maps_that_add_their_gradients_do_so_in_the_sweep_alone(
    monkeypatch: pytest.MonkeyPatch, during: Any
) -> None:
    """On a GPU in bfloat16; another thread's forward pass has its own gradient."""
    monkeypatch.setattr(weight_products, "_adds", lambda weight: True)
    monkeypatch.setattr(
        WeightProduct,
        "add_to",
        lambda self, total: (self.gradient.t() @ self.x).add_(0 if total is None else total),
    )
    model = tiny_model("5.2", dtype=torch.float64)
    weights = [model.model.blocks[1].time_mix.key.weight, model.model.blocks[0].channel_mix.value.weight]
    short, found = by(loss_of(model, SHORT, labels=False), weights), []
    with ThreadPoolExecutor(1) as pool, model.set_bptt("reversible", chunk_length=CHUNK):
        expected = by(loss_of(model, IDS, labels=True), weights)
        during(
            lambda: found.append(
                pool.submit(lambda: by(loss_of(model, SHORT, labels=False), weights)).result(10)
            )
        )
        agree(by(loss_of(model, IDS, labels=True), weights), expected)
    agree(found[0], short)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("labels", [True, False])
def test_autograds_threads_know_that_hooks_are_withheld(labels: bool) -> None:
    """Hooks are called in the thread of a device."""
    model = tiny_model("5.2").cuda()
    weight, heard = model.model.blocks[1].time_mix.key.weight, []
    weight.register_hook(heard.append)
    with model.set_bptt("reversible", chunk_length=CHUNK):
        found = by(loss_of(model, IDS.cuda(), labels=labels), [weight])
    assert len(heard) == 1 and torch.equal(heard[0], found[0])
