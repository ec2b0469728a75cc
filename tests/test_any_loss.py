"""Losses of one's own over long contexts: the same two sweeps, whatever the hidden states are for."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import (
    VERSIONS,
    differentiate,
    english,
    load,
    random_like,
    random_state,
    random_tokens,
    relative_error,
    tiny_model,
)
from pairwise import every_two
from test_own_loss import Rows, arguments
from torch import Tensor
from transformers import Trainer
from transformers.utils import logging

from rwkv_rev import RwkvRevForCausalLM, RwkvRevState, base_model, position_wise
from rwkv_rev.cache import CACHE_NAME, RwkvRevCache
from rwkv_rev.errors import ReversalMismatchError, StrategyError

# peft still uses names that transformers renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = random_tokens(20, batch=2)
CHUNK = 8


def objective(logits: Tensor) -> Tensor:
    """A loss that is no cross-entropy and that no chunk knows alone."""
    log_p = logits.log_softmax(-1)
    return -(log_p[..., 3] * log_p.logsumexp(1)[..., 5, None]).mean() + log_p.square().mean()


def gradients(model: Any, strategy: str, **inputs: Any) -> tuple[Tensor, list[Tensor | None]]:
    """Of :func:`objective`, and of the final state, by parameters and by given tensors that require one."""
    given = [value for value in inputs.values() if isinstance(value, Tensor) and value.requires_grad]
    state = inputs.get("state")
    given += [tensor for tensor in state.tensors() if tensor.requires_grad] if state is not None else []
    with model.set_bptt(strategy, chunk_length=CHUNK):
        output = model(**inputs)
        loss = objective(output.logits) + random_like(output.state).inner(output.state) / 100
    found = torch.autograd.grad(loss, [*model.parameters(), *given], allow_unused=True)
    return loss.detach(), list(found)


def agree(found: list[Tensor | None], expected: list[Tensor | None], bound: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert relative_error(one, other) <= bound


@pytest.mark.parametrize(
    ("version", "case", "strategy"),
    every_two(
        VERSIONS,
        ("plain", "holes and a state", "embeddings", "blocks checkpointed"),
        ("auto", "reversible", "checkpoint"),
    ),
)
def test_gradients_are_those_of_full(version: str, strategy: str, case: str) -> None:
    """Every two of a version, a strategy and a case meet."""
    model = tiny_model(version, dtype=torch.float64)
    inputs: dict[str, Any] = {"input_ids": IDS}
    if case == "holes and a state":
        mask = torch.ones_like(IDS)
        mask[0, :5], mask[1, 9:12], mask[1, -3:] = 0, 0, 0
        inputs |= {"attention_mask": mask, "state": random_state(model, 2, learned=True)}
    elif case == "embeddings":
        inputs = {"inputs_embeds": model.get_input_embeddings()(IDS).detach().requires_grad_()}
    elif case == "blocks checkpointed":
        model.model.gradient_checkpointing = True
    loss, expected = gradients(model, "full", **inputs)
    found_loss, found = gradients(model, strategy, **inputs)
    assert float((found_loss - loss).abs()) <= 1e-12
    agree(found, expected, 1e-10)


@pytest.mark.parametrize("version", ["4", "5.2"])
def test_the_same_bits_as_the_models_own_loss(version: str, shallow: dict[str, Path]) -> None:
    """The cross-entropy of the hidden states, computed outside: what each chunk gets is what it computes itself."""
    model, ids = load(shallow[version]), english(150)
    parameters = list(model.model.parameters())
    with model.set_bptt("reversible", chunk_length=64):
        own = model(ids, labels=ids)
        expected = torch.autograd.grad(own.loss, parameters)
        logits = model(ids).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
        found = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(loss, own.loss, rtol=1e-6, atol=0)
    agree(list(found), list(expected), 1e-5)


def stored(model: RwkvRevForCausalLM, length: int) -> int:
    """Bytes of tensors that autograd keeps for the gradient of a loss on logits."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(random_tokens(length)).last_hidden_state.square().mean()
    assert loss.requires_grad
    return sum(tensor.nbytes for tensor in kept.values())


def test_only_the_hidden_states_grow() -> None:
    model = tiny_model("5.2").model
    model.bptt = replace(model.bptt, strategy="reversible", chunk_length=CHUNK)
    short, long = stored(model, 40), stored(model, 200)
    assert long - short <= 2 * (200 - 40) * model.config.hidden_size * 4


