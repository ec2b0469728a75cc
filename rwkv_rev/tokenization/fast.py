"""Our tokenizers as one ``tokenizer.json``, which the ``tokenizers`` library reads alone, with the same ids.

Greedy longest match is none of that library's models: BPE and Unigram choose otherwise, WordPiece takes time that grows
with the square of a word's length and more. A regular expression can do it. Text becomes bytes, one character each
(``ByteLevel``); the vocabulary is written as a trie, ``a(?:b(?:cd)?)?`` for ``a``, ``ab`` and ``abcd``, in which a
backtracking engine finds the longest entry first, since the branches of a node begin with different characters; each
match is a word (``Split``), and a table gives its id (``WordLevel``). Every byte is an entry, so nothing is left over.

Cost: the pattern of the world vocabulary has 280 kB and is compiled in 0.2 s; one to two MB of text a second, where the
trie of ``pyrwkv_tokenizer`` reads 60: our own class, which uses that one, is chosen wherever ``rwkv_rev`` is imported.

Limits: text only. Bytes that are no UTF-8 cannot be given to that library (our classes take them as lone surrogates).
Ids without a token decode to nothing.
"""

import functools
from collections.abc import Mapping
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from rwkv_rev.errors import OutputError

_SYNTAX = frozenset(r"^$\.*+?()[]{}|/")
_CLASS_SYNTAX = frozenset(r"\[]^-")


def fast_tokenizer(tokenizer: PreTrainedTokenizer) -> PreTrainedTokenizerFast:
    """The same tokenizer over the ``tokenizers`` library: ids, special and added tokens, chat template.

    Args:
        tokenizer: one that finds the longest entry at each byte, ``token_bytes`` those of each id.

    Raises:
        OutputError: for an added token whose id that library cannot give it.
    """
    named = {str(getattr(tokenizer, name)): getattr(tokenizer, f"{name}_id") for name in _special(tokenizer)}
    backend = _backend(tokenizer.vocab_size, tokenizer.token_bytes, named)
    for index, token in sorted(tokenizer.added_tokens_decoder.items()):
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(token.content) != index:
            raise OutputError(
                f"the added token {token.content!r} has id {index}, which tokenizer.json cannot say; "
                "add tokens that are not in the vocabulary, one after another"
            )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=list(tokenizer.model_input_names),
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        model_max_length=tokenizer.model_max_length,
        split_special_tokens=tokenizer.split_special_tokens,
        clean_up_tokenization_spaces=False,
        chat_template=tokenizer.chat_template,
        **{name: getattr(tokenizer, name) for name in _special(tokenizer)},
    )


def _special(tokenizer: PreTrainedTokenizer) -> list[str]:
    return [name for name in ("bos_token", "eos_token", "pad_token", "unk_token") if getattr(tokenizer, name)]


def _backend(vocab_size: int, token_bytes: Mapping[int, bytes], named: dict[str, int]) -> Tokenizer:
    characters = _byte_characters()
    normalizer: Any = normalizers.ByteLevel()
    if "\0" in named:  # byte 0 is a special token, which is looked up under its own name
        normalizer = normalizers.Sequence([normalizer, normalizers.Replace(characters[0], "\0")])
        characters[0] = "\0"
    vocabulary = {"".join(characters[byte] for byte in piece): index for index, piece in token_bytes.items()}
    pattern = greedy_pattern(tuple(vocabulary))
    vocabulary |= {name: index for name, index in named.items() if index < vocab_size}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    backend.normalizer = normalizer
    backend.pre_tokenizer = _split(pattern)
    backend.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_characters() -> list[str]:
    """The character that stands for each byte in the ``tokenizers`` library (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    free = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(free)) for byte in range(256)]


@functools.lru_cache(maxsize=1)
def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


@functools.lru_cache(maxsize=1)  # the world vocabulary's takes half a second
def greedy_pattern(entries: tuple[str, ...]) -> str:
    """A regular expression whose match is the longest of ``entries`` at that place."""
    trie: dict[str, Any] = {}
    for entry in entries:
        node = trie
        for character in entry:
            node = node.setdefault(character, {})
        node[""] = None  # an entry ends here
    return _pattern(trie)[0]


def _pattern(node: dict[str, Any]) -> tuple[str, int]:
    """What may follow at a node, and how many nodes lie below: the fullest branches are tried first."""
    alike: dict[str, list[str]] = {}  # characters followed by the same share a branch
    weights: dict[str, int] = {}
    for character, below in node.items():
        if character:
            rest, count = _pattern(below)
            alike.setdefault(rest, []).append(character)
            weights[rest] = weights.get(rest, 0) + count
    branches = [_one_of(alike[rest]) + rest for rest in sorted(alike, key=lambda rest: -weights[rest])]
    pattern = "|".join(branches)
    if len(branches) > 1 or (branches and "" in node):
        pattern = f"(?:{pattern})"
    if branches and "" in node:
        pattern += "?"
    return pattern, 1 + sum(weights.values())


def _one_of(characters: list[str]) -> str:
    if len(characters) == 1:
        return f"\\{characters[0]}" if characters[0] in _SYNTAX else characters[0]
    return "[" + "".join(f"\\{c}" if c in _CLASS_SYNTAX else c for c in sorted(characters)) + "]"
