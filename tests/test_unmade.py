"""Logits that were not made beside a loss: no item of the output, and clear words where they are used."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from bptt_cases import random_tokens, tiny_model

from rwkv_rev.errors import StrategyError
from rwkv_rev.outputs import RwkvRevCausalLMOutput

IDS = random_tokens(8)


@pytest.mark.parametrize(
    "use",
    [
        lambda logits: logits[..., :-1, :],
        lambda logits: logits.device,
        lambda logits: logits.argmax(-1),
        lambda logits: torch.argmax(logits),
        lambda logits: F.cross_entropy(logits, IDS),
        lambda logits: list(logits),
        lambda logits: len(logits),
    ],
    ids=["slice", "attribute", "method", "function", "loss", "iteration", "length"],
)
def test_use_is_refused_by_name(use: Callable[[Any], Any]) -> None:
    logits = tiny_model("5.2")(IDS, labels=IDS).logits
    with pytest.raises(StrategyError, match="pass return_logits=True") as caught:
        use(logits)
    assert "\n" not in str(caught.value)


def test_it_is_not_there_for_who_does_not_use_it() -> None:
    """Not among an output's items, which tools copy, gather and cast; no error in passing it on."""
    output = tiny_model("5.2")(IDS, labels=IDS)
    assert "logits" not in output
    assert not output.logits
    assert all(value is not output.logits for value in output.to_tuple())
    bare = RwkvRevCausalLMOutput(loss=torch.tensor(1.0))
    copies = [
        dataclasses.replace(bare),  # as FSDP does
        RwkvRevCausalLMOutput(dict(bare.items())),  # as accelerate does
        pickle.loads(pickle.dumps(bare)),
        copy.deepcopy(bare),
    ]
    for again in copies:
        assert list(again.keys()) == ["loss"]
        assert again.logits is bare.logits
    assert RwkvRevCausalLMOutput(state=None).logits is None


def test_in_evaluation_logits_are_made_by_who_uses_them() -> None:
    model = tiny_model("5.2", bptt="reversible", chunk_length=3).eval()
    with torch.no_grad():
        expected = model(IDS).logits
        output = model(IDS, labels=IDS)
    assert repr(output.logits) == "logits not made yet" and output.logits.dtype == torch.float32
    uses: list[tuple[Any, Any]] = [
        (output.logits[:, -1], expected[:, -1]),
        (output["logits"].argmax(-1), expected.argmax(-1)),
        (torch.softmax(output.logits, -1), expected.softmax(-1)),
        (dict(output.items())["logits"].detach(), expected),
        (pickle.loads(pickle.dumps(output)).logits, expected),
        (torch.from_numpy(np.asarray(output.logits)), expected),
    ]
    for made, wanted in uses:
        torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-6)
    assert not output.logits.requires_grad and len(output.logits) == 1


def changes(model: Any, given: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """What makes another model, or another reading, of it."""

    def replaced() -> None:
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.5

    def a_little() -> None:
        for parameter in model.parameters():
            parameter.data.mul_(1 + 1e-6 * torch.randn_like(parameter))

    def new_head() -> None:
        model.head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)

    def drawing() -> None:
        model.model.blocks[0].register_forward_hook(
            lambda module, args, output: (output[0] + torch.randn_like(output[0]), *output[1:])
        )

    return {
        "written to": lambda: model.head.weight.mul_(2),
        "data replaced": replaced,
        "data written to": a_little,
        "assigned": lambda: model.load_state_dict(
            {name: 2 * tensor for name, tensor in model.state_dict().items()}, assign=True
        ),
        "another dtype": lambda: model.to(torch.bfloat16),
        "another head": new_head,
        "a hook": drawing,
        "embeddings": lambda: given["inputs_embeds"].zero_(),
    }


@pytest.mark.parametrize("change", changes(None, {}))
@torch.no_grad()
def test_logits_of_a_model_that_has_changed_are_refused(change: str) -> None:
    model = tiny_model("5.2").eval()
    given = {"inputs_embeds": model.get_input_embeddings()(IDS).clone()}
    output = model(**given, labels=IDS)
    changes(model, given)[change]()
    with pytest.raises(StrategyError, match="have changed"):
        output.logits.argmax(-1)


@pytest.mark.parametrize("bptt", ["full", "checkpoint", "reversible"])
@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
@torch.no_grad()
def test_in_float64_the_loss_itself_tells(version: str, bptt: str) -> None:
    """A number that is not among those that are kept of its tensor."""
    model = tiny_model(version, dtype=torch.float64, bptt=bptt, chunk_length=3).eval()
    loss = model(IDS, labels=IDS)
    same, expected = model(IDS, labels=IDS).logits + 0, model(IDS).logits
    torch.testing.assert_close(same, expected, rtol=1e-12, atol=1e-12)
    model.head.weight.data[5, 1] += 1e-6
    with pytest.raises(StrategyError, match="have changed"):
        loss.logits.argmax(-1)


@torch.no_grad()
def test_weights_that_are_not_numbers_are_the_same_ones() -> None:
    model = tiny_model("5.2").eval()
    model.head.weight[3] = float("nan")
    model.model.blocks[0].time_mix.key.weight.data = model.model.blocks[0].time_mix.key.weight.data.t()
    output = model(IDS, labels=IDS)
    assert output.logits.isnan().any()