@pytest.mark.parametrize("strategy", ["reversible", "checkpoint"])
def test_dropout_draws_the_same_in_both_sweeps(strategy: str) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, lora_dropout=0.5, target_modules=["key", "output"])
    model = peft.get_peft_model(tiny_model("5.2"), settings).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    base = model.base_model.model
    with base.set_bptt(strategy, chunk_length=CHUNK):
        torch.manual_seed(5)
        output = model(input_ids=IDS)
        before = torch.get_rng_state()
        found = torch.autograd.grad(objective(output.logits), trained)
        assert torch.equal(torch.get_rng_state(), before), "the gradient draws nothing of the caller's"
        # finite differences along the gradient, with the same draws
        norm = torch.stack([g.square().sum() for g in found]).sum().sqrt()
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                for parameter, g in zip(trained, found, strict=True):
                    parameter.add_(sign * 2e-3 * g / norm)
                torch.manual_seed(5)
                losses.append(objective(_grad_free(model)))
                for parameter, g in zip(trained, found, strict=True):
                    parameter.sub_(sign * 2e-3 * g / norm)
    slope = (losses[0] - losses[1]) / 4e-3
    assert float(slope) == pytest.approx(float(norm), rel=0.02)


def _grad_free(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def test_two_contexts_before_either_gradient() -> None:
    """As in DPO: chosen and rejected are read, then one loss of both."""
    model = tiny_model("5.2")
    other = random_tokens(20, batch=2, seed=9)
    parameters = list(model.parameters())

    def loss(first: Tensor, second: Tensor) -> Tensor:
        return -torch.nn.functional.logsigmoid(
            objective(model(first).logits) - objective(model(second).logits)
        )

    with model.set_bptt("full"):
        expected = torch.autograd.grad(loss(IDS, other), parameters)
    with model.set_bptt("reversible", chunk_length=CHUNK):
        found = torch.autograd.grad(loss(IDS, other), parameters)
    agree(list(found), list(expected), 1e-5)


def test_a_state_handed_on_carries_its_gradient() -> None:
    model = tiny_model("5.2")
    parameters = list(model.parameters())

    def loss() -> Tensor:
        first = model(IDS)
        return objective(model(IDS, state=first.state).logits)

    with model.set_bptt("full"):
        expected = torch.autograd.grad(loss(), parameters)
    with model.set_bptt("reversible", chunk_length=CHUNK):
        found = torch.autograd.grad(loss(), parameters)
    agree(list(found), list(expected), 1e-4)


@pytest.mark.parametrize("tape", ["host", "device", "disk"])
def test_autocast_of_the_forward_pass_holds_in_the_backward(tape: str, tmp_path: Path) -> None:
    model = tiny_model("5.2")
    parameters = list(model.parameters())
    found = []
    for strategy in ("checkpoint", "reversible"):
        with model.set_bptt(strategy, chunk_length=CHUNK, tape=tape, tape_dir=str(tmp_path)):
            with torch.autocast("cpu", torch.bfloat16):
                loss = objective(model(IDS).logits.float())
            found.append(torch.autograd.grad(loss, parameters))  # outside of autocast
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    with model.set_bptt("full"), torch.autocast("cpu", torch.bfloat16):
        whole = torch.autograd.grad(objective(model(IDS).logits.float()), parameters)
    agree(list(found[1]), list(whole), 0.2)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def model() -> Iterator[RwkvRevForCausalLM]:
    model = tiny_model("5.2")
    with model.set_bptt("reversible", chunk_length=CHUNK):
        yield model


def test_weights_changed_in_between_are_refused(model: RwkvRevForCausalLM) -> None:
    loss = objective(model(IDS).logits)
    with torch.no_grad():
        model.model.blocks[1].time_mix.key.weight.mul_(1.001)
    with pytest.raises(StrategyError, match=r"blocks\.1\.time_mix\.key\.weight was changed between"):
        loss.backward()


def test_a_second_gradient_is_refused(model: RwkvRevForCausalLM) -> None:
    loss = objective(model(IDS).logits)
    loss.backward(retain_graph=True)
    with pytest.raises(StrategyError, match="was already taken"):
        loss.backward()
    loss = objective(model(IDS).logits)
    with pytest.raises(StrategyError, match="second derivatives"):
        torch.autograd.grad(loss, model.head.weight, create_graph=True)
        torch.autograd.grad(loss, model.model.ln0.weight, create_graph=True)


@pytest.mark.parametrize("call", range(2 * 3))
def test_a_fault_in_either_sweep_is_found(model: RwkvRevForCausalLM, call: int) -> None:
    """Every chunk is computed twice here, the last one too."""
    seen = [0]

    @position_wise
    def once(module: Any, given: Any, output: Tensor) -> Tensor:
        seen[0] += 1
        return output + 1e-3 if seen[0] == call + 1 else output

    model.model.blocks[1].channel_mix.key.register_forward_hook(once)
    with pytest.raises(ReversalMismatchError):
        objective(model(IDS).logits).backward()
    assert seen[0] > call


@pytest.mark.parametrize("call", range(2 * 3))
def test_a_fault_in_the_final_norm_is_found(model: RwkvRevForCausalLM, call: int) -> None:
    """It, too, is computed for the hidden states that are handed out, and again for their gradient."""
    seen = [0]

    @position_wise
    def once(module: Any, given: Any, output: Tensor) -> Tensor:
        seen[0] += 1
        return output * 1.001 if seen[0] == call + 1 else output

    model.model.ln_out.register_forward_hook(once)
    with pytest.raises(ReversalMismatchError, match="final norm"):
        objective(model(IDS).logits).backward()


def test_code_that_is_not_known_gets_the_whole_graph(
    model: RwkvRevForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right, too, and said."""
    told: list[str] = []
    monkeypatch.setattr(logging.get_logger("rwkv_rev.modeling"), "warning_once", told.append)
    model.model.blocks[0].register_forward_hook(lambda module, given, output: None)
    with model.set_bptt("full"):
        expected = torch.autograd.grad(objective(model(IDS).logits), list(model.parameters()))
    found = torch.autograd.grad(objective(model(IDS).logits), list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert "the graph of the whole context is stored" in told[0] and "position_wise" in told[0]


def test_the_cache_of_evaluation_does_not_stand_in_the_way(
    model: RwkvRevForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``from_pretrained`` gives models in eval mode, whose outputs hold a cache: here only where nothing is learned."""
    read: list[Any] = []
    original = base_model.hidden_states
    monkeypatch.setattr(
        base_model, "hidden_states", lambda *args, **more: read.append(args) or original(*args, **more)
    )
    output = model.eval()(IDS)
    assert len(read) == 1 and output.get(CACHE_NAME) is None
    objective(output.logits).backward()
    assert model(IDS, use_cache=True)[CACHE_NAME] is not None
    assert model(IDS[:, :CHUNK])[CACHE_NAME] is not None
    given = RwkvRevCache(model.initial_state(2))
    assert model(IDS, past_key_values=given)[CACHE_NAME] is given
    with torch.no_grad():
        assert model(IDS)[CACHE_NAME] is not None
    model.requires_grad_(False)
    assert model(IDS)[CACHE_NAME] is not None
    assert len(read) == 1
    embeds = model.get_input_embeddings()(IDS).requires_grad_()
    assert model(inputs_embeds=embeds).get(CACHE_NAME) is None and len(read) == 2


def test_label_smoothing_of_trainer(tmp_path: Path) -> None:
    """One step with ``label_smoothing_factor``, whose loss is Trainer's own."""
    trained = []
    for strategy in ("full", "reversible"):
        model = tiny_model("5.2", bptt=strategy, chunk_length=CHUNK)
        settings = arguments(tmp_path, label_smoothing_factor=0.1)
        Trainer(model, settings, train_dataset=Rows()).train()
        trained.append(model)
    for one, other in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        assert relative_error(one.detach(), other.detach()) <= 1e-6


def test_nothing_to_train_keeps_no_tape(model: RwkvRevForCausalLM) -> None:
    model.requires_grad_(False)
    output = model(IDS)
    assert not output.logits.requires_grad
    assert isinstance(output.state, RwkvRevState)


def test_hidden_states_on_the_host_give_the_same_bits() -> None:
    """The loss is computed in pieces of them; T D numbers less are on the device, two times."""
    model = tiny_model("5.2")
    state = random_state(model, 2, learned=True)
    targets = random_tokens(20, batch=2, seed=5)
    found = []
    for place in ("device", "host"):
        with model.set_bptt("reversible", chunk_length=CHUNK, hidden_states=place):
            output = model.model(IDS, state=state)
            hidden = output.last_hidden_state
            assert hidden.device.type == "cpu" and hidden.requires_grad
            losses = [
                torch.nn.functional.cross_entropy(model.head(piece).flatten(0, 1), target.flatten())
                for piece, target in zip(hidden.split(5, dim=1), targets.split(5, dim=1), strict=True)
            ]
            loss = torch.stack(losses).sum() + random_like(output.state).inner(output.state) / 100
            found.append([loss.detach(), *torch.autograd.grad(loss, [*model.parameters(), *state.tensors()])])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("strategy", ["auto", "full", "truncated"])
def test_hidden_states_on_the_host_change_no_loss_of_the_models_own(strategy: str) -> None:
    model = tiny_model("5.2")
    found = []
    for place in ("device", "host"):
        with model.set_bptt(strategy, chunk_length=CHUNK, hidden_states=place):
            found.append(torch.autograd.grad(model(IDS, labels=IDS).loss, list(model.parameters())))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_logits_of_hidden_states_on_the_host(model: RwkvRevForCausalLM) -> None:
    """Of a chunk at most; all of them are refused, and what the message names works."""
    with model.set_bptt("reversible", hidden_states="host"):
        with pytest.raises(
            StrategyError, match=r"logits_to_keep of at most 8, or split model\.model"
        ) as error:
            model(IDS)
        assert "\n" not in str(error.value)
        for kept in (CHUNK, torch.tensor([3, 12, 19])):
            logits = model(IDS, logits_to_keep=kept).logits
            found = torch.autograd.grad(objective(logits.repeat(1, 3, 1)), list(model.parameters()))
            with model.set_bptt("reversible", hidden_states="device"):
                logits = model(IDS, logits_to_keep=kept).logits
                expected = torch.autograd.grad(objective(logits.repeat(1, 3, 1)), list(model.parameters()))
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one, other)
        assert model(IDS[:, :CHUNK]).logits.shape[1] == CHUNK
        with torch.no_grad():
            assert model(IDS).logits.shape[:2] == IDS.shape
    with pytest.raises(
        StrategyError, match=r"hidden_states = 'disk' does not exist; use one of device, host"
    ):
        model.set_bptt("reversible", hidden_states="disk")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("autocast", [False, True])
def test_hidden_states_beside_a_gpu(autocast: bool) -> None:
    """A CPU tensor, page-locked; the gradient's bits are those of the device's, and T D numbers leave the device."""
    width, chunk, length = 256, 256, 64 * 256
    model = tiny_model("5.2", hidden_size=width, head_size=64, intermediate_size=512).cuda()
    ids = random_tokens(length).cuda()
    found: list[list[Tensor]] = []
    peaks = []
    for place in ("device", "host"):
        with model.set_bptt("reversible", chunk_length=chunk, hidden_states=place):
            for _ in range(2):  # the first compiles
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                model.zero_grad()
                with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                    hidden = model.model(ids).last_hidden_state
                    assert hidden.device.type == ("cpu" if place == "host" else "cuda")
                    assert hidden.is_pinned() == (place == "host")
                    pieces = [piece.detach().requires_grad_() for piece in hidden.split(chunk, dim=1)]
                    for piece in pieces:
                        model.head(piece.cuda()).float().logsumexp(-1).square().mean().backward()
                hidden.backward(torch.cat([piece.grad for piece in pieces], dim=1))
                del hidden, pieces
        peaks.append(torch.cuda.max_memory_allocated())
        found.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert peaks[0] - peaks[1] >= 1.5 * length * width * (2 if autocast else 4)


AGREE = 1e-10
"""Of a gradient in float64."""


def by_loss(model: RwkvRevForCausalLM, strategy: str, between: Any = lambda model: None) -> dict[str, Tensor]:
    """Gradients of a loss of one's own; ``between`` is called before they are taken."""
    model.zero_grad()
    with model.set_bptt(strategy, chunk_length=CHUNK):
        loss = objective(model(IDS).logits)
    between(model)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("version", ["4", "5.2"])
@pytest.mark.parametrize("which", ["key.weight", "", "ln_out", "embeddings"])
def test_parameters_of_one_call_get_its_gradient(version: str, which: str) -> None:
    """``functional_call``, whose gradient is taken when the model holds its own parameters again."""
    model = tiny_model(version, dtype=torch.float64)
    found = {}
    for strategy in ("full", "reversible"):
        given = {
            name: (1.01 * parameter.detach()).requires_grad_()
            for name, parameter in model.named_parameters()
            if which in name
        }
        own = list(model.parameters())
        with model.set_bptt(strategy, chunk_length=CHUNK):
            loss = objective(torch.func.functional_call(model, given, (IDS,)).logits)
        loss.backward()
        found[strategy] = [tensor.grad for tensor in given.values()]
        assert all(one is other for one, other in zip(model.parameters(), own, strict=True))
    agree(found["reversible"], found["full"], AGREE)
    assert found["full"] and all(gradient is not None for gradient in found["full"])


def test_a_part_frozen_in_between_is_what_it_was() -> None:
    model = tiny_model("5.2", dtype=torch.float64)

    def freeze(model: RwkvRevForCausalLM) -> None:
        model.model.blocks[1].requires_grad_(False)

    expected = by_loss(model, "full", freeze)
    model.requires_grad_(True)
    found = by_loss(model, "reversible", freeze)
    assert not any(parameter.requires_grad for parameter in model.model.blocks[1].parameters())
    assert found.keys() == expected.keys()
    agree(list(found.values()), list(expected.values()), AGREE)


def test_a_gradient_in_inference_mode() -> None:
    model = tiny_model("5.2", dtype=torch.float64)
    expected = by_loss(model, "full")
    model.zero_grad()
    with model.set_bptt("reversible", chunk_length=CHUNK):
        loss = objective(model(IDS).logits)
    with torch.inference_mode():
        loss.backward()
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, expected[name]) <= AGREE, name


