"""trl's trainers: SFTTrainer and DPOTrainer against loops written out on logits, and what they may not ask for."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bptt_cases import AGREE, english, grouped_errors, relative_error, relative_errors
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
)
from transformers.utils import logging

from rwkv_rev import RwkvRevForCausalLM, base_model
from rwkv_rev.bptt import Reversible

pytest.importorskip("trl", minversion="1.16")
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

# trl still uses names that transformers 5 renamed
pytestmark = [
    pytest.mark.usefixtures("numbered_datasets"),
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.* is deprecated:FutureWarning"),
]

CHUNK, STEPS, RATE = 20, 2, 0.01
LENGTHS = (56, 44, 50, 42)
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '\\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}{% endfor %}"
)
Loss = Callable[[Tensor, Tensor], Tensor]


class OwnLossTrainer(SFTTrainer):
    """Trains on the model's own loss, which trl's is held against."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        own = model.training and self.args.loss_type == "nll"
        return (Trainer if own else SFTTrainer).compute_loss(self, model, inputs, *args, **kwargs)


TRAINERS = pytest.mark.parametrize("trainer", [SFTTrainer, OwnLossTrainer])


class Gradients(TrainerCallback):
    """Keeps what each step is made of."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.steps.append(gradients(model))


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def model(shallow: dict[str, Path]) -> RwkvRevForCausalLM:
    model = RwkvRevForCausalLM.from_pretrained(shallow["5.2"], dtype=torch.float32).train()
    model.set_bptt("reversible", chunk_length=CHUNK)
    return model


@pytest.fixture
def tokenizer(shallow: dict[str, Path]) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(shallow["5.2"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def fast_tokenizer() -> PreTrainedTokenizerBase:
    """Ids of ASCII, with the places of tokens in the text, which a mask of the assistant's tokens needs."""
    characters = Tokenizer(WordLevel({chr(i): i for i in range(128)}))
    characters.pre_tokenizer = Split("", "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="\0", pad_token="\0")
    made.chat_template = TEMPLATE
    return made


def texts() -> list[str]:
    rows = english(max(LENGTHS), batch=len(LENGTHS))
    return [
        bytes(row[:length].tolist()).decode("ascii", "ignore")
        for row, length in zip(rows, LENGTHS, strict=True)
    ]


def settings(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "logging_steps": 1,
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "bf16": False,
        **options,
    }


def sft(
    trainer: type[SFTTrainer],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    rows: Dataset | None = None,
    peft_config: Any = None,
    **options: Any,
) -> tuple[SFTTrainer, list[dict[str, Tensor]]]:
    """A trainer that has trained, and the gradients of its steps."""
    seen = Gradients()
    made = trainer(
        model=model,
        args=SFTConfig(**settings(folder, **options)),
        train_dataset=Dataset.from_dict({"text": texts()}) if rows is None else rows,
        processing_class=tokenizer,
        callbacks=[seen],
        peft_config=peft_config,
    )
    made.train()
    return made, seen.steps


def losses(made: Trainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)


def mean_nll(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def dynamic(logits: Tensor, labels: Tensor) -> Tensor:
    """Dynamic fine-tuning (Wu et al. 2025, equation 9): each term weighs what it has as probability."""
    terms = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return (terms * (-terms).exp().detach()).sum() / (labels[:, 1:] != -100).sum()


Rows = tuple[tuple[int, ...], ...]


def loop(
    folder: Path,
    ids: list[list[int]],
    labels: list[list[int]],
    loss_of: Loss = mean_nll,
    dtype: torch.dtype = torch.float64,
) -> tuple[list[float], list[dict[str, Tensor]]]:
    """The same steps written out, on logits of whole contexts; with bfloat16 for dtype by autocast in float32.

    Equal arguments are answered once.
    """
    return _loop(folder, tuple(map(tuple, ids)), tuple(map(tuple, labels)), loss_of, dtype)


@cache
def _loop(
    folder: Path, ids: Rows, labels: Rows, loss_of: Loss, dtype: torch.dtype
) -> tuple[list[float], list[dict[str, Tensor]]]:
    bf16 = dtype == torch.bfloat16
    model = RwkvRevForCausalLM.from_pretrained(folder, dtype=torch.float32 if bf16 else dtype).train()
    model.set_bptt("full")
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    mask = padded([[1] * len(row) for row in ids], 0)
    found, steps = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(padded(ids, 0), attention_mask=mask).logits
        loss = loss_of(logits.float() if bf16 else logits, padded(labels, -100))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        steps.append(gradients(model))
        optimizer.step()
        found.append(loss.item())
    return found, steps


def assert_same_steps(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    """Of as many steps as were made, by kind of parameter."""
    assert 0 < len(found) <= len(expected)
    for mine, other in zip(found, expected, strict=False):
        assert mine.keys() == other.keys()
        for kind, error in grouped_errors(mine, other).items():
            assert error <= AGREE, kind


# --- supervised fine-tuning -------------------------------------------------------------------------------------


def columns(
    kind: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, list[list[int]], list[list[int]]]:
    """A data set, and its rows as ids and labels, by hand."""
    if kind == "text":
        ids = [[*text.encode(), 0] for text in texts()]
        return Dataset.from_dict({"text": texts()}), ids, ids
    halves = [(text[:30], text[30:]) for text in texts()]
    if kind == "completion":
        rows: Any = [{"prompt": prompt, "completion": rest} for prompt, rest in halves]
        pairs = [(prompt.encode(), rest.encode() + b"\0") for prompt, rest in halves]
    else:
        rows = [
            {
                "messages": [
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": rest},
                ]
            }
            for prompt, rest in halves
        ]
        pairs = [(f"user: {prompt}\nassistant: ".encode(), f"{rest}\n".encode()) for prompt, rest in halves]
    ids = [[*prompt, *rest] for prompt, rest in pairs]
    return Dataset.from_list(rows), ids, [[-100] * len(prompt) + [*rest] for prompt, rest in pairs]


@TRAINERS
@pytest.mark.parametrize("kind", ["text", "completion", "assistant"])
def test_sft(
    trainer: type[SFTTrainer],
    kind: str,
    model: RwkvRevForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    shallow: dict[str, Path],
    tmp_path: Path,
) -> None:
    """Losses and gradients of some steps, with activation checkpointing, which trl switches on."""
    rows, ids, labels = columns(kind, tokenizer)
    if kind == "assistant" and trainer is SFTTrainer:
        tokenizer = fast_tokenizer()  # beside ours
    count = STEPS if kind == "text" else 1
    made, steps = sft(
        trainer, model, tokenizer, tmp_path, rows, max_steps=count, assistant_only_loss=kind == "assistant"
    )
    assert model.model.gradient_checkpointing
    expected, wanted = loop(shallow["5.2"], ids, labels)
    assert losses(made) == pytest.approx(expected[:count], rel=1e-5)
    assert expected[-1] < expected[0] and len(steps) == count
    assert_same_steps(steps, wanted)


def test_accumulation(
    model: RwkvRevForCausalLM, tokenizer: PreTrainedTokenizerBase, shallow: dict[str, Path], tmp_path: Path
) -> None:
    """Rows of unequal length in two pieces count by their tokens."""
    ids = columns("text", tokenizer)[1]
    pieces = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    _, steps = sft(SFTTrainer, model, tokenizer, tmp_path, **pieces)
    assert_same_steps(steps, loop(shallow["5.2"], ids, ids)[1])


def test_dynamic_fine_tuning(
    model: RwkvRevForCausalLM, tokenizer: PreTrainedTokenizerBase, shallow: dict[str, Path], tmp_path: Path
) -> None:
    ids = columns("text", tokenizer)[1]
    made, steps = sft(SFTTrainer, model, tokenizer, tmp_path, loss_type="dft")
    expected, wanted = loop(shallow["5.2"], ids, ids, dynamic)
    assert losses(made) == pytest.approx(expected, rel=1e-5)
    assert_same_steps(steps, wanted)


@TRAINERS
def test_wrapped_packing_is_one_context(
    trainer: type[SFTTrainer],
    model: RwkvRevForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    shallow: dict[str, Path],
    tmp_path: Path,
) -> None:
    """Texts one after another, cut every 64 tokens: one state runs through each row."""
    stream = [token for row in columns("text", tokenizer)[1] for token in row]
    rows = [stream[start : start + 64] for start in range(0, len(stream), 64)]
    made, steps = sft(
        trainer,
        model,
        tokenizer,
        tmp_path,
        packing=True,
        packing_strategy="wrapped",
        max_length=64,
        max_steps=1,
    )
    expected, wanted = loop(shallow["5.2"], rows, rows)
    assert losses(made) == pytest.approx(expected[:1], rel=1e-5)
    assert_same_steps(steps, wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "max_length": 1024},
        {"packing": True, "packing_strategy": "bfd_split", "max_length": 1024},
        {"padding_free": True, "max_length": None},
    ],
    ids=["bfd", "bfd_split", "padding_free"],
)
@TRAINERS
def test_packed_documents_begin_anew(
    trainer: type[SFTTrainer],
    options: dict[str, Any],
    model: RwkvRevForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    shallow: dict[str, Path],
    tmp_path: Path,
) -> None:
    """All texts in one row: the loss and the gradients of each in a row of its own."""
    ids = columns("text", tokenizer)[1]
    assert sum(map(len, ids)) <= 1024
    made, steps = sft(trainer, model, tokenizer, tmp_path, max_steps=1, **options)
    expected, wanted = loop(shallow["5.2"], ids, ids)
    assert losses(made) == pytest.approx(expected[:1], rel=1e-5)
    assert_same_steps(steps, wanted)


@TRAINERS
def test_metrics(
    trainer: type[SFTTrainer],
    model: RwkvRevForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    """Evaluation tells loss, entropy and accuracy of the predicted tokens, as they follow from logits."""
    made, _ = sft(trainer, model, tokenizer, tmp_path, max_steps=1)
    found = made.evaluate(Dataset.from_dict({"text": texts()[:1]}))
    ids = torch.tensor([[*texts()[0].encode(), 0]])
    with torch.no_grad():
        logits = model.eval()(ids).logits[0, :-1]
    log_p, targets = logits.log_softmax(-1), ids[0, 1:]
    assert found["eval_loss"] == pytest.approx(F.nll_loss(log_p, targets).item(), rel=1e-5)
    assert found["eval_entropy"] == pytest.approx(-(log_p.exp() * log_p).sum(-1).mean().item(), rel=1e-4)
    right = (log_p.argmax(-1) == targets).float().mean().item()
    assert found["eval_mean_token_accuracy"] == pytest.approx(right, rel=1e-6)


@TRAINERS
def test_whose_loss_it_is(
    trainer: type[SFTTrainer],
    model: RwkvRevForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """trl's loss is on logits, ours is the model's own: both go through the two sweeps, and nobody is warned."""
    own: list[int] = []
    others: list[int] = []
    told: list[str] = []
    original, read = Reversible.loss, base_model.hidden_states
    monkeypatch.setattr(Reversible, "loss", lambda self, *args: own.append(1) or original(self, *args))
    monkeypatch.setattr(
        base_model, "hidden_states", lambda *args, **more: others.append(1) or read(*args, **more)
    )
    monkeypatch.setattr(logging.get_logger("rwkv_rev.modeling"), "warning_once", told.append)
    sft(trainer, model, tokenizer, tmp_path, max_steps=1)
    assert (bool(own), bool(others)) == (trainer is OwnLossTrainer, trainer is SFTTrainer)
    assert not told


def test_lora(tokenizer: PreTrainedTokenizerBase, shallow: dict[str, Path], tmp_path: Path) -> None:
    """A peft_config, with a head that is saved: the sweeps train as the whole graph does."""
    found = []
    for strategy in ("reversible", "full"):
        fresh = RwkvRevForCausalLM.from_pretrained(shallow["5.2"], dtype=torch.float32)
        fresh.set_bptt(strategy, chunk_length=CHUNK)
        config = LoraConfig(r=4, target_modules=["key", "value"], modules_to_save=["head"])
        made, steps = sft(SFTTrainer, fresh, tokenizer, tmp_path, peft_config=config, max_steps=2)
        found.append((losses(made), steps))
    (chunked, steps), (whole, wanted) = found
    assert any("head" in name for name in steps[0]) and any("lora_B" in name for name in steps[0])
    assert chunked == pytest.approx(whole, rel=1e-5)
    for mine, other in zip(steps, wanted, strict=True):
        assert max(relative_errors(mine, other).values()) <= AGREE


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
            "an RWKV model's past is its state",
        ),
        (LoraConfig(target_modules=["head"]), "adapter to `lm_head` is not supported"),
    ],
    ids=["prefix", "head"],
)
def test_peft_methods_that_are_refused(
    config: Any, message: str, model: RwkvRevForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        sft(SFTTrainer, model, tokenizer, tmp_path, peft_config=config)


def test_noise_in_embeddings(
    model: RwkvRevForCausalLM, tokenizer: PreTrainedTokenizerBase, shallow: dict[str, Path], tmp_path: Path
) -> None:
    """NEFTune: both sweeps draw the same, so the bits are those of ``checkpoint``."""
    other = RwkvRevForCausalLM.from_pretrained(shallow["5.2"], dtype=torch.float32)
    other.set_bptt("checkpoint", chunk_length=CHUNK)
    options = {"neftune_noise_alpha": 5.0, "max_steps": 1}
    ids = columns("text", tokenizer)[1]
    made, steps = sft(SFTTrainer, model, tokenizer, tmp_path, **options)
    _, wanted = sft(SFTTrainer, other, tokenizer, tmp_path, **options)
    assert all(torch.equal(steps[0][name], gradient) for name, gradient in wanted[0].items())
    assert losses(made)[0] > 1.2 * loop(shallow["5.2"], ids, ids)[0][0], "noise is drawn"


@TRAINERS
def test_default_precision(
    trainer: type[SFTTrainer],
    model: RwkvRevForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    shallow: dict[str, Path],
    tmp_path: Path,
) -> None:
    """bfloat16 by autocast, as trl has it by default, also without a GPU."""
    ids = columns("text", tokenizer)[1]
    made, steps = sft(trainer, model, tokenizer, tmp_path, bf16=None, max_steps=1)
    assert made.args.bf16
    expected, wanted = loop(shallow["5.2"], ids, ids, dtype=torch.bfloat16)
    assert losses(made) == pytest.approx(expected[:1], rel=2e-3)
    for name, gradient in wanted[0].items():
        assert relative_error(steps[0][name], gradient) < 0.05, name


def test_a_model_by_its_path(
    tokenizer: PreTrainedTokenizerBase, shallow: dict[str, Path], tmp_path: Path
) -> None:
    made, steps = sft(SFTTrainer, str(shallow["5.2"]), tokenizer, tmp_path, max_steps=1)
    assert isinstance(made.model, RwkvRevForCausalLM)
    ids = columns("text", tokenizer)[1]
    assert_same_steps(steps, loop(shallow["5.2"], ids, ids)[1])


# --- preferences ------------------------------------------------------------------------------------------------


def preference(beta: float, reference: RwkvRevForCausalLM, ids: Tensor, mask: Tensor) -> Loss:
    """DPO (Rafailov et al. 2023, equation 7) for rows of which the first half is preferred to the second."""

    def log_p(logits: Tensor, labels: Tensor) -> Tensor:
        terms = F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
        return -terms.sum(1)

    with torch.no_grad():
        before = reference(ids, attention_mask=mask).logits

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        chosen, rejected = (log_p(logits, labels) - log_p(before, labels)).chunk(2)
        return -F.logsigmoid(beta * (chosen - rejected)).mean()

    return loss


def test_dpo_of_conversations(model: RwkvRevForCausalLM, shallow: dict[str, Path], tmp_path: Path) -> None:
    """Pairs of turns by the tokenizer's own template: the tokens that docs/data.md shows, and one step."""
    tokenizer = AutoTokenizer.from_pretrained(shallow["5.2"])
    rows = [
        {
            "prompt": [{"role": "user", "content": "2+2?"}],
            "chosen": [{"role": "assistant", "content": "4."}],
            "rejected": [{"role": "assistant", "content": "5."}],
        }
    ]
    made = DPOTrainer(
        model=model,
        args=DPOConfig(**settings(tmp_path, per_device_train_batch_size=1, max_steps=1)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    made.train()
    row = made.train_dataset[0]
    assert bytes(row["prompt_ids"]) == b"User: 2+2?\n\nAssistant:"
    assert bytes(row["chosen_ids"]).removesuffix(b"\0") == b" 4.\n\n"
    assert losses(made) == pytest.approx([math.log(2)], rel=1e-5)


def test_dpo(
    model: RwkvRevForCausalLM, tokenizer: PreTrainedTokenizerBase, shallow: dict[str, Path], tmp_path: Path
) -> None:
    """Losses and gradients of some steps; the reference is loaded by its path, as trl does."""
    chosen, rejected = texts()[:2], texts()[2:]
    rows = [
        {"prompt": yes[:40], "chosen": yes[40:], "rejected": no[40:]}
        for yes, no in zip(chosen, rejected, strict=True)
    ]
    seen = Gradients()
    made = DPOTrainer(
        model=model,
        args=DPOConfig(**settings(tmp_path, per_device_train_batch_size=2, beta=0.1)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[seen],
    )
    made.train()
    prompts = [row["prompt"].encode() for row in rows] * 2
    answers = [row[key].encode() + b"\0" for key in ("chosen", "rejected") for row in rows]
    ids = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    labels = [[-100] * len(prompt) + [*answer] for prompt, answer in zip(prompts, answers, strict=True)]
    reference = RwkvRevForCausalLM.from_pretrained(shallow["5.2"], dtype=torch.float64)
    mask = padded([[1] * len(row) for row in ids], 0)
    expected, wanted = loop(shallow["5.2"], ids, labels, preference(0.1, reference, padded(ids, 0), mask))
    assert losses(made) == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0]
    assert_same_steps(seen.steps, wanted)
