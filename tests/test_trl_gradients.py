"""One step of each trainer of trl, in several short chunks: the gradient of ``full``, for every bundled model.

Each way to train meets two of the generations, and each trainer all four.

Weights are shaken after a trainer has been made, and after a batch has: policy, reference and the policy that sampled
are three models then, and no term of a loss is zero because two of them agree.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import bptt_cases
import pytest
import torch
from bptt_cases import AGREE, english, grouped_errors
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from torch import Tensor
from transformers import AutoTokenizer, Trainer

from rwkv_rev import RwkvRevForCausalLM, base_model

pytest.importorskip("trl", minversion="1.16")
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

# trl still uses names that transformers 5 renamed
pytestmark = [
    pytest.mark.usefixtures("numbered_datasets"),
    pytest.mark.filterwarnings(
        "ignore:`(is_)?gradient_checkpointing.* is deprecated:FutureWarning",
        "ignore:`label_smoothing_factor` is deprecated:FutureWarning",
    ),
]

VERSIONS = ("4", "5.2", "6", "7")
CHUNK = 23
LENGTHS = (56, 38, 48, 36)
LORA = partial(LoraConfig, r=4, target_modules=["key", "value"])
Make = Callable[[RwkvRevForCausalLM, Path, Path], Trainer]


def texts() -> list[str]:
    rows = english(max(LENGTHS), batch=len(LENGTHS))
    return [
        bytes(row[:length].tolist()).decode("ascii", "ignore")
        for row, length in zip(rows, LENGTHS, strict=True)
    ]


def settings(output: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        **options,
    }


def sft(kind: str, model: RwkvRevForCausalLM, folder: Path, output: Path, **options: Any) -> Trainer:
    rows: list[dict[str, Any]] = [{"text": text} for text in texts()]
    if kind == "completion":
        rows = [{"prompt": text[:30], "completion": text[30:]} for text in texts()]
    if kind == "assistant":
        rows = [
            {
                "messages": [
                    {"role": role, "content": words}
                    for role, words in (
                        ("user", text[:20]),
                        ("assistant", text[20:30]),
                        ("user", text[30:35]),
                        ("assistant", text[35:]),
                    )
                ]
            }
            for text in texts()
        ]
    adapter = options.pop("adapter", None)
    return SFTTrainer(
        model=model,
        args=SFTConfig(**settings(output, **options)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=adapter and adapter(),
    )


def dpo(model: RwkvRevForCausalLM, folder: Path, output: Path, **options: Any) -> Trainer:
    adapter = options.pop("adapter", None)
    pairs = [{"prompt": yes[:30], "chosen": yes[30:], "rejected": no[30:]} for yes, no in pairwise(texts())]
    return DPOTrainer(
        model=model,
        args=DPOConfig(**settings(output, **options)),
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=adapter and adapter(),
    )


def vowels(completions: list[str], **_: Any) -> list[float]:
    """What is rewarded."""
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]


def grpo(model: RwkvRevForCausalLM, folder: Path, output: Path, **options: Any) -> Trainer:
    """Prompts of two lengths and answers of several: rows are padded on the left and on the right."""
    adapter = options.pop("adapter", None)
    model.generation_config.eos_token_id = ord("o")  # ends some of the answers, not all
    given: dict[str, Any] = {"num_generations": 2, "max_completion_length": 16, **options}
    return GRPOTrainer(
        model=model,
        args=GRPOConfig(**settings(output, **given)),
        train_dataset=Dataset.from_dict({"prompt": [texts()[0][:45], texts()[1][:30]]}),
        processing_class=AutoTokenizer.from_pretrained(folder),
        reward_funcs=vowels,
        peft_config=adapter and adapter(),
    )


CASES: dict[str, Make] = {
    "sft": partial(sft, "text"),
    "sft-packed": partial(sft, "text", packing=True, max_length=512),
    "sft-packed-completion": partial(
        sft, "completion", packing=True, max_length=512, completion_only_loss=True
    ),
    "sft-assistant": partial(sft, "assistant", assistant_only_loss=True),
    "dpo": dpo,
    "dpo-lora": partial(dpo, adapter=LORA),
    "dpo-precomputed": partial(dpo, precompute_ref_log_probs=True),
    "grpo": partial(grpo, beta=0.1, num_iterations=2),
    "grpo-lora": partial(grpo, beta=0.1, num_iterations=2, adapter=LORA),
}
"""Of two generations, in turns."""
PROMPT = partial(PromptTuningConfig, task_type="CAUSAL_LM", num_virtual_tokens=5)
OTHERS: dict[str, Make] = {
    "sft-padding-free-multiple": partial(
        sft, "text", padding_free=True, max_length=None, pad_to_multiple_of=64
    ),
    "sft-smoothed": partial(sft, "text", label_smoothing_factor=0.1),
    "sft-selective": partial(sft, "text", gradient_checkpointing_kwargs={"selective": True}),
    "sft-prompt": partial(sft, "text", adapter=PROMPT),
    "dpo-prompt": partial(dpo, adapter=PROMPT),
    "dpo-lora-precomputed": partial(dpo, precompute_ref_log_probs=True, adapter=LORA),
    "dpo-length": partial(dpo, ld_alpha=0.5),
    "grpo-prompt": partial(grpo, beta=0.1, adapter=PROMPT),
    "grpo-sequence": partial(grpo, num_iterations=2, importance_sampling_level="sequence", loss_type="grpo"),
    "grpo-truncated": partial(grpo, mask_truncated_completions=True, beta=0.1),
    "grpo-entropy": partial(grpo, num_iterations=2, top_entropy_quantile=0.5),
    "grpo-reentrant": partial(grpo, gradient_checkpointing_kwargs={"use_reentrant": True}),
}
"""Further settings that change what the model is asked for, of one generation."""


def load(folder: Path) -> RwkvRevForCausalLM:
    model = bptt_cases.load(folder)
    model.set_bptt("reversible", chunk_length=CHUNK)
    return model


def shake(parameters: Iterable[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.03 * noise * (parameter.std(correction=0) + 0.1)


def step(made: Trainer) -> tuple[Callable[[str], dict[str, Tensor]], list[float]]:
    """One batch as the trainer prepares it: the gradient of its loss by the strategy named, and the losses so far."""
    losses: list[float] = []
    made.current_gradient_accumulation_steps = 1  # as the loop of Trainer sets it
    made.model.train()
    shake(made.model.parameters(), 1)
    torch.manual_seed(3)
    batch = made._prepare_inputs(next(iter(made.get_train_dataloader())))
    shake(made.model.parameters(), 2)
    bare = next(m for m in made.model.modules() if isinstance(m, RwkvRevForCausalLM))

    def gradient(strategy: str) -> dict[str, Tensor]:
        made.model.zero_grad(set_to_none=True)
        with bare.set_bptt(strategy, chunk_length=CHUNK):
            loss = made.compute_loss(made.model, dict(batch))
            loss.backward()
        found = {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}
        losses.append(loss.item())
        return found

    return gradient, losses


def assert_agree(made: Trainer, monkeypatch: pytest.MonkeyPatch, *strategies: str) -> None:
    gradient, losses = step(made)
    swept: list[int] = []
    read = base_model.hidden_states
    monkeypatch.setattr(base_model, "hidden_states", lambda *a, **k: swept.append(1) or read(*a, **k))
    expected = gradient("full")
    assert not swept and any(bool(found.any()) for found in expected.values())
    for strategy in strategies:
        errors = grouped_errors(gradient(strategy), expected)
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] <= AGREE, (strategy, worst, errors[worst])
    assert len(swept) == len(strategies), "each took the two sweeps"
    assert losses[1:] == pytest.approx(
        [losses[0]] * len(strategies), rel=1e-5, abs=1e-6
    )  # of GRPO terms of both signs, near 0


@pytest.mark.parametrize(
    ("case", "version", "strategies"),
    [
        (case, VERSIONS[(i + turn) % 4], strategies)
        for i, case in enumerate(CASES)
        for turn, strategies in ((0, ("reversible", "checkpoint")), (2, ("reversible",)))
    ],
)
def test_gradient(
    case: str,
    version: str,
    strategies: tuple[str, ...],
    shallow: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By ``checkpoint``, too, in the first of a case's two generations, which are all four."""
    made = CASES[case](load(shallow[version]), shallow[version], tmp_path)
    assert_agree(made, monkeypatch, *strategies)


@pytest.mark.parametrize("case", OTHERS)
def test_gradient_of_other_settings(
    case: str, shallow: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = OTHERS[case](load(shallow["7"]), shallow["7"], tmp_path)
    assert_agree(made, monkeypatch, "reversible")


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # peft's own, as it takes them away
@pytest.mark.parametrize(
    "options",
    [{"packing": True, "max_length": 512}, {"padding_free": True, "max_length": None}],
    ids=["packing", "padding-free"],
)
def test_packed_rows_under_prompt_learning_are_refused(
    options: dict[str, Any], shallow: dict[str, Path], tmp_path: Path
) -> None:
    made = sft("text", load(shallow["7"]), shallow["7"], tmp_path, adapter=PROMPT, **options)
    with pytest.raises(ValueError, match="give each document a row of its own"):
        step(made)[0]("reversible")
