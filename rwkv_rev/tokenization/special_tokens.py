"""Characters of a text that a tokenizer reads as one of its special tokens, which nobody can have said."""

from collections.abc import Mapping
from typing import Any

from rwkv_rev.errors import DataError
from rwkv_rev.printable import shortened


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The id of each special token by its characters; empty for a tokenizer that does not tell."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found = {str(token): index for index, token in added.items() if getattr(token, "special", False)}
    named = [text for text in getattr(tokenizer, "all_special_tokens", []) if text]
    found |= {text: tokenizer.convert_tokens_to_ids(text) for text in named}
    end = getattr(tokenizer, "eos_token", None)
    return found | ({end: tokenizer.eos_token_id} if isinstance(end, str) and end else {})


def refuse_special(text: str, known: Mapping[str, int], tokenizer: Any, name: str) -> None:
    """Raise DataError if ``text``, called ``name``, holds characters that are read as a ``known`` special token."""
    there = [token for token in known if token in text]
    if not there:
        return
    read = set(tokenizer(text, add_special_tokens=False)["input_ids"])
    for token in there:
        if known[token] in read:
            end = known[token] == getattr(tokenizer, "eos_token_id", None)
            raise DataError(
                f"{name} holds {shortened(repr(token))}, which this tokenizer reads as "
                f"{'the end of text' if end else 'a special token'}, token {known[token]}; take it out"
            )
