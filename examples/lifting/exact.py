"""Whether RWKV-7 is reversed to the bit, by chunk length and precision: a row of a table for each.

    python examples/lifting/exact.py bundled:rwkv-7 --text book.txt

Each row: the states that came back, of all boundaries and layers, and whether all bits are those of the first sweep;
whether each gradient of ``reversible`` has the bits of ``checkpoint``'s; the bits per number above the entropy, of the
layer with the most; and the farthest that a state was from the same recurrence in float64, relative to its norm, lifted
and in float32. Chunks are run one by one however short they are, and the last is cut short.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rwkv_rev
from rwkv_rev import base_model
from rwkv_rev.cells.time_mix_rwkv7 import TimeMixRwkv7, TimeProjection
from rwkv_rev.equivalence.reversal import check_reversal
from rwkv_rev.equivalence.text import encode_text, read_text
from rwkv_rev.errors import ConfigError, RwkvRevError
from rwkv_rev.loading import load_model, without_bars
from rwkv_rev.wkv import wkv7


class Errors:
    """The farthest that each layer's state was from float64, lifted and in float32."""

    def __init__(self) -> None:
        self.of: dict[int, Tensor] = {}
        self._states: dict[int, tuple[Tensor, Tensor]] = {}

    def look(self, layer: int, projection: TimeProjection, after: Any) -> None:
        given = projection[:6]
        exact, single = self._states.get(layer, (None, None))
        if exact is None or single is None:
            single = torch.zeros_like(after.value())
            exact = single.double()
        exact = wkv7(*[x.double() for x in given], exact)[1]
        single = wkv7(*given, single)[1]
        self._states[layer] = exact, single
        off = (
            torch.stack([after.value(torch.float64) - exact, single - exact]).flatten(1).norm(dim=1)
            / exact.norm()
        )
        self.of[layer] = torch.maximum(self.of.get(layer, torch.zeros_like(off)), off)


@contextmanager
def watched(errors: Errors) -> Iterator[None]:
    """Let ``errors`` see every state of a first sweep."""
    advance = TimeMixRwkv7.advance_memory

    def looked(cell: Any, memory: Any, projection: TimeProjection, *more: Any) -> Any:
        after, remnant = advance(cell, memory, projection, *more)
        errors.look(cell.layer, projection, after)
        return after, remnant

    TimeMixRwkv7.advance_memory = looked  # type: ignore[method-assign]
    try:
        yield
    finally:
        TimeMixRwkv7.advance_memory = advance  # type: ignore[method-assign]


def gradients(model: Any, ids: Tensor, strategy: str, chunk: int) -> tuple[dict[str, Tensor], int]:
    """Of the loss over ``ids`` [B, T], by name; and the bytes of the tape."""
    model.zero_grad(set_to_none=True)
    with model.set_bptt(strategy, chunk_length=chunk, remnants="lifted"):
        out = model(ids, labels=ids)
    out.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": out.loss.detach()}, out.report["tape_bytes"]


def row(model: Any, ids: Tensor, chunk: int, half: bool) -> tuple[str, bool]:
    """A row of the table, and whether all of it holds."""
    began, errors = time.process_time(), Errors()
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=half):
        with watched(errors):
            found = check_reversal(model.eval(), ids, chunk=chunk)
        model.train()
        (back, tape), (there, whole) = (
            gradients(model, ids[None], s, chunk) for s in ("reversible", "checkpoint")
        )
    same = (
        sum(torch.equal(value, there[name]) for name, value in back.items())
        if back.keys() == there.keys()
        else 0
    )
    above = max((layer.remnants - (layer.theory or 0)) / (layer.whole / 32) for layer in found.layers)
    lifted, single = torch.stack(list(errors.of.values())).amax(0).tolist()
    states = found.boundaries * len(found.layers)
    text = (
        f"| {chunk:,} | {'bfloat16 autocast' if half else 'float32'} | {states:,} {'yes' if found.passed else 'NO'} "
        f"| {same} of {len(there)} | {above:+.2f} | {lifted:.1e} | {single:.1e} | {100 * tape / whole:.0f} % "
        f"| {time.process_time() - began:.0f} |"
    )
    return text, found.passed and same == len(there) and above <= 1.2 and lifted <= single


def main(given: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096 + 5)
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 64, 256, 512])
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as folder:
        place = rwkv_rev.convert(asked.source, Path(folder) / "model").directory
        with without_bars():
            model: Any = load_model(place, asked.device, torch.float32)
        ids = encode_text(
            read_text(asked.text), place, vocabulary=model.config.vocab_size, tokens=asked.tokens
        )
    if model.config.rwkv_version != "7":
        raise ConfigError(f"{asked.source} is {model.config.architecture.called}, and RWKV-7 alone is lifted")
    longest = max(asked.chunks)
    if min(asked.chunks) < 1:
        raise ConfigError("--chunks: of 1 token at least")
    if len(ids) <= 2 * longest:  # of the first and the last chunk the tape has nothing
        raise ConfigError(
            f"{len(ids):,} tokens: chunks of {longest:,} need {2 * longest + 1:,} or more (--chunks)"
        )
    base_model.tokens_at_once = lambda config, weights, rows, length, chunk: chunk  # else 16 are run as 64
    print(f"{asked.source}, {len(ids):,} tokens on {asked.device}, torch {torch.__version__}")
    print("| C | precision | states | gradients | above entropy | error, lifted | float32 | tape | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    held = True
    for chunk in asked.chunks:
        for half in (False, True):
            text, holds = row(model, ids.to(asked.device), chunk, half)
            print(text if holds else f"{text} does not hold", flush=True)
            held &= holds
    sys.exit(0 if held else "not every row holds")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RwkvRevError as error:
        sys.exit(f"error: {error}")
