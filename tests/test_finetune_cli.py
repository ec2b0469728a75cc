"""The command line of ``finetune`` and ``eval``: options, streams, JSON, exit codes."""

import json
import re
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
    monkeypatch.setattr("rwkv_rev.training.saving.has_matplotlib", lambda: False)
    return cli


def test_finetune_then_eval_then_generate(cli: Cli, bundled: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("context_length: 300\nchunk_length: 100\nmax_steps: 9\nlr: 1e-3\n")
    settings = ("--config", "run.yaml", "--max-steps", 2, "--eval-data", "data.txt")
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
    printed = " ".join(out.split())
    assert re.search(
        r"training loss [\d.]+ in step 1, [\d.]+ in step 2 \(nats per token, of other rows\)", printed
    )
    assert re.search(r"tape [1-9][\d.]* kB", printed), "chunks between the first and the last leave a record"
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


def test_a_tape_of_no_bytes_is_explained(cli: Cli, shallow: dict[str, Path]) -> None:
    common = ("finetune", shallow["5.2"], "--data", "data.txt", "--device", "cpu", "--context-length", 200)
    why = "tape 0 B (only chunks between the first and the last of a row need a record"
    for more in (("--dry-run",), ("--max-steps", 1)):
        code, out, err = cli(*common, "--chunk-length", 100, "--output", "two", *more)
        assert code == 0, err
        printed = " ".join(out.split())
        assert why in printed
    assert "(nats per token; --eval-data FILE measures progress)" in printed
    code, out, err = cli(*common, "--chunk-length", 100, "--output", "none", "--dry-run", "--bptt", "full")
    assert "tape none (full keeps no states)" in " ".join(out.split()), err
    code, out, _ = cli(*common[:-1], 2000, "--output", "same", "--max-steps", 2)
    assert code == 0 and re.search(r"1, [\d.]+ in step 2 \(nats per token; --eval", " ".join(out.split())), (
        "one row"
    )
    code, out, _ = cli(*common, "--chunk-length", 50, "--output", "four", "--dry-run")
    assert code == 0 and "need a record" not in " ".join(out.split())


def test_dry_run_touches_nothing(cli: Cli, bundled: dict[str, Path], tmp_path: Path) -> None:
    common = (bundled["4"], "--data", "data.txt", "--output", "out", "--dry-run", "--tune", "lora")
    before = {path.name for path in tmp_path.iterdir()}
    code, out, err = cli("finetune", *common)
    assert code == 0, err
    for text in ("Settings", "context_length    16384", "documents", "tokens per step", "tape", "lora_rank"):
        assert text in out
    assert err.startswith("the context length of 16,384 is longer than any document"), "no warning"
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
        (
            (),
            "the model is missing: name its folder, DIR in rwkv-rev finetune DIR (`model` in a file of settings)",
        ),
        ((bundled["4"],), "--data is missing (`data` in a file of settings)"),
        ((bundled["4"], "--data", "data.txt"), "--output is missing (`output` in a file of settings)"),
    ):
        assert cli("finetune", *arguments) == (2, "", f"error: {message}\n")
    assert cli("eval", bundled["4"])[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--eval-every", 5), "--eval-every needs held-out text: --eval-data FILE"),
        (("--pack", "--carry-state"), "--pack and --carry-state exclude each other"),
        (("--prompt-field", "q"), "--prompt-field and --completion-field go together; name both"),
        (
            ("--text-field", "t", "--prompt-field", "q", "--completion-field", "a"),
            "--text-field and --prompt-field",
        ),
        (("--lora-rank", 8), "lora_rank belongs to --tune lora; this run has tune = full"),
        (("--set", "tape_dir=."), "tape_dir belongs to --tape disk; this run has tape = host"),
        (("--resume", ""), "resume is empty; leave it out"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_is_wanted_is_named_as_the_option_that_gives_it(
    cli: Cli, bundled: dict[str, Path], arguments: tuple[object, ...], message: str
) -> None:
    code, _, err = cli("finetune", bundled["4"], "--data", "data.txt", "--output", "out", *arguments)
    assert code == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1


def test_packing_is_reported(cli: Cli, bundled: dict[str, Path], tmp_path: Path) -> None:
    records = "".join(f'{{"text": "{"a" * length}"}}\n' for length in (60, 50, 40, 30, 20))
    (tmp_path / "short.jsonl").write_text(records, "utf-8")
    common = ("finetune", bundled["5.2"], "--data", "short.jsonl", "--output", "out", "--dry-run")
    code, _, err = cli(*common, "--pack", "--context-length", "100")
    assert code == 0
    assert err == "pack: 5 pieces of documents in 2 rows, 100.0 % full; state starts anew in each\n", (
        "no warning"
    )


def test_a_dry_run_shows_what_has_loss(cli: Cli, bundled: dict[str, Path], tmp_path: Path) -> None:
    talk = [{"role": role, "content": "Hi."} for role in ("user", "assistant") * 2]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": talk}), "utf-8")
    common = ("finetune", bundled["5.2"], "--data", "chat.jsonl", "--output", "out", "--dry-run")
    code, out, err = cli(*common, "--data", "data.txt", "--sample-prompt", "Hi")
    assert code == 0, err
    text = (tmp_path / "data.txt").stat().st_size
    loss, tokens = 2 * len(" Hi.\n\n") + 1, len("User: Hi.\n\nAssistant: Hi.\n\n") * 2 + 1
    assert f"tokens {text + tokens:,}, of which {text + loss:,} with loss" in " ".join(out.split())
    assert re.search("^data +chat.jsonl, data.txt *$", out, re.M) and "['" not in out
    code, out, _ = cli(*common, "--json", "--train-on", "last")
    found = json.loads(out)
    assert (found["data"]["tokens"], found["data"]["loss_tokens"]) == (tokens, loss - len(" Hi.\n\n"))
    assert found["settings"]["data"] == ["chat.jsonl"]


@pytest.mark.parametrize("command", ["finetune", "eval"])
def test_records_with_fields_of_other_names(
    cli: Cli, bundled: dict[str, Path], tmp_path: Path, command: str
) -> None:
    """What one command takes the other does, and the message names the options that help."""
    (tmp_path / "qa.jsonl").write_text('{"q": "What is it? ", "a": "A state."}\n' * 3)
    common = [command, bundled["5.2"], "--data", "qa.jsonl", "--device", "cpu"]
    common += ["--output", "out", "--dry-run"] if command == "finetune" else ["--json"]
    code, _, err = cli(*common)
    assert code == 1 and err.count("\n") == 1
    assert "no field 'text' (or 'prompt' and 'completion', " in err and "; found: a, q; " in err
    named = set(re.findall("--[a-z-]+", err))
    assert named >= {"--text-field", "--prompt-field", "--completion-field", "--messages-field"}
    code, out, _ = cli(command, "--help")
    assert code == 0 and named <= set(re.findall("--[a-z-]+", out)), "an option that it has not"
    code, out, err = cli(*common, "--prompt-field", "q", "--completion-field", "a")
    assert code == 0, err
    if command == "eval":
        assert json.loads(out)["total"]["tokens"] == 3 * len("A state.")
    code, _, err = cli(*common, "--prompt-field", "q")
    assert code == 2 and "--prompt-field and --completion-field go together; name both" in err
