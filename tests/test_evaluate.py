"""Bits per byte by position: the sums, the buckets, streaming, prompts, and the bytes of tokens."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from finetune_cases import counting_text
from token_data import make_store

from rwkv_rev.errors import DataError, RwkvRevError
from rwkv_rev.modeling import RwkvRevForCausalLM
from rwkv_rev.tokenization import RwkvByteTokenizer, RwkvWorldTokenizer
from rwkv_rev.training.evaluate import count_token_bytes, evaluate_directory, evaluate_documents

LENGTHS = [5, 40, 1, 130, 17]
BYTES = torch.ones(256, dtype=torch.int64)


@pytest.fixture(scope="module")
def model(bundled: dict[str, Path]) -> RwkvRevForCausalLM:
    return RwkvRevForCausalLM.from_pretrained(str(bundled["5.2"]), dtype=torch.float32).eval()


def expected_nats(model: RwkvRevForCausalLM, rows: list[torch.Tensor]) -> list[list[float]]:
    """Cross-entropy of every token but the first of each row, from the logits of the whole row."""
    found = []
    with torch.no_grad():
        for row in rows:
            logits = model(row[None]).logits[0, :-1]
            found.append(F.cross_entropy(logits.double(), row[1:], reduction="none").tolist())
    return found


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_sums(model: RwkvRevForCausalLM, tmp_path: Path, batch_size: int, chunk: int) -> None:
    store = make_store(tmp_path, LENGTHS)
    rows = []
    for document, length in enumerate(LENGTHS):
        for start in range(0, length, 64):
            if min(64, length - start) > 1:
                rows.append(torch.from_numpy(store.tokens(document, start, start + 64)))
    nats = [value for row in expected_nats(model, rows) for value in row]
    with model.set_bptt("auto", chunk_length=chunk):
        result = evaluate_documents(model, store, BYTES, context_length=64, batch_size=batch_size)
    assert result.total.tokens == len(nats) == result.total.nbytes
    assert result.total.nats == pytest.approx(sum(nats), rel=1e-5)
    assert result.total.bits_per_byte == pytest.approx(sum(nats) / len(nats) / math.log(2), rel=1e-5)
    assert result.total.perplexity == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)


def test_buckets(model: RwkvRevForCausalLM, tmp_path: Path) -> None:
    store = make_store(tmp_path, [200, 30], None)
    import rwkv_rev.training.evaluate as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FIRST_EDGE", 10)
        result = evaluate_documents(model, store, BYTES, context_length=100)
    assert [(b.start, b.stop) for b in result.buckets] == [(0, 10), (10, 40), (40, 100)]
    # Positions 1 to 99 of two rows of 100 and 1 to 29 of one of 30; the first token of a row is not predicted.
    assert [b.tokens for b in result.buckets] == [9 * 3, 30 * 2 + 20, 60 * 2]
    rows = [torch.from_numpy(store.tokens(0, s, s + 100)) for s in (0, 100)] + [
        torch.from_numpy(store.tokens(1))
    ]
    expected = sum(sum(row[9:39]) for row in expected_nats(model, rows))
    assert result.buckets[1].nats == pytest.approx(expected, rel=1e-5)
    assert [b["positions"] for b in result.to_dict()["buckets"]] == [[0, 10], [10, 40], [40, 100]]


def test_names_of_buckets(model: RwkvRevForCausalLM, tmp_path: Path) -> None:
    result = evaluate_documents(model, make_store(tmp_path, [250]), BYTES, context_length=1 << 20)
    assert [b.name for b in result.buckets] == ["0-1k"]


def test_prompts_and_limits(model: RwkvRevForCausalLM, tmp_path: Path) -> None:
    store = make_store(tmp_path, [20, 20, 20], [15, 0, 20])
    result = evaluate_documents(model, store, BYTES, context_length=8)
    # Document 0: its tokens 15 to 19, of which 16 begins a row; document 1: rows of 8, 8, 4; document 2: nothing.
    assert result.total.tokens == 4 + (7 + 7 + 3)
    assert evaluate_documents(model, store, BYTES, context_length=20, max_tokens=30).total.tokens == 5 + 9
    with pytest.raises(DataError, match="no document has a token to predict"):
        evaluate_documents(model, make_store(tmp_path, [9], [9]), BYTES, context_length=8)
    with pytest.raises(DataError, match="outside the model's vocabulary"):
        evaluate_documents(model, make_store(tmp_path, [300]), BYTES, context_length=8)


def test_memory_does_not_grow_with_the_context(model: RwkvRevForCausalLM, tmp_path: Path) -> None:
    """The largest tensor made is that of one chunk, whatever the length of the row."""
    largest = {}
    for length in (96, 192):
        store = make_store(tmp_path, [length])
        seen: list[int] = []

        def note(module: object, inputs: object, output: Any, seen: list[int] = seen) -> None:
            seen.append(output.last_hidden_state.shape[1])

        hook = model.model.register_forward_hook(note)
        with model.set_bptt("auto", chunk_length=32):
            evaluate_documents(model, store, torch.ones(256, dtype=torch.int64), context_length=1 << 40)
        hook.remove()
        largest[length] = max(seen)
        assert len(seen) == length // 32
    assert set(largest.values()) == {32}


def test_bytes_of_tokens() -> None:
    assert count_token_bytes(RwkvByteTokenizer(), 256).tolist() == [1] * 256
    world = RwkvWorldTokenizer()
    counts = count_token_bytes(world, 65536)
    text = "Grüße, 世界!\n  def f(x): return x  # 🙂"
    assert counts[world(text)["input_ids"]].sum() == len(text.encode())
    assert counts[0] == 0, "the end token stands for no byte"


def test_bytes_of_byte_level_bpe() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["größer 世界 größer 世界 abc abc"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    text = "größte Welt 世界 🙂"
    counts = count_token_bytes(fast, len(fast))
    assert counts[fast(text)["input_ids"]].sum() == len(text.encode())


def test_directory(bundled: dict[str, Path], tmp_path: Path) -> None:
    data = counting_text(tmp_path / "data.txt", 30)
    common = {"context_length": 1 << 20, "cache_dir": str(tmp_path / "cache"), "device": "cpu"}
    result = evaluate_directory(bundled["4"], [str(data)], **common)  # type: ignore[arg-type]
    assert result.total.tokens == data.stat().st_size - 1
    half = evaluate_directory(bundled["4"], [str(data)], dtype="bfloat16", **common)  # type: ignore[arg-type]
    assert half.total.bits_per_byte == pytest.approx(result.total.bits_per_byte, rel=0.02)
    records = tmp_path / "qa.jsonl"
    records.write_text('{"q": "What? ", "a": "A state."}\n')
    fields = {"prompt_field": "q", "completion_field": "a"}
    assert evaluate_directory(bundled["4"], records, **fields, **common).total.tokens == 8  # type: ignore[arg-type]
    with pytest.raises(DataError, match="prompt_field=NAME and completion_field=NAME"):
        evaluate_directory(bundled["4"], records, **common)  # type: ignore[arg-type]
    with pytest.raises(RwkvRevError, match="is not a converted model"):
        evaluate_directory(tmp_path, [str(data)], **common)  # type: ignore[arg-type]
