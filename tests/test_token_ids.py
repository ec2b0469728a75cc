"""Token ids that a model has no embedding for: found before the first step, by file, document and position."""

from collections.abc import Callable
from pathlib import Path

import pytest
from finetune_cases import counting_text, settings
from test_binidx import write_pair

from rwkv_rev.errors import RwkvRevError
from rwkv_rev.training import token_store
from rwkv_rev.training.finetune import plan
from rwkv_rev.training.token_cache import load_tokens

Cli = Callable[..., tuple[int, str, str]]
GOOD = [list(range(40)), list(range(100, 160))]


@pytest.mark.parametrize(
    ("code", "sequence", "bad"),
    [(8, [1, 2, 300], 300), (4, [1, 2, -7], -7), (3, [5, 5, 256], 256), (2, [0, 0, -1], -1)],
)
@pytest.mark.parametrize("option", ["--data", "--eval-data"])
def test_finetune_names_file_document_and_position(
    cli: Cli, bundled: dict[str, Path], tmp_path: Path, code: int, sequence: list[int], bad: int, option: str
) -> None:
    good = [[value % 120 for value in document] for document in GOOD]
    write_pair(tmp_path / "bad", [*good, sequence], code=code)
    text = counting_text(tmp_path / "text.txt", 20)
    data = ("--data", text, option, "bad") if option == "--eval-data" else (option, "bad")
    for more in (("--dry-run",), ()):
        status, out, err = cli(
            "finetune", bundled["4"], *data, "--output", "out", *more, "--cache-dir", "cache"
        )
        assert (status, out) == (1, "") and err.count("\n") == 1
        assert err.startswith(
            f"error: bad.idx: document 3: token id {bad} at position 2 is outside the model's"
        )
    assert not (tmp_path / "out.training").exists()


def test_eval_names_them_too(cli: Cli, bundled: dict[str, Path], tmp_path: Path) -> None:
    write_pair(tmp_path / "bad", [*GOOD, [1, 2, 300]])
    status, out, err = cli("eval", bundled["4"], "--data", "bad", "--cache-dir", "cache")
    assert (status, out) == (1, "")
    assert err.startswith(
        "error: bad.idx: document 3: token id 300 at position 2 is outside the model's vocab"
    )


def test_an_end_token_that_does_not_exist(bundled: dict[str, Path], tmp_path: Path) -> None:
    data = counting_text(tmp_path / "data.txt", 20)
    config = settings(bundled["4"], data, tmp_path / "out", end_token=256)
    with pytest.raises(RwkvRevError, match="end_token = 256 is outside the vocabulary: ids go to 255"):
        plan(config)


def test_places_beyond_one_piece_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty documents, several sequences a document, pieces of three ids; two files, the second one damaged."""
    monkeypatch.setattr(token_store, "SCANNED_AT_ONCE", 3)
    write_pair(tmp_path / "good", GOOD)
    write_pair(tmp_path / "bad", [[1, 2], [], [3, 4, 5], [6, 999]], [0, 1, 2, 4])
    with pytest.raises(RwkvRevError, match=r"bad\.idx: document 3: token id 999 at position 4 is outside"):
        load_tokens([tmp_path / "good.idx", tmp_path / "bad.idx"], vocab_size=256)
    load_tokens([tmp_path / "good.idx", tmp_path / "bad.idx"], vocab_size=1000)


def test_what_cannot_hold_such_an_id_is_not_read(tmp_path: Path) -> None:
    """16 bits and a vocabulary of 65,536: the file, gone meanwhile, is not missed."""
    write_pair(tmp_path / "data", GOOD)
    (part,) = load_tokens(tmp_path / "data").parts
    part._maps.clear()
    (tmp_path / "data.bin").unlink()
    assert part.first_outside(1 << 16) is None
    with pytest.raises(FileNotFoundError):
        part.first_outside((1 << 16) - 1)
