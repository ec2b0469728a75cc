"""Tokens per second of training on short documents: a row for each of them, or several packed into one.

    python -m rwkv_rev.benchmark.packed_rows --shape 5.2-0.1b --documents 100 --chunk-length 4096,8192

Documents have lengths drawn evenly from 50 to 2,000. A step is a loss, its gradient and an update by AdamW, and every
way sees every document once:

* ``alone``: a step for each document, in a row of its own, under ``full``: what is compared with;
* ``padded``: rows of one document each, with padding behind, as many as come next and fill a packed row's tokens;
* ``packed``: rows of documents by best fit, a row a step, under ``full`` and in chunks.

Tokens are those of documents, without padding. Printed is the second of two passes over all documents; a
way that does not fit into the device's memory has no rate.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rwkv_rev.benchmark.models import SHAPES, benchmark_model
from rwkv_rev.best_fit import best_fit
from rwkv_rev.json_text import json_text
from rwkv_rev.modeling import RwkvRevForCausalLM

SHORTEST, LONGEST = 50, 2000

Batch = dict[str, Tensor]


def alone(documents: Sequence[Tensor], room: int) -> Iterator[Batch]:
    """Each document in a row of its own, one at a time."""
    for ids in documents:
        yield {"input_ids": ids[None]}


def padded(documents: Sequence[Tensor], room: int) -> Iterator[Batch]:
    """Rows of one document each, as many as ``room`` tokens hold with the padding."""
    rows: list[Tensor] = []
    for ids in [*documents, None]:
        longest = max(map(len, [*rows, *([] if ids is None else [ids])]))
        if rows and (ids is None or longest * (len(rows) + 1) > room):
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            yield {
                "input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
                "attention_mask": mask,
            }
            rows = []
        rows += [] if ids is None else [ids]


def packed(documents: Sequence[Tensor], room: int) -> Iterator[Batch]:
    """Rows of ``room`` tokens, by best fit, with padding at the end."""
    lengths = np.array([len(ids) for ids in documents])
    order, starts = best_fit(lengths, room, np.arange(len(documents)))
    for start, stop in pairwise(starts.tolist()):
        row = [documents[each] for each in order[start:stop]]
        ids = torch.cat(row)
        places = torch.tensor([0, *np.cumsum([len(each) for each in row])[:-1].tolist()])
        at = torch.zeros(room, dtype=torch.bool)
        at[places] = True
        yield {
            "input_ids": torch.nn.functional.pad(ids, (0, room - len(ids)))[None],
            "attention_mask": (torch.arange(room) < len(ids)).long()[None],
            "borders": at[None],
        }


def measure(
    model: RwkvRevForCausalLM, batches: Sequence[Batch], device: torch.device, tokens: int
) -> dict[str, Any]:
    """A row: seconds of the second pass over all batches, and what follows from it."""
    cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    seconds = 0.0
    for _ in range(2):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        for batch in batches:
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            ids = on_device["input_ids"]
            mask = on_device.get("attention_mask")
            labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
            model(**on_device, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    read = sum(batch["input_ids"].numel() for batch in batches)
    return {
        "steps": len(batches),
        "seconds": round(seconds, 3),
        "padding": round(1 - tokens / read, 3),
        "tokens_per_second": round(tokens / seconds),
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row of JSON for each way; ``arguments`` are the command line's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="5.2-0.1b")
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--row-length", type=int, default=16384)
    parser.add_argument("--chunk-length", default="4096,8192", help="tokens per chunk, comma-separated")
    parser.add_argument("--strategy", choices=("reversible", "checkpoint"), default="reversible")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    model = benchmark_model(args.shape, device, torch.bfloat16 if args.device == "cuda" else torch.float32)
    lengths = np.random.default_rng(0).integers(SHORTEST, LONGEST + 1, args.documents)
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(model.config.vocab_size, (length,), generator=generator) for length in lengths]
    tokens = int(lengths.sum())
    ways: list[tuple[Any, str, int | None]] = [(alone, "full", None), (padded, "full", None)]
    ways.append((packed, "full", None))
    ways += [(packed, args.strategy, int(chunk)) for chunk in args.chunk_length.split(",")]
    first = None
    for way, strategy, chunk in ways:
        model.set_bptt(strategy, chunk_length=chunk)
        told = {"shape": args.shape, "way": way.__name__, "strategy": strategy, "chunk_length": chunk}
        try:
            row = measure(model, list(way(documents, args.row_length)), device, tokens)
        except torch.cuda.OutOfMemoryError:
            model.zero_grad()
            row = {"tokens_per_second": None}
        rate = row["tokens_per_second"]
        first = first or rate
        to_alone = rate and first and round(rate / first, 2)
        print(json_text(told | row | {"to_alone": to_alone}), flush=True)


if __name__ == "__main__":
    main()
