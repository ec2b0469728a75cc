"""Generation with adapters and virtual tokens of peft."""

from typing import Any

import pytest
import torch
from bptt_cases import random_tokens
from generation_cases import EACH_ONCE, GREEDY, LENGTH, NEW, evaluated, reading, recomputed, returned_past

# peft still uses a name that transformers 5 renamed
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

VIRTUAL = 4


def prompt_learner(kind: str) -> Any:
    """A prompt- or P-tuned model, its virtual tokens as random as an embedding."""
    from peft import PromptEncoderConfig, PromptTuningConfig, get_peft_model

    torch.manual_seed(0)
    config: Any = {
        "prompt tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
        "P-tuning": lambda: PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, encoder_hidden_size=16
        ),
    }[kind]()
    return get_peft_model(evaluated(), config).double().eval()


@pytest.mark.parametrize("kind", ["prompt tuning", "P-tuning"])
def test_virtual_tokens_are_read_once(kind: str) -> None:
    """They come before the prompt and nowhere else: the text is that of reading them and it for every token."""
    learner = prompt_learner(kind)
    model = learner.base_model
    prompts = [random_tokens(LENGTH), random_tokens(6, seed=7)]
    expected = []
    for prompt in prompts:
        row = prompt
        for _ in range(12):
            with torch.no_grad():
                text = model.get_input_embeddings()(row)
                embeds = torch.cat([learner.get_prompt(batch_size=1), text], dim=1)
                token = model(inputs_embeds=embeds).logits[:, -1].argmax(-1, keepdim=True)
            row = torch.cat([row, token], dim=1)
        expected.append(row[0, prompt.shape[1] :].tolist())
    options = {**GREEDY, "max_new_tokens": 12}
    with reading(model) as lengths:
        found = learner.generate(input_ids=prompts[0], **options)
    assert found[0, LENGTH:].tolist() == expected[0]
    assert lengths == [VIRTUAL + LENGTH] + [1] * 11
    batch, mask = torch.full((2, LENGTH), 31), torch.zeros(2, LENGTH, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        batch[row, -prompt.shape[1] :], mask[row, -prompt.shape[1] :] = prompt[0], 1
    for more in ({}, {"num_beams": 1, "use_cache": False}):
        found = learner.generate(
            input_ids=batch, attention_mask=mask, **options | {"pad_token_id": 31}, **more
        )
        assert found[:, LENGTH:].tolist() == expected


@pytest.mark.parametrize("use_cache", [True, False])
def test_virtual_tokens_are_in_a_state_already(use_cache: bool) -> None:
    """A text that goes on from a state begins with no virtual tokens: they were read where it began."""
    learner = prompt_learner("prompt tuning")
    options = {**GREEDY, "max_new_tokens": 6}
    first = learner.generate(input_ids=random_tokens(LENGTH), **options, return_dict_in_generate=True)
    more = torch.cat([first.sequences[:, -1:], random_tokens(3, seed=8)], dim=1)
    past = returned_past(first).state
    found = learner.generate(input_ids=more, **options, state=past, use_cache=use_cache)
    assert found[0, 4:].tolist() == recomputed(learner.base_model, more, 6, past)


def test_virtual_tokens_and_drafts() -> None:
    """peft cuts drafts off, for any model: refused."""
    learner = prompt_learner("prompt tuning")
    prompt = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2]])
    with pytest.raises(ValueError, match="peft's prompt learning; generate without an assistant"):
        learner.generate(input_ids=prompt, **GREEDY, max_new_tokens=12, prompt_lookup_num_tokens=3)


def test_an_adapter_reads_each_token_once() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["key", "value"], init_lora_weights=False)
    learner, prompt = get_peft_model(evaluated(), config).double().eval(), random_tokens(LENGTH)
    model = learner.base_model.model
    with reading(model) as lengths:
        found = learner.generate(input_ids=prompt, **GREEDY, max_new_tokens=NEW)
    assert lengths == EACH_ONCE
    assert found[0, LENGTH:].tolist() == recomputed(model, prompt, NEW)


def test_prefix_tuning_is_refused_by_name() -> None:
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=2, token_dim=16, num_attention_heads=2
    )
    learner, prompt = get_peft_model(evaluated(), config), random_tokens(LENGTH)
    for call in (
        lambda: learner(input_ids=prompt, labels=prompt),
        lambda: learner.generate(input_ids=prompt, **GREEDY, max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match=r"past_key_values is a DynamicCache.*prefix tuning"):
            call()
