"""Preferences by trl's DPOTrainer, with a LoRA: the text as it goes on, over the same words in another order.

    python examples/trl/dpo.py [--device cuda] [--model bundled:rwkv-7] ...

A prompt is a passage, longer than a chunk. What is preferred is how the text goes on; what is not is the same words
shuffled. The reference is the model without its LoRA, whose log-probabilities are computed once, beforehand. Held out
are other passages: the loss, the share of pairs in which the preferred answer has gained more, and by how much (nats
times beta).
"""

import argparse
import random
import tempfile
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from shared import loaded, options, passages, settings, write
from trl import DPOConfig, DPOTrainer

HELD_OUT = 32


def pairs(count: int, prompt_length: int, answer_length: int, seed: int) -> list[dict[str, str]]:
    draws = random.Random(seed)
    found = []
    for text in passages(count, prompt_length + answer_length):
        prompt, chosen = text[:prompt_length], text[prompt_length:]
        words = chosen.split(" ")
        found.append(
            {"prompt": prompt, "chosen": chosen, "rejected": " ".join(draws.sample(words, len(words)))}
        )
    return found


def trainer(
    model: Any, tokenizer: Any, rows: list[dict[str, str]], output: str, held_out: Any = None, **own: Any
) -> DPOTrainer:
    return DPOTrainer(
        model=model,
        args=DPOConfig(**settings(model, output, **own)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=held_out and Dataset.from_list(held_out),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16),  # of every linear map of the cells
    )


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    rows = pairs(HELD_OUT + 4 * chosen.steps, chosen.prompt_length, chosen.answer_length, chosen.seed)
    with loaded(chosen) as (model, tokenizer), tempfile.TemporaryDirectory() as output:
        made = trainer(
            model,
            tokenizer,
            rows[HELD_OUT:],
            output,
            rows[:HELD_OUT],
            precompute_ref_log_probs=True,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=8,
            max_steps=chosen.steps,
            learning_rate=2e-3,
            beta=0.1,
            seed=chosen.seed,
        )
        found: dict[str, Any] = {"before": measure(made)}
        made.train()
        found["after"] = measure(made)
        curve = [row["loss"] for row in made.state.log_history if "loss" in row]
    return found | {"training_loss": {"first": curve[0], "last": curve[-1]}, "steps": chosen.steps}


def measure(made: DPOTrainer) -> dict[str, float]:
    told = made.evaluate()
    return {
        "held_out_loss": told["eval_loss"],
        "preferred": told["eval_rewards/accuracies"],
        "margin": told["eval_rewards/margins"],
    }


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = options(__doc__ or "", steps=30, chunk_length=128)
    parser.add_argument("--prompt-length", type=int, default=192, help="tokens")
    parser.add_argument("--answer-length", type=int, default=64, help="tokens")
    chosen = parser.parse_args(given)
    found = run(chosen)
    write(chosen, "dpo", found)
    return found


if __name__ == "__main__":
    main()
