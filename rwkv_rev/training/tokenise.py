"""Text to token ids, in one process or several, in order.

Batches of about one mebibyte go to several processes (start method "spawn" on every platform) a few
ahead of the reader; memory does not grow with the data. Prompt and completion, and the turns of a conversation, are
tokenised apart, so that what carries loss begins on a token border, as it does when the model generates. Errors name
file and line.
"""

import hashlib
import json
import multiprocessing
import os
import pickle
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rwkv_rev.errors import DataError
from rwkv_rev.tokenization.special_tokens import refuse_special, special_tokens
from rwkv_rev.training.conversations import parts_of
from rwkv_rev.training.documents import DataSource, one_line
from rwkv_rev.training.records import Fields, Piece, place

BATCH_BYTES = 1 << 20
POOL_WORTH_SECONDS = 30.0  # starting processes takes some 5 s, for the imports of the tokenizer
PROBE = "The quick brown fox\n\n  jumps over 13 lazy dogs. Äöü ß 漢字 🙂\t\r\n"


class Encoded(NamedTuple):
    """A piece as tokens: ids uint32 [n]; which of them carry loss, bool [n]; UTF-8 bytes with loss; its own end."""

    ids: np.ndarray
    loss: np.ndarray
    text_bytes: int
    source: int
    line: int
    continues: bool
    answers: bool
    end: int | None


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of what a tokenizer does: vocabulary and rules, class, and the ids of a probe text."""
    digest = hashlib.sha256(f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}\n".encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        digest.update(backend.to_str().encode())
    elif hasattr(tokenizer, "get_vocab"):
        vocabulary = sorted((index, str(token)) for token, index in tokenizer.get_vocab().items())
        digest.update(json.dumps(vocabulary).encode())
        if hasattr(tokenizer, "save_vocabulary"):
            with tempfile.TemporaryDirectory() as folder:
                tokenizer.save_vocabulary(folder)
                for file in sorted(Path(folder).iterdir()):
                    digest.update(file.read_bytes())
    else:
        try:
            digest.update(pickle.dumps(tokenizer))
        except (pickle.PicklingError, TypeError, AttributeError):
            digest.update(b"not picklable")  # the probe has to tell such tokenizers apart
    digest.update(np.asarray(token_ids(tokenizer, PROBE), np.int64).tobytes())
    return digest.hexdigest()


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of ``text`` without special tokens around it."""
    if not text:
        return []
    if callable(tokenizer):
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = tokenizer.encode(text)
    return getattr(ids, "ids", ids)


def worker_count(num_workers: int | None) -> int:
    """Processes to tokenise with at most: one a core when ``num_workers`` is None."""
    if num_workers is not None and num_workers < 1:
        raise DataError(f"num_workers is {num_workers}; it must be at least 1")
    if multiprocessing.current_process().daemon:
        return 1  # such a process may not start others
    if num_workers is not None:
        return num_workers
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 32)


def batches(texts: list[DataSource], fields: Fields) -> Iterator[list[tuple[int, Piece]]]:
    batch: list[tuple[int, Piece]] = []
    size = 0
    for index, source in enumerate(texts):
        try:
            for piece in source.pieces(fields):
                batch.append((index, piece))
                size += piece.size
                if size >= BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
        except OSError as error:
            raise DataError(f"{source.name}: cannot be read: {error.strerror or error}") from error
    if batch:
        yield batch


def encode_in_order(
    batches: Iterator[list[tuple[int, Piece]]], tokenizer: Any, num_workers: int | None, total: int
) -> Iterator[list[Encoded]]:
    """Encode batches, in order. ``total``: bytes of all of them together, about.

    With ``num_workers`` None this process begins alone and starts others once the rest would take long.
    """
    workers = worker_count(num_workers)
    try:
        pickle.dumps(tokenizer)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        if num_workers is not None and workers > 1:
            raise DataError(
                f"this tokenizer cannot be sent to processes ({one_line(error)}); tokenise with num_workers=1"
            ) from error
        workers = 1
    if num_workers is None or workers == 1:
        started, done = time.perf_counter(), 0
        for batch in batches:
            encoded = _encode_batch(tokenizer, batch)
            yield encoded
            done += sum(one.text_bytes for one in encoded)
            spent = time.perf_counter() - started
            if workers > 1 and spent > 1.0 and (total - done) / max(done, 1) * spent > POOL_WORTH_SECONDS:
                break
        else:
            return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(tokenizer,))
    waiting: deque[Future[list[Encoded]]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_encode_in_worker, batch))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a tokenising process died (out of memory, or a script without if __name__ == '__main__':); "
            "tokenise with num_workers=1"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker_tokenizer: Any = None


def _start_worker(tokenizer: Any) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _encode_in_worker(batch: list[tuple[int, Piece]]) -> list[Encoded]:
    return _encode_batch(_worker_tokenizer, batch)


def _encode_batch(tokenizer: Any, batch: list[tuple[int, Piece]]) -> list[Encoded]:
    specials = special_tokens(tokenizer)
    return [_encode(tokenizer, specials, source, piece) for source, piece in batch]


def _encode(tokenizer: Any, specials: dict[str, int], source: int, piece: Piece) -> Encoded:
    ids: list[int] = []
    texts: list[str] = []
    loss: list[np.ndarray] = []
    size = 0
    try:
        _refuse_special(tokenizer, specials, piece)
        for text, counts in parts_of(tokenizer, piece):
            found = token_ids(tokenizer, text)
            ids += found
            texts.append(text)
            loss.append(np.full(len(found), counts))
            size += len(text.encode("utf-8", "surrogatepass")) if counts else 0
        values = np.array(ids, np.uint32)
    except DataError as error:
        raise DataError(f"{piece.where}: {error}") from None
    except Exception as error:  # whatever a tokenizer raises; the user needs the place
        raise DataError(
            f"{_failing_place(tokenizer, piece)}: cannot be tokenised: {one_line(error)}"
        ) from None
    mask = np.concatenate([np.zeros(0, bool), *loss])
    end = _end_that_is_there(tokenizer, "".join(texts[-3:]), ids)
    return Encoded(values, mask, size, source, piece.line, piece.continues, piece.answers, end)


def _refuse_special(tokenizer: Any, specials: dict[str, int], piece: Piece) -> None:
    """Raise DataError for turns that hold a special token, and texts of an answer that hold the one that ends it."""
    if not piece.answers:
        return
    for number, turn in enumerate(piece.turns, start=1):
        refuse_special(turn["content"], specials, tokenizer, f"turn {number}")
    end = getattr(tokenizer, "eos_token", None)
    ends = {text: index for text, index in specials.items() if text == end}
    for name, text in (("the prompt", piece.prompt or ""), ("the text", piece.text)):
        refuse_special(text, ends, tokenizer, name)


def _end_that_is_there(tokenizer: Any, text: str, ids: list[int]) -> int | None:
    """The token that ends a text already, blanks apart: the tokenizer's end of text, or None."""
    end = getattr(tokenizer, "eos_token", None)
    there = isinstance(end, str) and end and text.rstrip().endswith(end) and tokenizer.eos_token_id in ids
    return int(tokenizer.eos_token_id) if there else None


def _failing_place(tokenizer: Any, piece: Piece) -> str:
    """``file:line`` of the first line of a text that fails alone, else of its beginning."""
    if piece.many_lines:
        for number, line in enumerate(piece.text.split("\n"), start=piece.line):
            try:
                token_ids(tokenizer, line)
            except Exception:  # the same as above
                return place(piece.source, number, piece.unit)
    return piece.where
