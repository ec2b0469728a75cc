"""Tokenizers whose tokens are byte strings: the common base, and the one whose ids *are* bytes.

Text becomes bytes first (UTF-8), bytes become ids, and back: ``decode(encode(text)) == text`` for every text,
because nothing is normalised, stripped or added on the way. A Python string may also hold what is not UTF-8,
as lone surrogates: U+DC80 to U+DCFF stand for the raw bytes 0x80 to 0xFF (``surrogateescape``, PEP 383) and
are encoded as that byte; any other lone surrogate becomes its three-byte form. ``decode(..., errors=...)``
takes Python's names: ``replace`` (default), ``strict``, ``ignore``, ``surrogateescape`` (keeps every byte)
and so on.

Tokens that are no valid UTF-8 on their own are shown by ``tokenize`` and ``convert_ids_to_tokens`` with the
same escapes, which keeps the map between tokens and byte strings one to one.

Text is not searched for special tokens: the characters ``<|endoftext|>`` in a document are encoded as
characters. Adding a token of one's own (for chats, say) turns the search on, as in other tokenizers, for all special
and added tokens; ``split_special_tokens`` says for each call, or for the tokenizer, what is wanted.
"""

import codecs
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizer, PreTrainedTokenizerFast

from rwkv_rev.tokenization.chat_template import WORLD_TEMPLATE, tells_who_speaks, tokenised_chat
from rwkv_rev.tokenization.fast import fast_tokenizer

REPLACEMENT = "\ufffd".encode()


def _encode_lone_surrogates(error: UnicodeError) -> tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    pieces = [
        bytes([ord(character) - 0xDC00])
        if 0xDC80 <= ord(character) <= 0xDCFF
        else character.encode("utf-8", "surrogatepass")
        for character in error.object[error.start : error.end]
    ]
    return b"".join(pieces), error.end


codecs.register_error("rwkv_rev.surrogates", _encode_lone_surrogates)


def text_to_bytes(text: str) -> bytes:
    """UTF-8 of a text, lone surrogates as described above; never fails."""
    return text.encode("utf-8", "rwkv_rev.surrogates")


