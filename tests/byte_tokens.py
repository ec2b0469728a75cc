"""A tokenizer of bytes for tests. Of this package it imports what tokenises: fresh processes do no more than that."""

import os
import time
from pathlib import Path

from rwkv_rev.training import tokenise


class Bytes:
    """Ids are UTF-8 bytes plus ``shift``. Fails on U+FFFF; counts its calls in a file, over all processes."""

    def __init__(
        self, shift: int = 0, eos_token_id: int | None = 0, log: Path | None = None, nap: float = 0
    ) -> None:
        self.shift, self.eos_token_id, self.log, self.nap = shift, eos_token_id, log, nap

    def encode(self, text: str) -> list[int]:
        if "\uffff" in text:
            raise ValueError("not a\ncharacter")
        if self.log is not None and text != tokenise.PROBE:
            with self.log.open("a") as file:
                file.write(f"{os.getpid()} {len(text)}\n")
            time.sleep(self.nap)
        return [byte + self.shift for byte in text.encode()]

    def get_vocab(self) -> dict[str, int]:
        return {f"{byte:02x}": byte + self.shift for byte in range(256)}
