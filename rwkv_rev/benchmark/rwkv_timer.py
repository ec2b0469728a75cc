"""Run by file name in a process of its own: seconds of the ``rwkv`` package's sequence mode, whenever asked.

    python -P rwkv_timer.py MODEL TOKENS THREADS

MODEL is a path without ``.pth``, TOKENS how many random tokens. For every line on standard input one forward pass
over all of them with all logits, and one line ``seconds NUMBER NUMBER`` on standard output, by the clock and of
processor time. Not imported by anything: see :mod:`rwkv_rev.equivalence.rwkv_worker` for why.
"""

import os
import sys
import time

import torch


def main(model_path: str, tokens: int, threads: int) -> None:
    """Answer until standard input ends."""
    from rwkv.model import RWKV

    torch.set_num_threads(threads)
    goose = os.environ.get("RWKV_V7_ON") == "1"  # RWKV-7's class takes no ``verbose``
    model = RWKV(model=model_path, strategy="cpu fp32", **({} if goose else {"verbose": False}))
    generator = torch.Generator().manual_seed(0)
    vocabulary = (model.z if goose else model.w)["emb.weight"].shape[0]
    ids = torch.randint(vocabulary, (tokens,), generator=generator).tolist()
    for _ in sys.stdin:
        start, used = time.perf_counter(), time.process_time()
        model.forward(ids, None, full_output=True)
        print("seconds", time.perf_counter() - start, time.process_time() - used, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