@pytest.mark.parametrize(
    ("version", "part", "strategy"),
    every_two(VERSIONS, ("time_shift", "wkv", "channel_shift", "hidden"), ("reversible", "checkpoint")),
)
def test_what_a_loss_does_not_reach_has_no_gradient(version: str, strategy: str, part: str) -> None:
    """None, as under ``full``: an optimizer would decay weights whose gradients are zeros.

    Every two of a version, a strategy and a part meet.
    """
    model = tiny_model(version, dtype=torch.float64)
    state = random_state(model, 2, learned=True)
    leaves = [*model.model.parameters(), *state.tensors()]
    found = []
    for name in ("full", strategy):
        with model.set_bptt(name, chunk_length=CHUNK):
            output = model.model(IDS, state=state)
        chosen = output.last_hidden_state if part == "hidden" else getattr(output.state, part)
        found.append(list(torch.autograd.grad(chosen.square().mean(), leaves, allow_unused=True)))
    if part == "hidden":
        assert all(gradient is not None for gradient in found[0])
    else:
        assert sum(gradient is None for gradient in found[0]) >= 2
    count = len(leaves) - len(state.tensors())
    agree(found[1][:count], found[0][:count], 1e-5)
    for one, other in zip(
        found[1][count:], found[0][count:], strict=True
    ):  # chunks know of more that is not reached
        agree([one], [other if one is not None or other is None or other.any() else None], 1e-5)


@pytest.mark.parametrize("own_loss", [True, False])
@pytest.mark.parametrize("strategy", ["reversible", "checkpoint"])
@pytest.mark.parametrize("shared", ["final norm", "first norm", "embeddings and a mix"])
def test_what_a_block_shares_with_the_rest(shared: str, strategy: str, own_loss: bool) -> None:
    """A tensor used inside a block and beside the blocks gets the sum of both gradients."""
    model = tiny_model("5.2", dtype=torch.float64)
    base = model.model
    if shared == "final norm":
        base.ln_out = base.blocks[0].ln1
    elif shared == "first norm":
        base.ln0.weight = base.blocks[1].ln2.weight
    else:
        base.blocks[1].ln1.bias = base.ln0.bias
        base.blocks[0].ln2.bias = base.ln_out.bias

    def gradients_by(strategy: str) -> dict[str, Tensor]:
        if own_loss:
            return by_loss(model, strategy)
        return differentiate(model, strategy, CHUNK, input_ids=IDS).gradients

    expected, found = gradients_by("full"), gradients_by(strategy)
    assert found.keys() == expected.keys()
    agree(list(found.values()), list(expected.values()), AGREE)
