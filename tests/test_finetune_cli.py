"""The command line of ``finetune`` and ``eval``: options, streams, JSON, exit codes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from finetune_cases import counting_text

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """The command line in a folder with a text, its token cache there too."""
    monkeypatch.setenv("RWKV_REV_CACHE", str(tmp_path / "cache"))
    counting_text(tmp_path / "data.txt", 60)
    return cli


def test_finetune_then_eval_then_generate(cli: Cli, bundled: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("context_length: 300\nchunk_length: 100\nmax_steps: 9\nlr: 1e-3\n")
    settings = ("--config", "run.yaml", "--set", "max_steps=7", "--max-steps", 2, "--eval-data", "data.txt")
    model = bundled["5.2"]
    code, out, err = cli(
        "finetune", model, "--data", "data.txt", "--output", "out", *settings, "--device", "cpu"
    )
    assert code == 0, err
    for text in (
        "Fine-tuned",
        "training loss",
        "nats per token",
        "held-out",
        "tokens/s",
        "tape",
        "1,354,752",
    ):
        assert text in out
    assert "warning: 1 document is longer than the context" in err
    rows = [json.loads(line) for line in (tmp_path / "out/training/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    logged = {"loss", "learning_rate", "grad_norm", "tokens_per_second", "tape_bytes", "memory_bytes"}
    assert logged <= rows[1].keys()

    code, out, err = cli(
        "eval", "out", "--data", "data.txt", "--json", "--plot", "curve.png", "--device", "cpu"
    )
    assert code == 0 and (tmp_path / "curve.png").stat().st_size > 1000, err
    values = json.loads(out)
    assert values["total"]["tokens"] == sum(bucket["tokens"] for bucket in values["buckets"])
    assert values["total"]["bits_per_byte"] > 0
    code, out, err = cli("eval", "out", "--data", "data.txt", "--context-length", 128, "--device", "cpu")
    assert code == 0 and "0-128" in out and "bits/byte" in out and "all" in out

    code, out, err = cli(
        "generate", "out", "--prompt", "7 squared", "--max-new-tokens", 4, "--temperature", 0
    )
    assert code == 0 and out.startswith("7 squared")


def test_dry_run_touches_nothing(cli: Cli, bundled: dict[str, Path], tmp_path: Path) -> None:
    common = (bundled["4"], "--data", "data.txt", "--output", "out", "--dry-run", "--tune", "lora")
    before = {path.name for path in tmp_path.iterdir()}
    code, out, err = cli("finetune", *common)
    assert code == 0, err
    for text in ("Settings", "context_length  16384", "documents", "tokens per step", "tape", "lora_rank"):
        assert text in out
    assert "warning: the context length of 16384 is longer than any document" in err
    code, out, _ = cli("finetune", *common, "--json")
    assert code == 0 and json.loads(out)["settings"]["lr"] == 5e-4
    assert {path.name for path in tmp_path.iterdir()} == before, "no cache of tokens either"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--set", "chunklength=5"), 2, "chunklength is not a setting; did you mean chunk_length?"),
        (("--set", "seed=x"), 2, "seed = 'x' must be a whole number"),
        (
            ("--lr-schedule", "wobbly"),
            2,
            "lr_schedule = 'wobbly' does not exist; choose one of constant, linear",
        ),
        (("--resume", "nowhere"), 1, "nowhere is not a whole checkpoint"),
        (("--tune", "state"), 1, "tune = state needs RWKV-5"),
        (("--data", "absent.txt"), 1, "absent.txt: no such file or folder"),
        (("--config", "absent.yaml"), 2, "absent.yaml cannot be read"),
    ],
)
def test_one_line_errors(
    cli: Cli, bundled: dict[str, Path], arguments: tuple[str, ...], code: int, message: str
) -> None:
    found, out, err = cli("finetune", bundled["4"], "--data", "data.txt", "--output", "out", *arguments)
    assert (found, out) == (code, "")
    assert message in err and err.startswith("error: ") and err.count("\n") == 1


def test_missing_arguments(cli: Cli, bundled: dict[str, Path]) -> None:
    for arguments, message in (
        ((), "model is missing"),
        ((bundled["4"],), "data is missing"),
        ((bundled["4"], "--data", "data.txt"), "output is missing"),
    ):
        code, _, err = cli("finetune", *arguments)
        assert code == 2 and message in err
    assert cli("eval", bundled["4"])[0] == 2
