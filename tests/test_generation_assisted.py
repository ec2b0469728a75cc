"""Assisted generation: the text of greedy search, drafts read at once, and rejected ones gone without a trace."""

from typing import Any

import pytest
import torch
from bptt_cases import VERSIONS, random_state, random_tokens, relative_error
from generation_cases import GREEDY, LENGTH, evaluated, reading, recomputed, returned_past
from transformers import LlamaConfig, LlamaForCausalLM


def drafting(assistant: Any, tokens: int) -> None:
    """Let it draft so many tokens each time, however unsure it is."""
    assistant.generation_config.num_assistant_tokens = tokens
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0


def assisted_rounds(lengths: list[int], drafts: int) -> list[int]:
    """Tokens read after the prompt; the prompt itself is read once, before the first draft."""
    assert lengths[:2] == [LENGTH - 1, drafts + 1]
    return lengths[1:]


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_assistant_that_is_always_right(version: str, with_state: bool) -> None:
    """Drafts are read at once, and nothing is read twice."""
    model, prompt, new = evaluated(version), random_tokens(LENGTH), 10
    assistant, state = evaluated(version), None
    drafting(assistant, 5)
    if with_state:  # which the assistant is not told of: it is an assistant that begins as the model goes on
        state = random_state(model, 1)
        assistant.initial_state = lambda batch, device=None: state
        assistant.model.initial_state = lambda batch, device=None: state
    with reading(model) as lengths, reading(assistant) as drafted:
        found = model.generate(prompt, **GREEDY, max_new_tokens=new, assistant_model=assistant, state=state)
    assert found[0, LENGTH:].tolist() == recomputed(model, prompt, new, state)
    assert sum(lengths) == LENGTH + new - 1
    assert len(assisted_rounds(lengths, 5)) < new / 2
    assert sum(drafted) < LENGTH + new


@pytest.mark.parametrize("kind", ["other weights", "other architecture", "prompt lookup"])
def test_assistants_that_are_often_wrong(kind: str) -> None:
    """What was rejected leaves no trace; what was accepted is read at most twice."""
    model, prompt, new = evaluated(), random_tokens(LENGTH), 16
    torch.manual_seed(0)
    if kind == "prompt lookup":
        options: dict[str, Any] = {"prompt_lookup_num_tokens": 4}
    else:
        assistant = evaluated(seed=5) if kind == "other weights" else tiny_llama()
        with torch.no_grad():  # half right
            if kind == "other weights":
                for mine, other in zip(assistant.parameters(), model.parameters(), strict=True):
                    mine.lerp_(other, 0.8)
        drafting(assistant, 4)
        options = {"assistant_model": assistant}
    with reading(model) as lengths:
        output = model.generate(prompt, **GREEDY, max_new_tokens=new, **options, return_dict_in_generate=True)
    found = output.sequences
    assert found[0, LENGTH:].tolist() == recomputed(model, prompt, new)
    assert sum(lengths) > LENGTH + new - 1, "no draft was wrong; this test needs one that is"
    assert lengths[0] == LENGTH - 1
    assert max(lengths[1:]) <= 5
    past = returned_past(output)
    assert relative_error(past.state.wkv, model(found[:, :-1]).state.wkv) < 1e-12


def test_assistant_of_another_model() -> None:
    """An RWKV model drafts for a transformer, and reads each token once but for what was rejected."""
    target, assistant, prompt = tiny_llama(), evaluated(), random_tokens(LENGTH)
    drafting(assistant, 4)
    options = {**GREEDY, "max_new_tokens": 12}
    with reading(assistant) as lengths:
        found = target.generate(prompt, **options, assistant_model=assistant)
    assert torch.equal(found, target.generate(prompt, **options))
    assert lengths[0] == LENGTH - 1
    assert max(lengths[1:]) <= 2


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).double().eval()
