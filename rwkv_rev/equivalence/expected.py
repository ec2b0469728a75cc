"""Logits that somebody else wrote down: ``NAME.expected.json`` beside ``NAME.pth`` is one more oracle.

The file holds ``prompt_bytes`` (token ids to feed) and ``logits_after_last_byte`` (the V logits after the
last of them). It is the only oracle that knows nothing of any eps: it says what the model's makers saw.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rwkv_rev.errors import CheckpointError, DataError
from rwkv_rev.folders.safe_input import read_object
from rwkv_rev.printable import shortened


@dataclass(frozen=True)
class ExpectedLogits:
    """Token ids ``[T]`` and the logits ``[V]`` (float64) that should follow the last; the name of their file."""

    name: str
    prompt: Tensor
    logits: Tensor


def expected_path(checkpoint: Path) -> Path | None:
    """The file of expected logits that belongs to a checkpoint file, if it exists."""
    candidate = checkpoint.with_name(f"{checkpoint.stem}.expected.json")
    return candidate if candidate.is_file() else None


def read_expected(path: Path, vocabulary: int) -> ExpectedLogits:
    """Read such a file.

    Raises:
        DataError: it is not JSON of this shape, or made for another vocabulary.
    """
    try:
        content = read_object(path)
        prompt = torch.tensor(content["prompt_bytes"], dtype=torch.long)
        logits = torch.tensor(content["logits_after_last_byte"], dtype=torch.float64)
    except (CheckpointError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise DataError(
            f"{path} does not hold prompt_bytes and logits_after_last_byte ({shortened(error)})"
        ) from None
    if prompt.ndim != 1 or not len(prompt) or prompt.min() < 0 or prompt.max() >= vocabulary:
        raise DataError(f"{path}: prompt_bytes must be token ids below {vocabulary}, at least one")
    if logits.shape != (vocabulary,):
        raise DataError(f"{path} holds logits of shape {list(logits.shape)}, the model has {vocabulary}")
    return ExpectedLogits(path.name, prompt, logits)
