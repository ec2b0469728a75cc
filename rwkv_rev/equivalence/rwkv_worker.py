"""Run by file name in a process of its own: logits of the ``rwkv`` package, written to files.

    python -P rwkv_worker.py WIDE

Each line of the standard input is a JSON object: ``model`` (a path without ``.pth``), ``tokens``, ``piece``,
``threads``, and ``output``, a file that receives ``[T, V]`` without a header: float32, or float64 computed in float64
where WIDE is 1. Each gets a line in answer: empty, or what went wrong. The process ends with its input.

Not imported by anything: the package reads the environment while it is imported, prints, and changes global
torch settings (TF32, cuDNN), so it never shares a process with us. Its import name, ``rwkv``, is why it
runs with ``-P``. Where ``RWKV_V7_ON`` is set it has RWKV-7's class, which takes no ``verbose`` and reads no
``time_state``.
"""

import copy
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch


class WideTorch:
    """``torch``, but what asks for float32 gets float64."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def compute(model: str, tokens: list[int], output: str, piece: int, threads: int) -> None:
    """Feed the tokens in pieces of ``piece``, carrying the state; write their logits to the output."""
    import rwkv.model

    torch.set_num_threads(threads)
    if os.environ.get("RWKV_V7_ON") == "1":
        package = rwkv.model.RWKV(model=model, strategy="cpu fp32")
        state = package.generate_zero_state()
        for layer in range(package.n_layer):
            if (tuned := package.z.get(f"blocks.{layer}.att.time_state")) is not None:
                state[3 * layer + 1] = tuned.float()  # the value index first, as in the package
    else:
        package, state = rwkv.model.RWKV(model=model, strategy="cpu fp32", verbose=False), None
    with Path(output).open("wb") as stream:
        for start in range(0, len(tokens), piece):
            # forward() overwrites the entries of the list it is given: hand it a copy.
            logits, state = package.forward(
                tokens[start : start + piece], copy.deepcopy(state), full_output=True
            )
            # One token takes another path, which returns [V].
            stream.write(logits.float().reshape(-1, logits.shape[-1]).contiguous().numpy().tobytes())


def main(wide: bool) -> None:
    """Answer every line of the standard input."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the package prints
    import rwkv.model

    if wide:
        rwkv.model.torch = WideTorch()
        torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    for line in sys.stdin:
        said = ""
        try:
            compute(**json.loads(line))
        except Exception as error:
            said = traceback.format_exception_only(error)[-1].strip().splitlines()[-1]
        answers.write(f"{said}\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1] == "1")
