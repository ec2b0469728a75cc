"""Supervised fine-tuning by trl's SFTTrainer: packed conversations, loss on the assistant's words.

    python examples/trl/sft.py [--device cuda] [--model bundled:rwkv-7] ...

    User: Is 4182 small or large?        Assistant: small

Conversations are packed into rows of ``--context-length`` tokens, the state starts anew at every border, and the rows
are longer than a chunk. What is held out are other numbers: the loss (nats) per token that the assistant says, and the
share of answers that are right, each the likeliest token after the other.
"""

import argparse
import random
import tempfile
from typing import Any

import torch
from datasets import Dataset
from shared import END_OF_TURN, loaded, options, settings, write
from trl import SFTConfig, SFTTrainer

HELD_OUT = 100


def conversation(number: int) -> list[dict[str, str]]:
    """Both answers are as long: trl packs by length, and rows of one answer alone would teach it alone."""
    answer = "small" if number < 5000 else "large"
    return [
        {"role": "user", "content": f"Is {number} small or large?"},
        {"role": "assistant", "content": answer},
    ]


def trainer(model: Any, tokenizer: Any, rows: list[dict[str, Any]], output: str, **own: Any) -> SFTTrainer:
    return SFTTrainer(
        model=model,
        args=SFTConfig(**settings(model, output, **own)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


@torch.no_grad()
def measure(model: Any, tokenizer: Any, numbers: list[int]) -> dict[str, float]:
    """On numbers that were not trained on."""
    model.eval()
    right, nats, tokens = 0, 0.0, 0
    for number in numbers:
        turns = conversation(number)
        prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
        answer = tokenizer.encode(f" {turns[1]['content']}{END_OF_TURN}")
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        log_p = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        said = ids[0, len(prompt) :]
        nats -= float(log_p.gather(1, said[:, None]).sum())
        right += bool((log_p.argmax(-1) == said).all())
        tokens += len(answer)
    model.train()
    return {"held_out_loss": nats / tokens, "right_answers": right / len(numbers)}


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    numbers = random.Random(chosen.seed).sample(range(1000, 9000), chosen.conversations + HELD_OUT)
    rows = [{"messages": conversation(number)} for number in numbers[HELD_OUT:]]
    with loaded(chosen) as (model, tokenizer), tempfile.TemporaryDirectory() as output:
        found: dict[str, Any] = {"before": measure(model, tokenizer, numbers[:HELD_OUT])}
        made = trainer(
            model,
            tokenizer,
            rows,
            output,
            packing=True,
            max_length=chosen.context_length,
            assistant_only_loss=True,
            per_device_train_batch_size=1,
            max_steps=chosen.steps,
            learning_rate=2e-3,
            seed=chosen.seed,
        )
        made.train()
        found["after"] = measure(model, tokenizer, numbers[:HELD_OUT])
        curve = [row["loss"] for row in made.state.log_history if "loss" in row]
    return found | {"training_loss": {"first": curve[0], "last": curve[-1]}, "steps": chosen.steps}


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = options(__doc__ or "", steps=60, chunk_length=128)
    parser.add_argument("--context-length", type=int, default=512, metavar="T", help="tokens of a packed row")
    parser.add_argument("--conversations", type=int, default=700)
    chosen = parser.parse_args(given)
    found = run(chosen)
    write(chosen, "sft", found)
    return found


if __name__ == "__main__":
    main()
