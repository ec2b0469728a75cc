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

    def new_head() -> None:
        model.head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)

    def drawing() -> None:
        model.model.blocks[0].register_forward_hook(
            lambda module, args, output: (output[0] + torch.randn_like(output[0]), *output[1:])
        )

    return {
        "written to": lambda: model.head.weight.mul_(2),
        "data replaced": replaced,
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


@torch.no_grad()
def test_logits_beside_hidden_states() -> None:
    model = tiny_model("5.2").eval()
    output = model(IDS, labels=IDS, output_hidden_states=True)
    torch.testing.assert_close(output.logits, model(IDS).logits)
