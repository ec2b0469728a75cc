"""``rwkv-rev verify``: what it prints, and its exit codes."""

import json
import re
from pathlib import Path

import pytest
import torch
from foreign import blinkdl_state_dict
from safetensors.torch import load_file, save_file

from rwkv_rev.cli import main
from rwkv_rev.conversion import convert
from rwkv_rev.equivalence import gradients, verification
from rwkv_rev.equivalence.verification import verify_directory
from rwkv_rev.loading import load_model, load_tokenizer
from rwkv_rev.reversal.fixed_point import FixedPoint

LOGITS = ("--no-reversal", "--no-gradients")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.save(blinkdl_state_dict("5.2", vocab=256), tmp_path / "source.pth")
    return convert(str(tmp_path / "source.pth"), tmp_path / "model").directory


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as left:
        main(["verify", *map(str, arguments)])
    return int(left.value.code or 0)


def flip_a_weight(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.blocks.1.time_mix.key.weight"][2, 3] *= -1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_pass_prints_a_table_and_exits_0(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(model, "--oracle", "naive", "--tokens", "40", *LOGITS) == 0
    out, err = capfd.readouterr()
    assert out.startswith(
        "RWKV-5.2, 2 layers of 32, vocabulary 256, against\n"
    )  # the path has a line of its own
    assert re.search(r"^\| tokens +\| +40 \|$", out, re.MULTILINE)
    assert all(len(line) <= 80 for line in out.splitlines() if "/" not in line)
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    sample = readme[readme.index("|                      |     rwkv") :]
    labels = [line.split("|")[1] for line in sample[: sample.index("\n\n")].splitlines()]
    assert [line.split("|")[1] for line in out.splitlines() if line.startswith("|")] == labels
    assert out.rstrip().endswith("\nPASS")
    assert err == ""


def test_fail_exits_3_and_names_the_layer(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flip_a_weight(model)
    assert run(model, "--oracle", "naive", "--tokens", "40", *LOGITS) == 3
    out, err = capfd.readouterr()
    assert "first difference: block 1 time mix" in out
    assert out.rstrip().endswith("\nFAIL")
    assert err.startswith("error: ")
    assert "model.blocks.1.time_mix.key.weight (1 of 1024 values) differs" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("damage", [False, True])
def test_json(model: Path, capfd: pytest.CaptureFixture[str], damage: bool) -> None:
    if damage:
        flip_a_weight(model)
    assert run(model, "--oracle", "naive", "--tokens", "40", "--json", *LOGITS) == (3 if damage else 0)
    document = json.loads(capfd.readouterr().out)
    assert document["passed"] is not damage
    assert document["oracles"][0]["oracle"] == "naive"
    assert set(document["oracles"][0]) == {
        "oracle",
        "tokens",
        "largest_delta",
        "mean_delta",
        "kl_nats",
        "top1_agreement",
        "bits_per_byte_original",
        "bits_per_byte_converted",
        "tolerance",
        "float64",
        "passed",
    }
    assert bool(document["divergence"]) is damage


def test_auto_keeps_stdout_to_the_document(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rwkv")
    assert run(model, "--tokens", "40", "--json", *LOGITS) == 0
    document = json.loads(capfd.readouterr().out)
    assert [row["oracle"] for row in document["oracles"]] == ["rwkv", "naive"]
    assert document["skipped"] == {"transformers": "transformers knows RWKV-4 only"}


def test_original_and_text_options(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save(blinkdl_state_dict("5.2", vocab=256), tmp_path / "b.pth")
    (tmp_path / "text").write_text("Some words.")
    arguments = [
        "--original",
        tmp_path,
        "--file",
        "b.*",
        "--text",
        tmp_path / "text",
        "--oracle",
        "naive",
        *LOGITS,
    ]
    assert run(model, *arguments) == 0
    assert "the text has 11 tokens, fewer than the 1024 asked for" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing"], 1, "is not a folder"),
        (["MODEL", "--oracle", "transformers", "--tokens", "5"], 1, "RWKV-4 only; use --oracle rwkv"),
        (["MODEL", "--text", "missing"], 1, "cannot read the text"),
        (["MODEL", "--file", "a.pth"], 1, "--original SOURCE"),
        (["MODEL", "--oracle", "other"], 2, "oracle"),
        (["MODEL", "--tokens", "0"], 2, "tokens"),
        ([], 2, "missing argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors(
    model: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert run(*[model if word == "MODEL" else word for word in arguments]) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert message in err.lower() or message in err
    if code == 1:
        assert err.startswith("error: ")
        assert err.count("\n") == 1


def test_reversal_and_gradients_run_unasked_on_small_models(
    model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(model, "--oracle", "naive", "--tokens", "20", "--context", "30", "--chunk", "8") == 0
    assert run(model, "--oracle", "naive", "--tokens", "1k", *LOGITS) == 0
    out, _ = capfd.readouterr()
    assert "reversal over 30 tokens in chunks of 8\nbit-exact at all 4 boundaries: yes" in out
    assert re.search(r"^\| 4096 +\|", out, re.MULTILINE)
    assert "gradients over 30 tokens in chunks of 8" in out
    assert "not the full gradient" in out
    assert out.rstrip().endswith("\nPASS")


def test_either_check_can_be_left_out(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [model, "--oracle", "naive", "--tokens", "20", "--context", "16", "--json"]
    assert run(*arguments, "--no-reversal") == 0
    document = json.loads(capfd.readouterr().out)
    assert document["reversal"] is None
    assert document["gradients"]["context"] == 16
    assert document["gradients"]["chunk"] == 4
    assert run(*arguments, "--reversal", "--no-gradients") == 0
    document = json.loads(capfd.readouterr().out)
    assert document["reversal"]["passed"]
    assert len(document["reversal"]["division_drift"]) == 10
    assert document["gradients"] is None


def test_large_models_are_checked_only_when_asked(
    model: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "SMALL_MODEL", 1000)
    arguments = [model, "--oracle", "naive", "--tokens", "20"]
    assert run(*arguments) == 0
    arguments += ["--context", "8"]
    assert "reversal and gradients: not checked unasked" in capfd.readouterr().out
    assert run(*arguments, "--reversal") == 0
    out = capfd.readouterr().out
    assert "bit-exact at all" in out
    assert "gradients: not checked unasked" in out


@pytest.mark.parametrize("check", ["reversal", "gradients"])
def test_a_failed_check_exits_3(
    model: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    if check == "reversal":
        honest = FixedPoint.retreat

        def off_by_one(self: FixedPoint, *arguments: object) -> FixedPoint:
            before = honest(self, *arguments)
            return FixedPoint(before.mantissa + 1, before.exponent)

        monkeypatch.setattr(FixedPoint, "retreat", off_by_one)
    else:
        monkeypatch.setattr(gradients, "AGREEMENT", 1e-18)
        monkeypatch.setattr(gradients, "GRID", 0)
    arguments = [model, "--oracle", "naive", "--tokens", "20", "--context", "24", "--chunk", "6"]
    arguments += ["--no-gradients"] if check == "reversal" else ["--no-reversal"]
    assert run(*arguments) == 3
    out, err = capfd.readouterr()
    assert out.rstrip().endswith("\nFAIL")
    assert err.count("\n") == 1
    assert {"reversal": "states do not come back to the bit", "gradients": "gradients are wrong"}[
        check
    ] in err


@pytest.mark.parametrize("option", ["--context", "--chunk"])
def test_lengths_are_positive(model: Path, capfd: pytest.CaptureFixture[str], option: str) -> None:
    assert run(model, option, "0") == 2
    assert option in capfd.readouterr().err


@pytest.fixture
def chat(model: Path, tmp_path: Path) -> Path:
    """The model with two more tokens, as ``resize_token_embeddings`` and ``save_pretrained`` make it."""
    grown = load_model(model, "cpu", torch.float32)
    grown.resize_token_embeddings(258)
    grown.save_pretrained(tmp_path / "chat")
    load_tokenizer(model).save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def test_a_model_without_an_original_is_told_how_to_be_checked(
    chat: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    capfd.readouterr()
    assert run(chat) == 1
    err = capfd.readouterr().err
    assert (
        err.count("\n") == 1
        and "does not say what it was converted from; name that with --original SOURCE, or" in err
    )
    assert err.endswith(f"check its own values, with --original {chat}\n")
    assert run(chat, "--original", tmp_path / "source.pth") == 1
    err = capfd.readouterr().err
    assert (
        "vocab_size is 256, in the converted model 258; name another original, or check its own values" in err
    )
    assert err.endswith(f"with --original {chat}\n")


@pytest.mark.parametrize("tuned", [False, True], ids=["saved", "fine-tuned"])
def test_own_values_are_not_called_an_originals(
    chat: Path, tuned: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    if tuned:
        (chat / "conversion.json").write_text('{"source": "bundled:rwkv-5.2", "finetuned": [{}]}')
    own = () if tuned else ("--original", chat)
    assert run(chat, *own, "--oracle", "naive", "--tokens", "40", *LOGITS) == 0
    out = " ".join(capfd.readouterr().out.split())
    assert "vocabulary 258, against its own values" in out and out.endswith("PASS")
    assert "| bits/token, oracle |" in out and "| bits/token, model |" in out
    assert "weights: 50 tensors, its own values; there is no other original" in out
    assert not re.search(r"\boriginal's|, original|, converted", out)
    report = verify_directory(chat, original=None if tuned else str(chat), oracle="naive", tokens=40)
    assert report.summary == f"{chat} computes what the original implementations make of its own values"
