"""``inspect --text``: what reversal keeps of a text, against a direct computation of decays, widths and sizes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import VERSIONS, differentiate, random_tokens, tiny_model

from rwkv_rev.cells import time_mix_rwkv6
from rwkv_rev.equivalence.forgetting import CHUNKS, measure_forgetting, measure_source
from rwkv_rev.equivalence.text import default_text
from rwkv_rev.errors import ConfigError, DataError

Cli = Callable[..., tuple[int, str, str]]
WIDTH, LAYERS, HEAD_SIZE = 16, 2, 8  # of tiny models
NUMBERS = {"4": 3 * WIDTH}
"""Of a layer's state, where it is no matrix per head."""


@pytest.mark.parametrize("version", VERSIONS)
def test_sizes(version: str) -> None:
    """Whole states, and what is kept of them, by hand; the tape is the one of a gradient."""
    model, chunk, chunks = tiny_model(version).eval(), 8, 5
    ids = random_tokens(chunk * (chunks + 1))[0]
    (found,) = measure_forgetting(model, ids[: chunk * chunks + 3], [chunk]).chunks  # the tail is left out
    numbers = NUMBERS.get(version, WIDTH * HEAD_SIZE)
    counted = chunk * (chunks - 1)
    assert (found.chunk, found.counted) == (chunk, counted)
    for layer in found.layers:
        assert layer.element_steps == numbers * counted
        assert layer.whole == 32 * numbers * (chunks - 1)
        assert layer.shifts == 2 * 4 * WIDTH * (chunks - 1)
        if version == "4":
            assert layer.remnants == layer.whole
        assert 0 < layer.theory <= layer.remnants
    # a gradient keeps nothing of its last chunk
    with model.set_bptt("reversible", remnants="lifted" if version == "7" else "auto"):
        outcome = differentiate(model, "reversible", chunk, input_ids=ids[None])
    assert found.tape_bytes == outcome.report["tape_bytes"]
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("version", ["5.2", "6"])
def test_a_model_in_float64_has_states_of_twice_the_bits(version: str) -> None:
    model, chunk, ids = tiny_model(version, dtype=torch.float64).eval(), 48, random_tokens(250)
    (found,) = measure_forgetting(model, ids[0], [chunk]).chunks
    elements = WIDTH * HEAD_SIZE * 4
    for layer in found.layers:
        assert layer.whole == 64 * elements
        risen = 2 * (64 * HEAD_SIZE**2 + 96) * WIDTH // HEAD_SIZE  # the most that heads whose grid rises add
        assert 0 < layer.theory <= layer.remnants <= layer.theory + (1 + 8 / HEAD_SIZE) * elements + risen
    # a gradient keeps nothing of its last chunk
    assert found.tape_bytes == differentiate(model, "reversible", chunk, input_ids=ids).report["tape_bytes"]


def test_what_data_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """RWKV-6: log w of every token, as one forward pass over the whole text has it, summed by hand."""
    model, chunk, ids = tiny_model("6").eval(), 48, random_tokens(240)
    seen: list[torch.Tensor] = []
    wkv6 = time_mix_rwkv6.wkv6

    def listening(r: Any, k: Any, v: Any, log_decay: torch.Tensor, *others: Any) -> Any:
        seen.append(log_decay.detach().double())
        return wkv6(r, k, v, log_decay, *others)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(time_mix_rwkv6, "wkv6", listening)
        model(ids)
    (found,) = measure_forgetting(model, ids[0], [chunk]).chunks
    assert len(seen) == LAYERS
    for layer, log_decay in zip(found.layers, seen, strict=True):
        forgotten = (-log_decay[0].view(5, chunk, -1).sum(1) / math.log(2))[1:]  # [chunks, H N]
        assert forgotten.min() < 32 < forgotten.max(), "rows of both kinds"
        assert layer.theory == pytest.approx(HEAD_SIZE * float(forgotten.clamp(max=32).sum()), rel=1e-5)
        # whole bits, and of each row a byte that tells how many
        rows = forgotten.ceil().clamp(max=32)
        raised = (32 * HEAD_SIZE**2 + 96) * 4 * 2  # the most that heads whose grid rises add
        least = HEAD_SIZE * float(rows.sum()) + 8 * rows.numel()
        assert least - HEAD_SIZE * 32 <= layer.remnants <= least + HEAD_SIZE * rows.numel() + raised
    assert found.total.remnants == sum(layer.remnants for layer in found.layers)


@pytest.mark.parametrize("name", ["4", "5.2", "6", "7"])
def test_command(cli: Cli, tmp_path: Path, bundled: dict[str, Path], name: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text(default_text()[:700], "utf-8")
    arguments = ("inspect", f"bundled:rwkv-{name}", "--text", text, "--tokens")
    code, out, err = cli(*arguments, 520)
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 80
    assert "C = 64" in out and "C = 256" in out and "C = 1,024" not in out  # which does not fit twice
    assert "first 520 tokens" in out and "theory" in out
    assert ("whole states here" in " ".join(out.split())) == (name == "4")
    assert ("those of --remnants lifted" in " ".join(out.split())) == (name == "7")
    code, out, err = cli(*arguments, 200, "--json", "--chunk-length", 50)
    assert code == 0, err
    (chunk,) = json.loads(out)["forgetting"]["chunks"]
    assert (chunk["chunk_length"], chunk["counted_tokens"]) == (50, 150)
    assert len(chunk["bits_per_step"]["layers"]) == 6 and chunk["bits_per_step"]["all"]["whole"] == 0.64
    assert "memory_forecast" not in json.loads(out)
    folder = measure_source(bundled[name], text, tokens=200, chunk_length=50)
    assert folder.to_dict()["chunks"] == [chunk]


def test_what_cannot_be_measured(cli: Cli, tmp_path: Path, bundled: dict[str, Path]) -> None:
    for name, content in (("binary", bytes(range(256))), ("empty", b""), ("short", b"too short")):
        (tmp_path / name).write_bytes(content)
    for text, words in (
        ("missing", "cannot read the text"),
        ("binary", "is not UTF-8 text"),
        ("empty", "the text is empty"),
        ("short", "two chunks of 64 need 128"),
    ):
        code, out, err = cli("inspect", "bundled:rwkv-7", "--text", text)
        assert code == 1 and out == "" and words in err and err.count("\n") == 1, err
    for more, words in (
        (("--tokens", 100), "--tokens"),
        (("--chunk-length", 100), "--chunk-length"),
    ):
        code, _, err = cli("inspect", "bundled:rwkv-7", *more)
        assert code == 2 and words in err and "without effect" in err
    with pytest.raises(ConfigError, match="chunks of 64 need at least 128"):
        measure_source(bundled["7"], "text", tokens=100)
    with pytest.raises(DataError, match="give a longer text"):
        measure_source(bundled["7"], "text", chunk_length=3)
    assert min(CHUNKS) == 64
