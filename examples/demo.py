"""Convert the bundled checkpoints, prove that nothing changed, fine-tune RWKV-7, and take it elsewhere.

    python examples/demo.py OUTPUT_FOLDER

Runs the commands a user would type, and shows each before it runs. Works offline: the text to learn is the
language reference that every Python carries (``pydoc_data.topics``).
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from rwkv_rev.equivalence.text import default_text

SHORT = ("--context", "512", "--chunk", "96")
MODELS = {
    "rwkv-4": ("The function returns ", SHORT),
    "rwkv-5.2": ("To install the package, ", SHORT),
    "rwkv-6": ("The parser reads ", SHORT),
    "rwkv-7": ("To build the documentation, ", ()),
}
"""Of each a prompt, and how much of a text ``verify`` runs back: all that it would unasked, or little."""
TUNED = "rwkv-7"
LEARNED_PROMPT = "A class definition "
CONTEXT, STEPS = 16_384, 10
HELD_OUT = 32_768  # characters at the end of the text


def run(*arguments: str) -> None:
    """Show and run one command; a failing one ends the demo with its exit code."""
    print(f"\n$ rwkv-rev {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "rwkv_rev.cli", *arguments])
    if done.returncode:
        raise SystemExit(done.returncode)


def write(model: str, prompt: str) -> None:
    run("generate", model, "--prompt", prompt, "--max-new-tokens", "160", "--seed", "1")


def convert_and_verify(folder: Path) -> None:
    for name, (prompt, how_much) in MODELS.items():
        model = str(folder / name)
        run("inspect", f"bundled:{name}")
        run("convert", f"bundled:{name}", "--output", model, "--force")
        run("verify", model, *how_much)
        write(model, prompt)
    print(f"\n{len(MODELS)} models are in {folder}/, verified against their originals.")


def finetune(folder: Path) -> str:
    """Fine-tune the RWKV-7 at a context 32 times as long as the one it was trained at."""
    text = default_text()
    train, held_out = folder / "topics.txt", folder / "topics-held-out.txt"
    train.write_text(text[:-HELD_OUT], "utf-8")
    held_out.write_text(text[-HELD_OUT:], "utf-8")
    before, after = str(folder / TUNED), str(folder / f"{TUNED}-topics")
    print(f"\nBefore: what the model makes of Python's language reference, {len(text):,} characters of it.")
    write(before, LEARNED_PROMPT)
    run(
        *("finetune", before, "--data", str(train), "--eval-data", str(held_out), "--output", after),
        *("--context-length", str(CONTEXT), "--max-steps", str(STEPS), "--lr", "1e-4", "--warmup", "2"),
        *("--eval-every", "5", "--tune", "full"),
        *("--cache-dir", str(folder / "cache"), "--force"),
    )
    rows = [json.loads(line) for line in Path(after, "training", "log.jsonl").read_text("utf-8").splitlines()]
    print("\n step   held-out bits/byte")
    for row in rows:
        if "eval_loss" in row:
            print(f"{row['step']:5d} {row['eval_bits_per_byte']:20.4f}")
    print("\n step   loss   tokens/s   tape MB   memory MB")
    for row in [row for row in rows if "loss" in row][1::2]:
        tape, memory = row["tape_bytes"] / 1e6, row["memory_bytes"] / 1e6
        print(
            f"{row['step']:5d} {row['loss']:6.3f} {row['tokens_per_second']:10,.0f} {tape:9.2f} {memory:11.1f}"
        )
    print("\nAfter:")
    write(after, LEARNED_PROMPT)
    return after


def take_elsewhere(folder: Path, model: str) -> None:
    """Into the file that the rwkv package loads, and compare what that computes."""
    file = folder / f"{TUNED}-topics.pth"
    run("export", model, "--output", str(file), "--force")
    run("verify", model, "--original", str(file), "--oracle", "rwkv", "--no-reversal", "--no-gradients")
    print(f"\nThe rwkv package computes from {file} what the fine-tuned model computes.")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out")
    convert_and_verify(folder)
    take_elsewhere(folder, finetune(folder))


if __name__ == "__main__":
    main()
