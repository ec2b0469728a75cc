"""trl's GRPOTrainer against a loop written out, what it samples, and what it may not ask for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import AGREE, english, grouped_errors
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, TrainerCallback

from rwkv_rev import RwkvRevForCausalLM, base_model

pytest.importorskip("trl", minversion="1.16")
from trl import GRPOConfig, GRPOTrainer

# trl still uses names that transformers 5 renamed
pytestmark = [
    pytest.mark.usefixtures("numbered_datasets"),
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.* is deprecated:FutureWarning"),
]

CHUNK, STEPS, RATE, GROUP = 17, 2, 0.01, 3
PROMPTS = [
    bytes(row[:length].tolist()).decode("ascii") for row, length in zip(english(48, 2), (48, 31), strict=True)
]
END = ord("o")
"""A token that ends some of the answers, not all."""


class Seen(TrainerCallback):
    """What was sampled, and the gradient of each step; rewards the share of vowels."""

    __name__ = "vowels"

    def __init__(self) -> None:
        self.batches: list[list[tuple[str, list[int], float]]] = []
        self.steps: list[dict[str, Tensor]] = []

    def __call__(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        rewards = [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]
        self.batches.append(list(zip(prompts, completion_ids, rewards, strict=True)))
        return rewards

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters()})


def trainer(folder: Path, output: Path, **options: Any) -> tuple[RwkvRevForCausalLM, GRPOTrainer, Seen]:
    model = RwkvRevForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.set_bptt("reversible", chunk_length=CHUNK)
    model.generation_config.eos_token_id = END
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "per_device_train_batch_size": 2 * GROUP,
        "num_generations": GROUP,
        "max_completion_length": 16,
        "max_steps": STEPS,
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        **options,
    }
    seen = Seen()
    made = GRPOTrainer(
        model=model,
        args=GRPOConfig(**settings),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=AutoTokenizer.from_pretrained(folder),
        reward_funcs=seen,
        callbacks=[seen],
    )
    return model, made, seen


def loop(
    folder: Path, batches: list[list[tuple[str, list[int], float]]], dtype: torch.dtype = torch.float64
) -> list[dict[str, Tensor]]:
    """The gradients of the same steps, every row alone, on logits of whole contexts.

    GRPO (Shao et al. 2024) with its sum divided by the tokens of all answers, as DAPO (Yu et al. 2025) has it. Each
    batch is used once, so that the ratio of probabilities is 1, and its gradient that of the logarithm.
    """
    model = RwkvRevForCausalLM.from_pretrained(folder, dtype=dtype).train()
    model.set_bptt("full")
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    steps = []
    for batch in batches:
        optimizer.zero_grad()
        tokens = sum(len(answer) for _, answer, _ in batch)
        for prompt, answer, reward in batch:
            group = torch.tensor([other for name, _, other in batch if name == prompt])
            advantage = (reward - group.mean()) / (group.std() + 1e-4)
            ids = torch.tensor([[*prompt.encode(), *answer]])
            log_p = model(ids).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
            chosen = log_p.gather(1, ids[0, -len(answer) :, None])
            (-advantage * chosen.sum() / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        steps.append({name: p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
    return steps


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_steps_of_a_loop_of_ones_own(version: str, shallow: dict[str, Path], tmp_path: Path) -> None:
    """Prompts padded on the left, answers that end early on the right, activation checkpointing as trl has it."""
    _, made, seen = trainer(shallow[version], tmp_path)
    made.train()
    lengths = {len(answer) for batch in seen.batches for _, answer, _ in batch}
    assert len(lengths) > 1 and len({prompt for prompt, _, _ in seen.batches[0]}) == 2
    expected = loop(shallow[version], seen.batches)
    assert len(seen.steps) == len(expected) == STEPS
    errors = [grouped_errors(mine, other) for mine, other in zip(seen.steps, expected, strict=True)]
    if max(max(step.values()) for step in errors) <= AGREE:
        return
    single = loop(shallow[version], seen.batches, torch.float32)
    for found, plain, other in zip(errors, single, expected, strict=True):
        of_float32 = grouped_errors(plain, other)
        for kind, error in found.items():
            assert error <= max(AGREE, 1.5 * of_float32[kind]), kind


def test_answers_are_the_models(
    shallow: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token is read once, and without chance the answers are the likeliest ones to the prompts alone."""
    pieces: list[int] = []
    run = base_model.run_layers

    def counted(blocks: Any, x: Tensor, *others: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            pieces.append(x.shape[1])
        return run(blocks, x, *others, **named)

    monkeypatch.setattr(base_model, "run_layers", counted)
    model, made, seen = trainer(shallow["7"], tmp_path, top_k=1, max_steps=1)
    made.model.train()
    made._prepare_inputs(next(iter(made.get_train_dataloader())))
    (batch,) = seen.batches
    longest = max(len(answer) for _, answer, _ in batch)
    assert sum(pieces) == len(max(PROMPTS, key=len)) + longest - 1
    model.eval()
    for prompt, answer, _ in batch:
        ids = torch.tensor([[*prompt.encode(), *answer]])
        with torch.no_grad():
            likeliest = model(ids).logits[0, -len(answer) - 1 : -1].argmax(-1)
        assert likeliest.tolist() == answer


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"use_transformers_continuous_batching": True},
            ValueError,
            "call generate with a left-padded batch",
        ),
        ({"cache_implementation": "static"}, ValueError, "this model's cache is its state"),
        ({"cast_lm_head_to_fp32": True}, AttributeError, "no attribute 'lm_head'"),
    ],
    ids=["paged", "cache", "head"],
)
def test_what_is_refused(
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    shallow: dict[str, Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        trainer(shallow["5.2"], tmp_path, **options)[1].train()
