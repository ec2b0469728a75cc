"""Counting what blocks read while a model generates, and what re-reading everything would give.

Tests import it as ``from generation_cases import reading``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bptt_cases import tiny_model
from torch import Tensor

from rwkv_rev import RwkvRevForCausalLM, position_wise
from rwkv_rev.cache import CACHE_NAME, RwkvRevCache
from rwkv_rev.cells.block import Block

LENGTH, NEW = 11, 5
EACH_ONCE = [LENGTH] + [1] * (NEW - 1)
"""Tokens that a block sees, call by call, when each is read once."""
GREEDY = {"do_sample": False, "eos_token_id": None}


def evaluated(version: str = "5.2", **config: Any) -> RwkvRevForCausalLM:
    return tiny_model(version, dtype=torch.float64, **config).eval()


@contextmanager
def reading(model: RwkvRevForCausalLM) -> Iterator[list[int]]:
    """How many tokens block 0 of ``model`` is given, call by call."""
    lengths: list[int] = []
    inner = Block.forward

    def counted(self: Block, x: Tensor, *arguments: Any) -> Any:
        if self is model.model.blocks[0]:
            lengths.append(x.shape[1])
        return inner(self, x, *arguments)

    Block.forward = position_wise(counted)
    try:
        yield lengths
    finally:
        Block.forward = inner


def recomputed(model: RwkvRevForCausalLM, prompt: Tensor, new: int, state: Any = None) -> list[int]:
    """Greedy continuation of one row, all of it read again for every token."""
    row = prompt
    for _ in range(new):
        with torch.no_grad():
            logits = model(row, state=state, use_cache=False).logits
            row = torch.cat([row, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return row[0, prompt.shape[1] :].tolist()


def returned_past(output: Any) -> RwkvRevCache:
    past = output[CACHE_NAME]
    assert isinstance(past, RwkvRevCache)
    return past
