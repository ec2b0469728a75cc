"""Small token stores for tests, without text or cache."""

from pathlib import Path

import numpy as np

from rwkv_rev.training.token_store import DOCUMENT, TokenPart, TokenStore


def make_store(
    folder: Path, lengths: list[int], prompts: list[int] | None = None, end_token: int | None = None
) -> TokenStore:
    """Documents whose token ids count up from 1 over the whole store, so that every token is unique."""
    table = np.zeros(len(lengths), DOCUMENT)
    table["length"] = lengths
    table["start"] = np.cumsum([0, *lengths[:-1]])
    table["prompt"] = prompts if prompts is not None else 0
    table["line"] = np.arange(len(lengths)) + 1
    table.tofile(folder / "documents.bin")
    np.arange(1, sum(lengths) + 1, dtype="<u4").tofile(folder / "tokens.bin")
    part = TokenPart(
        folder / "tokens.bin", np.dtype("<u4"), ("d.jsonl",), ("line",), table_path=folder / "documents.bin"
    )
    return TokenStore([part], fingerprint=f"{lengths}{prompts}", end_token=end_token, max_token=sum(lengths))