@torch.no_grad()
def test_logits_are_those_of_what_was_handed_over() -> None:
    """Buffers that are filled anew are no matter."""
    model = tiny_model("5.2").eval()
    ids, state, mask = IDS.clone(), model(IDS).state, torch.ones_like(IDS)
    mask[:, :2] = 0
    expected = model(ids, attention_mask=mask, state=state).logits
    output = model(ids, attention_mask=mask, state=state, labels=ids)
    ids.fill_(1)
    mask.fill_(1)
    for tensor in state.tensors():
        tensor.zero_()
    torch.testing.assert_close(output.logits.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("labels", ["few", "none", "shifted"])
@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
@torch.no_grad()
def test_no_buffer_is_read_again(version: str, labels: str) -> None:
    """Where labels end early the loss tells of nothing behind them."""
    model = tiny_model(version, bptt="reversible", chunk_length=5).eval()
    ids, borders = random_tokens(19), torch.zeros(1, 19, dtype=torch.bool)
    borders[:, 12] = True
    mask = torch.ones_like(borders)
    mask[:, [0, 15]] = False
    expected = model(ids, attention_mask=mask, borders=borders).logits
    given = {"attention_mask": mask, "borders": borders, "num_items_in_batch": torch.tensor(3.0)}
    given["labels" if labels != "shifted" else "shift_labels"] = targets = ids.clone()
    targets[:, (4 if labels != "none" else 0) :] = -100
    output = model(ids, loss_weights=torch.ones(1, 19), **given)
    mask[:, 6:9], borders[:, 14], borders[:, 12] = False, True, False
    targets.fill_(1)
    given["num_items_in_batch"].fill_(7)
    torch.testing.assert_close(output.logits.detach(), expected, rtol=1e-5, atol=1e-6)


def adapted(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    model = tiny_model("5.2", bptt="reversible", chunk_length=3).to(dtype)
    lora = peft.LoraConfig(r=2, target_modules=["key", "value"], init_lora_weights=False, **settings)
    return peft.get_peft_model(model, lora).eval()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("labels", [IDS, torch.full_like(IDS, -100)], ids=["all", "none"])
@torch.no_grad()
def test_adapters_that_were_switched_since(labels: torch.Tensor) -> None:
    """As TRL's reference: where nothing is predicted, only what the modules go by tells of it."""
    model = adapted()
    with model.disable_adapter():
        expected = model(input_ids=IDS).logits
        inside, outside = (model(input_ids=IDS, labels=labels) for _ in range(2))
        torch.testing.assert_close(inside.logits.detach(), expected)
    with pytest.raises(StrategyError, match=r"have changed .*disable_adapters\): use them before"):
        outside.logits.argmax(-1)
    output = model(input_ids=IDS, labels=labels)
    with model.disable_adapter(), pytest.raises(StrategyError, match="have changed"):
        output.logits.argmax(-1)
    torch.testing.assert_close(output.logits.detach(), model(input_ids=IDS).logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_training_mode_since_then_is_no_matter(dtype: torch.dtype) -> None:
    model = adapted(dtype, lora_dropout=0.1)
    model.requires_grad_(True)
    expected = model(input_ids=IDS).logits
    output = model(input_ids=IDS, labels=IDS)
    model.train().requires_grad_(False)
    logits = output.logits.detach()
    torch.testing.assert_close(logits.float(), expected.float(), rtol=1e-5, atol=1e-6)
    assert all(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
def test_what_was_drawn_is_not_drawn_again() -> None:
    """By a part of the model that was left in training; nothing is predicted, so that the loss tells of nothing."""
    model = tiny_model("5.2").eval()
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: F.dropout(output, 0.5))
    output = model(IDS, labels=torch.full_like(IDS, -100))
    with pytest.raises(StrategyError, match="random numbers were drawn"):
        output.logits.argmax(-1)


@torch.no_grad()
def test_notes_that_calls_make_are_no_change() -> None:
    """Pruned weights are made anew by each call."""
    model = tiny_model("5.2").eval()
    torch.nn.utils.prune.random_unstructured(model.model.blocks[0].channel_mix.key, "weight", 0.5)
    expected = model(IDS).logits
    output = model(IDS, labels=IDS)
    model(random_tokens(5), labels=random_tokens(5))
    torch.testing.assert_close(output.logits.detach(), expected, rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_embeddings_of_inference_mode_may_be_overwritten() -> None:
    model = tiny_model("5.2").eval()
    embeds = model.get_input_embeddings()(IDS).clone()
    expected = model(inputs_embeds=embeds).logits
    output = model(inputs_embeds=embeds, labels=torch.full_like(IDS, -100))
    embeds.zero_()
    torch.testing.assert_close(output.logits + 0, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_logits_beside_hidden_states() -> None:
    model = tiny_model("5.2").eval()
    output = model(IDS, labels=IDS, output_hidden_states=True)
    torch.testing.assert_close(output.logits, model(IDS).logits)


@torch.no_grad()
def test_memory_that_is_not_there_is_not_handed_out() -> None:
    """``to_dlpack`` asks no subclass of a tensor: its process crashed, or read other numbers."""
    model = tiny_model("5.2").eval()
    logits = model(IDS, labels=IDS).logits
    with pytest.raises(RuntimeError, match="data pointer"):
        torch.utils.dlpack.to_dlpack(logits)
    assert torch.equal(torch.from_dlpack(logits), model(IDS).logits)


@torch.no_grad()
def test_an_output_layer_of_another_size() -> None:
    model = tiny_model("5.2").eval()
    model.head = torch.nn.Linear(16, 40)
    logits = model(IDS, labels=IDS).logits
    assert logits.shape == (*IDS.shape, 40)
    assert torch.equal(logits + 0, model(IDS).logits)
    model.head = torch.nn.Sequential(model.head)  # which does not say how many numbers it gives
    logits = model(IDS, labels=IDS).logits
    with pytest.raises(StrategyError, match=r"gives logits of 40 numbers.* 32: pass return_logits=True"):
        logits.argmax(-1)
    assert model(IDS, labels=IDS, return_logits=True).logits.shape == (*IDS.shape, 40)
