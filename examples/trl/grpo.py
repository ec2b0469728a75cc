"""Learning from a reward that a program computes, by trl's GRPOTrainer: answers made of vowels.

    python examples/trl/grpo.py [--device cuda] [--model bundled:rwkv-7] ...

The prompt is a passage of text, longer than a chunk, and the reward of an answer is the share of vowels among its
characters. Answers are sampled with the state carried, each token read once; the gradient goes back through answer and
prompt. The reward is measured before and after on passages that were not trained on, with the same draws.
"""

import argparse
import tempfile
from typing import Any

import torch
from datasets import Dataset
from shared import loaded, options, passages, settings, write
from trl import GRPOConfig, GRPOTrainer

HELD_OUT = 32


def vowels(completions: list[str], **_: Any) -> list[float]:
    """The share of vowels in each."""
    return [sum(letter in "aeiouAEIOU" for letter in text) / max(1, len(text)) for text in completions]


def trainer(model: Any, tokenizer: Any, prompts: list[str], output: str, **own: Any) -> GRPOTrainer:
    return GRPOTrainer(
        model=model,
        args=GRPOConfig(**settings(model, output, **own)),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        reward_funcs=vowels,
    )


@torch.no_grad()
def measure(model: Any, tokenizer: Any, prompts: list[str], length: int) -> tuple[float, str]:
    """The mean reward of one answer for each prompt, and the first of them."""
    model.eval()
    torch.manual_seed(0)
    ids = tokenizer(prompts, return_tensors="pt").input_ids.to(model.device)
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=True, top_k=0
    )
    answers = tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)
    model.train()
    rewards = vowels(answers)
    return sum(rewards) / len(rewards), answers[0]


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    prompts = passages(512, chosen.prompt_length)
    with loaded(chosen) as (model, tokenizer), tempfile.TemporaryDirectory() as output:
        reward, answer = measure(model, tokenizer, prompts[:HELD_OUT], chosen.answer_length)
        found: dict[str, Any] = {"before": {"held_out_reward": reward, "answer": answer}}
        made = trainer(
            model,
            tokenizer,
            prompts[HELD_OUT:],
            output,
            num_generations=8,
            per_device_train_batch_size=16,
            max_completion_length=chosen.answer_length,
            max_steps=chosen.steps,
            learning_rate=1e-3,
            seed=chosen.seed,
        )
        made.train()
        reward, answer = measure(model, tokenizer, prompts[:HELD_OUT], chosen.answer_length)
        found["after"] = {"held_out_reward": reward, "answer": answer}
        curve = [row["reward"] for row in made.state.log_history if "reward" in row]
    return found | {"training_reward": curve, "steps": chosen.steps}


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = options(__doc__ or "", steps=16, chunk_length=64)
    parser.add_argument("--prompt-length", type=int, default=128, help="tokens")
    parser.add_argument("--answer-length", type=int, default=32, help="tokens")
    chosen = parser.parse_args(given)
    found = run(chosen)
    write(chosen, "grpo", found)
    return found


if __name__ == "__main__":
    main()