class ByteLevelTokenizer(PreTrainedTokenizer):
    """Base of the tokenizers over bytes. Subclasses set the two tables before calling ``super().__init__``.

    Attributes:
        token_bytes: byte string of each id.
        token_ids: the token's string form -> id, special tokens of the base vocabulary included.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 (declared so by the base class)
    padding_side = "left"  # generation continues from the last position

    token_bytes: Mapping[int, bytes]
    token_ids: dict[str, int]

    def __init__(self, **kwargs: Any) -> None:
        # saved too, for readers of the folder that do not know this class
        own = {"padding_side": self.padding_side, "model_input_names": list(self.model_input_names)}
        super().__init__(**own | kwargs)
        if self.chat_template is None:
            self.chat_template = WORLD_TEMPLATE

    @classmethod
    def _from_pretrained(  # type: ignore[override]  # what comes behind the name is handed on as it is
        cls, resolved_vocab_files: dict[str, Any], name: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Refuse a model without a tokenizer: transformers asks whichever class it knows of for one."""
        own = ("tokenizer_config_file", *cls.vocab_files_names)
        if not any(resolved_vocab_files.get(file) for file in own):
            raise OSError(f"no tokenizer in {name}; save it there: tokenizer.save_pretrained({str(name)!r})")
        return super()._from_pretrained(resolved_vocab_files, name, *args, **kwargs)

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of a byte string; no special tokens are recognised or added."""
        raise NotImplementedError

    def decode_bytes(self, ids: Iterable[int], skip_special_tokens: bool = False) -> bytes:
        """Byte string of ids, exact; an id without a token gives the UTF-8 of U+FFFD.

        Args:
            ids: token ids.
            skip_special_tokens: leave out special tokens (end of text, padding) instead of spelling them.

        Raises:
            ValueError: for a negative id, such as the -100 of ignored labels.
        """
        skipped = set(self.all_special_ids) if skip_special_tokens else frozenset()
        added = {i: text_to_bytes(token.content) for i, token in self._added_tokens_decoder.items()}
        pieces = []
        for i in map(int, ids):
            if i < 0:
                raise ValueError(f"id {i} is not a token: remove ignored labels before decoding")
            if i not in skipped:
                pieces.append(added[i] if i in added else self.token_bytes.get(i, REPLACEMENT))
        return b"".join(pieces)

    @property
    def vocab_size(self) -> int:
        """Entries up to the highest id of the base vocabulary (the model's table may be padded beyond it)."""
        return max(self.token_ids.values()) + 1

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """As the base class; a token that the vocabulary did not have is there to be found in texts."""
        added = super()._add_tokens(new_tokens, special_tokens=special_tokens)
        if any(str(token) not in self.token_ids for token in new_tokens):
            self.split_special_tokens = False
        return added

    def get_vocab(self) -> dict[str, int]:
        """String form of every token -> id, added tokens included."""
        return {**self.token_ids, **self._added_tokens_encoder}

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of a list of tokens in string form; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(text_to_bytes, tokens)).decode("utf-8", "replace")

    def _save_pretrained(
        self,
        save_directory: Any,
        file_names: tuple[str, ...],
        legacy_format: Any = None,
        filename_prefix: Any = None,
    ) -> tuple[str, ...]:
        """Beside our own files the ``tokenizer.json`` that transformers alone reads."""
        saved = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        path = Path(save_directory) / ((f"{filename_prefix}-" if filename_prefix else "") + "tokenizer.json")
        path.write_text(fast_tokenizer(self).backend_tokenizer.to_str(), "utf-8")  # save wants a path of text
        return (*saved, str(path))

    def apply_chat_template(  # type: ignore[override]  # what it does not name is handed on as it is
        self,
        conversation: Any,
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; text is cut where the assistant begins and ends, and each part tokenised by itself.

        So the mask of the assistant's tokens (``return_assistant_tokens_mask=True``) is exact, and the tokens are those
        that a chat reads (:mod:`rwkv_rev.tokenization.chat_template`). The template needs ``{% generation %}`` marks.

        Raises:
            ValueError: if that mask is asked for and nothing tells who speaks.
            DataError: for what the template refuses.
        """
        masked = bool(kwargs.get("return_assistant_tokens_mask"))
        template = self.get_chat_template(chat_template, tools)
        marked = tells_who_speaks(template)
        whole = bool(kwargs.get("continue_final_message") or kwargs.get("sanitize_control_tokens"))
        if (masked and not (marked and kwargs.get("tokenize", True) and kwargs.get("return_dict", True))) or (
            masked and whole
        ):
            raise ValueError(
                "the mask of the assistant's tokens (assistant_only_loss in trl) needs {% generation %} marks in the "
                "chat template, tokenize=True and return_dict=True, and neither continue_final_message nor "
                "sanitize_control_tokens"
            )
        if whole or not marked or not kwargs.get("tokenize", True):
            return super().apply_chat_template(conversation, tools, documents, chat_template, **kwargs)
        return tokenised_chat(self, conversation, template, tools=tools, documents=documents, **kwargs)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._convert_id_to_token(i) for i in self.encode_bytes(text_to_bytes(text))]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.token_ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.token_bytes.get(index, REPLACEMENT).decode("utf-8", "surrogateescape")

    def _encode_plus(  # type: ignore[override]
        self, text: Any, text_pair: Any = None, **kwargs: Any
    ) -> BatchEncoding:
        if kwargs.get("return_offsets_mapping"):
            return self._with_offsets()._encode_plus(text, text_pair, **kwargs)
        # Straight to ids; the base class goes through one string per token. Batches return here one by one.
        plain = kwargs.get("split_special_tokens", self.split_special_tokens)
        if plain and not kwargs.get("sanitize_control_tokens"):
            if isinstance(text, str) and text:
                text = self.encode_bytes(text_to_bytes(text))
            if isinstance(text_pair, str) and text_pair:
                text_pair = self.encode_bytes(text_to_bytes(text_pair))
        return super()._encode_plus(text, text_pair, **kwargs)

    def _with_offsets(self) -> PreTrainedTokenizerFast:
        """The same tokenizer over the ``tokenizers`` library, which tells where in a text each token stands."""
        settings = (
            *((i, repr(token)) for i, token in sorted(self.added_tokens_decoder.items())),
            *(self.padding_side, self.truncation_side, self.split_special_tokens, self.model_max_length),
            *map(str, self.special_tokens_map.items()),
        )
        known, fast = getattr(self, "_fast", (None, None))
        if fast is None or known != settings:
            fast = fast_tokenizer(self)
            self._fast = settings, fast
        return fast

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        errors: str = "replace",
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        text = self.decode_bytes(ids, skip_special_tokens).decode("utf-8", errors)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text


class RwkvByteTokenizer(ByteLevelTokenizer):
    """Ids are the 256 byte values; for models with a vocabulary of 256.

    No id is free for special tokens: byte 0, which text does not use, ends a text, as the models' configuration
    has it, and pads; the attention mask says which zeros are padding. ``skip_special_tokens=True`` therefore
    drops NUL bytes; without it every byte is kept.

    Documents to train on get no such byte (``end_token=auto`` of :mod:`rwkv_rev.training`): a model of bytes that
    was not trained with it would have to learn what it means. ``end_token=0`` puts it.
    """

    document_end_id = None

    def __init__(
        self, eos_token: str = "\0", pad_token: str = "\0", split_special_tokens: bool = True, **kwargs: Any
    ) -> None:
        self.token_bytes = {i: bytes([i]) for i in range(256)}
        self.token_ids = {
            piece.decode("utf-8", "surrogateescape"): i for i, piece in self.token_bytes.items()
        }
        super().__init__(
            eos_token=eos_token, pad_token=pad_token, split_special_tokens=split_special_tokens, **kwargs
        )

    def encode_bytes(self, data: bytes) -> list[int]:
        """The bytes themselves."""
        return list(data)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Nothing to save: the vocabulary is the 256 bytes."""
        return ()
