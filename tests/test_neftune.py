"""NEFTune's noise on the embeddings, as ``Trainer(neftune_noise_alpha=...)`` makes it: exact in every chunk.

Held against one graph over the chunks with the same draws, whose noise is as large as that of the whole context.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import random_tokens, relative_errors, tiny_model
from one_graph import in_one_graph
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.integrations.neftune import neftune_post_forward_hook

# peft still uses names that transformers 5 renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LENGTH = 24
IDS = random_tokens(LENGTH, 2)


def noisy(*, adapted: bool) -> tuple[Any, nn.Module]:
    """A model in float64, with or without LoRA on its embeddings, and with the hook that Trainer sets."""
    model = tiny_model("5.2")
    wrapped = model
    if adapted:
        torch.manual_seed(0)
        config = LoraConfig(
            r=4, target_modules=["key", "embeddings"], lora_dropout=0.2, init_lora_weights=False
        )
        wrapped = get_peft_model(model, config)
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5
    embeddings.register_forward_hook(neftune_post_forward_hook)
    return model, wrapped.double().train()


def gradients(model: Any, wrapped: nn.Module, strategy: str, length: int, seed: int = 5) -> dict[str, Tensor]:
    wrapped.zero_grad()
    torch.manual_seed(seed)
    with model.set_bptt(strategy, chunk_length=length):
        loss = wrapped(input_ids=IDS, labels=IDS).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("length", [12, 8, 6])
def test_gradient(length: int, adapted: bool) -> None:
    model, wrapped = noisy(adapted=adapted)
    with in_one_graph(length):
        expected = gradients(model, wrapped, "full", length)
    for strategy in ("reversible", "checkpoint"):
        found = gradients(model, wrapped, strategy, length)
        assert max(relative_errors(found, expected).values()) <= 1e-10
    assert gradients(model, wrapped, strategy, length, seed=6)["loss"] != found["loss"]


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = random_tokens(LENGTH, seed=10 + index)[0]
        return {"input_ids": ids, "labels": ids}


def trained(folder: Path, strategy: str, length: int) -> dict[str, Tensor]:
    """The weights after two steps of Trainer."""
    model = tiny_model("5.2", bptt=strategy, chunk_length=length)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=2,
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=1e9,
        neftune_noise_alpha=5,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    Trainer(model=model, args=arguments, train_dataset=Rows()).train()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_trainer(tmp_path: Path) -> None:
    with in_one_graph(8):
        expected = trained(tmp_path, "full", 8)
    for strategy in ("reversible", "checkpoint"):
        found = trained(tmp_path, strategy, 8)
        assert max(relative_errors(found, expected).values()) <= 1e-5
