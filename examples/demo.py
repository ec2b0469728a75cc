"""Convert both bundled checkpoints, prove that nothing changed, and let them write.

    python examples/demo.py OUTPUT_FOLDER

Runs the commands a user would type, and shows each before it runs. Works offline.
"""

import shlex
import subprocess
import sys
from pathlib import Path

PROMPTS = {"rwkv-4": "The function returns ", "rwkv-5.2": "To install the package, "}


def run(*arguments: str) -> None:
    """Show and run one command; a failing one ends the demo with its exit code."""
    print(f"\n$ rwkv-rev {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "rwkv_rev.cli", *arguments])
    if done.returncode:
        raise SystemExit(done.returncode)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out")
    for name, prompt in PROMPTS.items():
        model = str(folder / name)
        run("inspect", f"bundled:{name}")
        run("convert", f"bundled:{name}", "--output", model, "--force")
        run("verify", model)
        run("generate", model, "--prompt", prompt, "--max-new-tokens", "160", "--seed", "1")
    print(f"\nBoth models are in {folder}/, verified against their originals.")


if __name__ == "__main__":
    main()
