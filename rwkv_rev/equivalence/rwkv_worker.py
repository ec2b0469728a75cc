"""Run by file name in a process of its own: logits of the ``rwkv`` package, written to a file.

    python -P rwkv_worker.py MODEL TOKENS OUTPUT PIECE THREADS WIDE

MODEL is a path without ``.pth``, TOKENS a JSON list, OUTPUT receives ``[T, V]`` without a header: float32, or
float64 computed in float64 where WIDE is 1.
Not imported by anything: the package reads the environment while it is imported, prints, and changes global
torch settings (TF32, cuDNN), so it never shares a process with us. Its import name, ``rwkv``, is why it
runs with ``-P``.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch


class WideTorch:
    """``torch``, but what asks for float32 gets float64."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def main(model_path: str, tokens_path: str, output_path: str, piece: int, threads: int, wide: bool) -> None:
    """Feed the tokens in pieces of ``piece``, carrying the state; append their logits to the output."""
    import rwkv.model

    if wide:
        rwkv.model.torch = WideTorch()
        torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    torch.set_num_threads(threads)
    model = rwkv.model.RWKV(model=model_path, strategy="cpu fp32", verbose=False)
    tokens = json.loads(Path(tokens_path).read_text())
    state = None
    with Path(output_path).open("wb") as output:
        for start in range(0, len(tokens), piece):
            # forward() overwrites the entries of the list it is given: hand it a copy.
            logits, state = model.forward(
                tokens[start : start + piece], copy.deepcopy(state), full_output=True
            )
            # One token takes another path, which returns [V].
            output.write(logits.float().reshape(-1, logits.shape[-1]).contiguous().numpy().tobytes())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6] == "1")
