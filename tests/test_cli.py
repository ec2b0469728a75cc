"""The command line: messages, exit codes, what goes to which stream, and that nothing is left behind."""

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import blinkdl_state_dict

from rwkv_rev.bundled import bundled_path
from rwkv_rev.cli import COMMANDS, main, stopping

Cli = Callable[..., tuple[int, str, str]]
SIZES = {"vocab": 256, "D": 32, "head_size": 8}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def save(path: Path, change: Callable[[dict[str, Any]], object] | None = None, version: str = "5.2") -> None:
    state = blinkdl_state_dict(version, **SIZES)
    if change is not None:
        change(state)
    torch.save(state, path)


def truncated(path: Path) -> None:
    save(path)
    path.write_bytes(path.read_bytes()[:-5000])


def set_value(name: str, value: float) -> Callable[[dict[str, Any]], None]:
    return lambda state: state[name].view(-1)[5].fill_(value).sum()


def rename_att(state: dict[str, Any]) -> None:
    state["blocks.0.att.time_maa_x"] = state.pop("blocks.0.att.time_mix_k")


BAD_FILES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "web page": (lambda p: p.write_text("<!DOCTYPE html><html>Not found</html>"), ("web page", "download")),
    "lfs pointer": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        ("Git-LFS pointer",),
    ),
    "empty": (lambda p: p.write_bytes(b""), ("empty",)),
    "truncated": (truncated, ("truncated or damaged",)),
    "random bytes": (lambda p: p.write_bytes(bytes(range(200, 256)) * 9), ("neither",)),
    "missing tensor": (
        lambda p: save(p, lambda s: s.pop("blocks.1.ffn.key.weight")),
        ("blocks.1.ffn.key.weight",),
    ),
    "leftover tensor": (
        lambda p: save(p, lambda s: s.update({"blocks.0.tiny_q.weight": torch.ones(2)})),
        ("blocks.0.tiny_q.weight",),
    ),
    "wrong shape": (
        lambda p: save(p, lambda s: s.update({"head.weight": torch.ones(256, 31)})),
        ("head.weight", "31"),
    ),
    "nan": (
        lambda p: save(p, set_value("blocks.1.att.value.weight", float("nan"))),
        ("att.value.weight", "NaN"),
    ),
    "infinity": (lambda p: save(p, set_value("ln_out.bias", float("-inf"))), ("ln_out.bias", "infinite")),
    "rewritten by the rwkv package": (
        lambda p: save(p, lambda s: s.update({"_strategy": "cpu fp32", "_version": 0.7})),
        ("rewritten", "original .pth"),
    ),
    "rwkv-6": (lambda p: save(p, rename_att), ("RWKV-6", "missing blocks.0.att.time_decay_w1")),
    "rwkv-8": (lambda p: save(p, lambda s: s.update({"blocks.0.rosa.x_q": torch.ones(32)})), ("RWKV-8",)),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(cli: Cli, tmp_path: Path, kind: str) -> None:
    make, words = BAD_FILES[kind]
    make(tmp_path / "bad.pth")
    code, out, err = cli("convert", "bad.pth", "--output", "deep/model")
    assert code == 1
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word in err
    assert files(tmp_path) == {"bad.pth"}
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("convert", "nothing.pth"), 1, ("nothing.pth", "does not exist")),
        (("convert", "bundled:rwkv-3"), 1, ("bundled:rwkv-4",)),
        (("convert", "https://huggingface.co/BlinkDL/rwkv-4-pile-169m"), 1, ("URL", "owner/name")),
        (("convert", "bundled:rwkv-4", "--revision", "main"), 1, ("--revision",)),
        (("convert", "bundled:rwkv-4", "--output", "taken"), 1, ("taken already exists", "--force")),
        (
            ("convert", "bundled:rwkv-4", "--output", "plain", "--force"),
            1,
            ("plain exists and is not a folder",),
        ),
        (("convert", "several"), 1, ("a.pth", "b.pth", "--file")),
        (("convert", "several", "--file", "c*"), 1, ("a.pth", "b.pth")),
        (("convert", "bundled:rwkv-4", "--tokenizer", "./no-such-folder"), 1, ("tokenizer",)),
        (("convert", "bundled:rwkv-4", "--max-shard-size", "lots"), 2, ("5GB",)),
        (("convert", "bundled:rwkv-4", "--dtype", "int8"), 2, ("int8", "bfloat16")),
        (("convert",), 2, ("SOURCE",)),
        (("convert", "bundled:rwkv-4", "--frobnicate"), 2, ("--frobnicate",)),
        (("frobnicate",), 2, ("frobnicate",)),
        (("inspect", "several", "--file", "a.pth"), 1, ("a.pth",)),
        (("export", "several", "--output", "x.pth"), 1, ("not a converted model", "rwkv-rev convert")),
        (
            ("export", "nowhere", "--output", "x.pth"),
            1,
            ("nowhere is not a folder", "rwkv-rev convert SOURCE"),
        ),
        (
            ("finetune", "bundled:rwkv-5.2", "--data", "plain", "--output", "x"),
            1,
            ("is not a folder", "make a model of it: rwkv-rev convert bundled:rwkv-5.2\n"),
        ),
        (("verify", "several/a.pth"), 1, ("make a model of it: rwkv-rev convert several/a.pth\n",)),
        (("eval", "o/n", "--data", "plain"), 1, ("make a model of it: rwkv-rev convert o/n\n",)),
        (("generate", "several", "--prompt", "a"), 1, ("convert it first: rwkv-rev convert several\n",)),
        (("verify", "a b"), 1, ("convert it first: rwkv-rev convert 'a b'\n",)),
        (("export", "several", "--to", "gguf", "--output", "x"), 2, ("gguf",)),
        (("generate", "several", "--prompt", "a"), 1, ("not a converted model",)),
        (("generate", "several", "--prompt", "a", "--top-p", "2"), 2, ("top-p",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_arguments(
    cli: Cli, tmp_path: Path, arguments: tuple[str, ...], code: int, words: tuple[str, ...]
) -> None:
    (tmp_path / "several").mkdir()
    for name in ("a.pth", "b.pth"):
        (tmp_path / "several" / name).write_bytes(b"short")
    (tmp_path / "plain").touch()
    (tmp_path / "a b").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    before = files(tmp_path)
    found, out, err = cli(*arguments)
    assert (found, out) == (code, "")
    assert code == 2 or (err.startswith("error: ") and err.count("\n") == 1)
    for word in words:
        assert word in err
    assert files(tmp_path) == before


def test_a_repository_that_cannot_be_reached(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, err = cli("convert", "nobody/nothing-here", "--dry-run")
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "nobody/nothing-here" in err
    assert files(tmp_path) == set()


def test_convert_export_inspect(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("convert", "bundled:rwkv-5.2", "--output", "model", "--no-verify")
    assert (code, err) == (0, "")
    assert "wrote model" in out and "RWKV-5.2" in out
    code, out, err = cli("export", "model", "--output", "back.pth")
    assert (code, err) == (0, "")
    original = torch.load(bundled_path("rwkv-5.2"), weights_only=True)
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert all(torch.equal(back[name], original[name]) for name in original)
    for source in ("bundled:rwkv-5.2", "model", "back.pth"):
        code, out, err = cli("inspect", source)
        assert (code, err) == (0, "")
        assert "RWKV-5.2" in out and "bfloat16" in out and "median" in out


def test_json_is_one_document_and_quiet_is_one_path(cli: Cli) -> None:
    code, out, err = cli("convert", "bundled:rwkv-4", "--no-verify", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["directory"], found["written"]) == ("rwkv-4-rev", True)
    assert found["config"]["rwkv_version"] == "4"
    assert cli("convert", "bundled:rwkv-4", "--no-verify", "--quiet", "--force") == (0, "rwkv-4-rev\n", "")
    assert json.loads(cli("inspect", "rwkv-4-rev", "--json")[1])["version"] == "4"
    assert json.loads(cli("export", "rwkv-4-rev", "--output", "a.pth", "--json")[1])["tensors"] == 114
    assert cli("export", "rwkv-4-rev", "--to", "hf", "--output", "hf", "--quiet") == (0, "hf\n", "")


def test_dry_run_lists_and_writes_nothing(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("convert", "bundled:rwkv-4", "--dry-run", "--max-shard-size", "1MB")
    assert (code, err) == (0, "")
    for expected in (
        "rwkv-4.pth",
        "2.7 MB",
        "model-00003-of-00003.safetensors",
        "RWKV-4",
        "would write rwkv-4-rev",
    ):
        assert expected in out
    assert json.loads(cli("convert", "bundled:rwkv-4", "--dry-run", "--json")[1])["written"] is False
    assert files(tmp_path) == set()


def test_convert_verifies_unless_told_not_to(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("convert", "bundled:rwkv-4", "--output", "model")
    assert (code, err) == (0, "")
    assert "PASS" in out and "naive" in out


def test_a_failed_verification_exits_3_and_leaves_nothing(
    cli: Cli, shallow: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stored weights are changed behind the converter's back."""
    from rwkv_rev import conversion

    write_shards = conversion.write_shards

    def flip_one(shards: Any, folder: Path, read: Callable[[Any], torch.Tensor], on_bytes: Any) -> None:
        def changed(entry: Any) -> torch.Tensor:
            tensor = read(entry)
            return tensor.flip(-1) if entry.source == "blocks.1.ffn.receptance.weight" else tensor

        write_shards(shards, folder, changed, on_bytes)

    monkeypatch.setattr(conversion, "write_shards", flip_one)
    monkeypatch.setattr(conversion, "VERIFY_TOKENS", 32)
    code, out, err = cli("convert", f"{shallow['4']}.pth", "--output", "model")
    assert code == 3
    assert "FAIL" in out
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "blocks.1" in err or "layer 1" in err or "block 1" in err
    assert files(tmp_path) == set()


def test_generate(cli: Cli, shallow: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("generate", shallow["4"], "--max-new-tokens", 12, "--seed", 1, "--no-stream")
    code, out, err = cli(*arguments, "--prompt", "The ")
    assert (code, err) == (0, "")
    assert out.startswith("The ") and len(out) > 8
    assert cli(*arguments, "--prompt", "The ")[1] == out
    assert cli(*arguments[:-1], "--prompt", "The ")[1] == out  # streamed
    monkeypatch.setattr(sys, "stdin", io.StringIO("The "))
    assert cli(*arguments, "--prompt", "-")[1] == out
    assert cli(*arguments, "--prompt", "The ", "--temperature", 0)[0] == 0
    assert cli(*arguments, "--prompt", "")[0] == 1
    for stdin in (io.TextIOWrapper(io.BytesIO(b"a\xff"), "utf-8"), io.StringIO("a\ud800")):
        monkeypatch.setattr(sys, "stdin", stdin)
        code, _, err = cli(*arguments, "--prompt", "-")
        assert code != 0 and "prompt" in err and "is no text" in err and err.count("\n") == 1
    code, _, err = cli(*arguments, "--prompt", "a", "--device", "abacus")
    assert code == 1 and "abacus" in err


@pytest.mark.parametrize(
    ("name", "said"), [("a/b/c", "no name of a repository"), ("me/model", "not signed in")]
)
def test_push_is_refused_before_anything_is_made(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    code, _, err = cli("convert", "bundled:rwkv-4", "--output", "model", "--push-to-hub", name)
    assert code == 1 and said in err and files(tmp_path) == set()


def test_push_uploads_the_folder_without_local_paths(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: dict[str, bytes] = {}

    class Hub:
        def create_repo(self, name: str, exist_ok: bool) -> str:
            return f"https://hub/{name}"

        def create_commit(self, name: str, operations: list[Any], commit_message: str) -> None:
            for operation in operations:
                with operation.as_file() as file:
                    uploaded[operation.path_in_repo] = file.read()

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_me")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    save(tmp_path / "mine.pth")
    code, _, err = cli("convert", "mine.pth", "--output", "model", "--no-verify", "--push-to-hub", "me/model")
    assert (code, err) == (0, "uploaded to https://hub/me/model\n")
    assert set(uploaded) == {path.name for path in (tmp_path / "model").iterdir()}
    assert json.loads(uploaded["conversion.json"])["source"] == "mine.pth"
    assert not any(str(tmp_path).encode() in content for content in uploaded.values())


def test_a_refused_upload_keeps_the_folder(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known beforehand is refused before; no right to write is known to the Hub alone."""

    class Hub:
        def create_repo(self, name: str, exist_ok: bool) -> str:
            raise OSError("403: no right to write")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_me")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    code, out, err = cli("convert", "bundled:rwkv-4", "--no-verify", "--push-to-hub", "me/model")
    assert (code, out) == (1, "")
    assert err.startswith("error: the Hub did not take me/model") and err.count("\n") == 1
    assert "rwkv-4-rev is complete" in err
    assert (tmp_path / "rwkv-4-rev" / "model.safetensors").exists()


STOPPED_AT = {
    "the command's own imports": ("rwkv_rev.cli._load", ("convert", "bundled:rwkv-4")),
    "settings": ("rwkv_rev.training.config.build_config", ("finetune", "model")),
    "data": ("rwkv_rev.cli.finetune.find_sources", ("finetune", "{model}", "--data", "x", "--output", "y")),
    "convert": ("rwkv_rev.conversion.convert", ("convert", "bundled:rwkv-4", "--output", "out")),
    "inspect": ("rwkv_rev.converters.inspection.inspect_source", ("inspect", "bundled:rwkv-4")),
    "generate": ("rwkv_rev.continuation.generate", ("generate", "{model}", "--prompt", "a")),
    "chat": ("rwkv_rev.conversation.chat", ("chat", "{model}")),
    "eval": ("rwkv_rev.training.evaluate.evaluate_directory", ("eval", "{model}", "--data", __file__)),
    "eval with a plot": (
        "rwkv_rev.training.evaluate.evaluate_directory",
        ("eval", "{model}", "--data", __file__, "--plot", "a.png"),
    ),
    "bench": ("rwkv_rev.benchmark.run.run_benchmark", ("bench", "training", "--quick")),
    "publish": ("rwkv_rev.folders.publish.publish", ("publish", "{model}", "me/model")),
}


@pytest.mark.parametrize("signal_", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("name", STOPPED_AT)
def test_one_line_whenever_a_command_is_stopped(
    cli: Cli, bundled: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, signal_: str
) -> None:
    """While it starts, too, and where it writes nothing."""

    def stop(*_: object, **__: object) -> None:
        stopping._stop(getattr(signal, signal_), None)

    place, arguments = STOPPED_AT[name]
    monkeypatch.setattr("rwkv_rev.folders.publish.refuse_unpublishable", lambda _: None)
    monkeypatch.setattr(place, stop)
    code, out, err = cli(*(argument.format(model=bundled["4"]) for argument in arguments))
    assert (code, out) == ({"SIGINT": 130, "SIGTERM": 143}[signal_], "")
    lines = err.splitlines()
    assert [line for line in lines if line] == [lines[-1]]
    if name in ("inspect", "generate", "chat", "eval", "bench"):  # which write nothing at any time
        assert lines[-1] == "stopped"
    else:
        expected = {"convert": "out is not there", "publish": "the Hub has all"}
        assert lines[-1].startswith("stopped; ") and expected.get(name, "nothing was written") in lines[-1]


def test_of_several_processes_one_speaks(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_rev.cli._load", lambda name: stopping._stop(signal.SIGTERM, None))
    monkeypatch.setenv("RANK", "1")
    assert cli("convert", "bundled:rwkv-4") == (143, "", "")


def test_tracebacks_only_on_demand(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("rwkv_rev.converters.inspection.inspect_source", broken)
    code, out, err = cli("inspect", "bundled:rwkv-4")
    assert (code, out) == (1, "")
    assert err == "error: unexpected RuntimeError: a bug (RWKV_REV_TRACEBACK=1 shows where it came from)\n"
    monkeypatch.setenv("RWKV_REV_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="a bug"):
        main(["inspect", "bundled:rwkv-4"])


@pytest.mark.parametrize("name", [name for name, _ in COMMANDS])
def test_every_command_explains_itself(cli: Cli, name: str) -> None:
    code, out, err = cli(name, "--help")
    assert (code, err) == (0, "")
    assert "Examples:" in out and f"rwkv-rev {name}" in out
    assert "list[" not in out
    for each in ("save", "load", "merge") if name == "state" else ():
        assert "list[" not in cli(name, each, "--help")[1] and f"  {each} " in out
    assert not any(line.endswith("...") for line in out.partition("\nCommands:")[2].splitlines())


@pytest.mark.parametrize("name", [name for name, _ in COMMANDS])
@pytest.mark.parametrize("columns", ["60", "80", "200"])
def test_examples_can_be_pasted(cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str, columns: str) -> None:
    """Whatever the width: a command that takes two lines says so at the end of the first, and its options are there."""
    monkeypatch.setenv("COLUMNS", columns)
    _, out, _ = cli(name, "--help")
    end = out.index("Arguments:" if "Arguments:" in out else "Options:")
    examples = out[out.index("Examples:") + len("Examples:") : end]
    assert max(map(len, examples.splitlines())) <= 80
    commands = examples.replace("\\\n", " ").split("\n")
    commands = [command.strip() for command in commands if command.strip()]
    assert len(commands) == examples.strip().count("\n\n") + 1
    for command in commands:
        words = shlex.split(command)
        assert words[0] in ("rwkv-rev", "torchrun", "accelerate") and name in words
        rest = words[words.index(name) + 1 :]
        known = cli(name, rest[0], "--help")[1] if "Commands:" in out else out
        for option in rest:
            assert not option.startswith("--") or f" {option} " in known.replace("\n", " ")


def test_help_lists_every_command(cli: Cli) -> None:
    code, out, _ = cli("--help")
    assert code == 0
    assert all(name in out for name, _ in COMMANDS)
    code, out, _ = cli("--version")
    assert code == 0 and out.strip()


def test_help_imports_nothing_heavy() -> None:
    """``rwkv-rev --help`` is instant because PyTorch and transformers stay out of it."""
    script = (
        "import sys\nfrom rwkv_rev.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    for arguments in (["--help"], ["convert", "--help"], ["--version"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=dict(os.environ)
        )
        assert done.returncode == 0
        assert done.stderr.strip() == "[]"


def run_encoded(cli: Cli, encoding: str, *arguments: object) -> tuple[int, bytes, str]:
    """As ``cli`` does, with a stdout of that encoding, which takes nothing else."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding, "strict")
    with redirect_stdout(stream):
        code, _, err = cli(*arguments)
    return code, raw.getvalue(), err


@pytest.mark.parametrize("encoding", ["latin1", "cp1252", "ascii", "utf-8"])
def test_every_text_goes_out_in_every_encoding(
    cli: Cli, shallow: dict[str, Path], tmp_path: Path, encoding: str
) -> None:
    """What the encoding does not have is escaped; JSON stays JSON."""
    name = "model-\u65e5\u672c\U0001f642"
    (tmp_path / name).symlink_to(shallow["5.2"])
    shown = name.encode(encoding, "backslashreplace")
    common = ("generate", shallow["5.2"], "--prompt", name, "--max-new-tokens", 1, "--temperature", 0)
    for arguments in (common, (*common, "--no-stream"), ("inspect", name)):
        code, out, err = run_encoded(cli, encoding, *arguments)
        assert code == 0 and shown in out, err
    code, out, err = run_encoded(cli, encoding, "inspect", name, "--json")
    assert code == 0 and json.loads(out.decode(encoding))["source"] == name, err


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes there")
def test_a_name_that_is_no_text_goes_out_as_its_bytes(
    cli: Cli, bundled: dict[str, Path], tmp_path: Path
) -> None:
    output = os.fsdecode(b"\xff.pth")
    found = run_encoded(cli, "utf-8", "export", bundled["4"], "--output", output, "--quiet")
    assert found == (0, b"\xff.pth\n", "") and (tmp_path / output).is_file()


def test_a_newline_in_a_name_ends_no_line(cli: Cli, shallow: dict[str, Path]) -> None:
    code, out, err = cli("convert", f"{shallow['4']}.pth", "--output", "a\nb/c", "--no-verify")
    assert code == 0 and "wrote a\\nb/c" in out, err
    code, out, err = cli("export", "a\nb/c", "--output", "a\nb/e.pth")
    assert code == 0 and out.startswith("a\\nb/e.pth: ") and out.count("\n") == 1, err
    code, out, err = cli(
        "verify", "a\nb/c", "--tokens", 8, "--no-reversal", "--no-gradients", "--oracle", "naive"
    )
    assert code == 0 and "a\nb" not in out, err


@pytest.mark.parametrize("columns", [40, 60])
def test_verify_fits_the_terminal(
    cli: Cli, shallow: dict[str, Path], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setattr("rwkv_rev.cli.output.width", lambda: columns)
    shutil.copy(f"{shallow['5.2']}.pth", "a.pth")  # whose path fits
    options = ("--tokens", 8, "--context", 12, "--oracle", "naive")
    code, out, err = cli("verify", shallow["5.2"], "--original", "a.pth", *options)
    assert code == 0, err
    assert [line for line in out.splitlines() if len(line) > columns] == []


def test_the_home_folder(
    cli: Cli, shallow: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``~`` in quotes is what shells make of it, in outputs and models as in sources and data."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    (home / "book.txt").write_text("text " * 20)
    monkeypatch.setattr("rwkv_rev.training.saving.has_matplotlib", lambda: False)
    for arguments in (
        ("convert", f"{shallow['4']}.pth", "--output", "~/c", "--no-verify"),
        ("export", "~/c", "--output", "~/e.pth"),
        ("inspect", "~/e.pth"),
        ("inspect", "~/c"),
        (
            *("verify", "~/c", "--original", "~/e.pth", "--oracle", "naive", "--tokens", 8),
            *("--no-reversal", "--no-gradients"),
        ),
        ("generate", "~/c", "--prompt", "~/c", "--max-new-tokens", 1),
        ("eval", "~/c", "--data", "~/book.txt", "--device", "cpu"),
        (
            *("finetune", "~/c", "--data", "~/book.txt", "--output", "~/f", "--device", "cpu"),
            *("--max-steps", 1, "--context-length", 16, "--chunk-length", 6),
        ),
    ):
        code, out, err = cli(*arguments)
        assert code == 0, err
        assert arguments[0] != "generate" or out.startswith("~/c")
    assert (home / "c").is_dir() and (home / "e.pth").is_file() and (home / "f").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes there")
def test_folders_named_by_other_bytes_than_utf8(cli: Cli, bundled: dict[str, Path], tmp_path: Path) -> None:
    folder = os.fsdecode(b"\xff")
    shutil.copytree(bundled["4"], tmp_path / folder)
    for arguments in (("inspect", folder), ("generate", folder, "--prompt", "a")):
        code, out, err = cli(*arguments)
        assert (code, out) == (1, "") and "this name is no UTF-8" in err and "damaged" not in err
        assert err.count("\n") == 1
    code, out, err = cli("convert", "bundled:rwkv-4", "--output", os.fsdecode(b"\xfe"))
    assert (code, out) == (1, "") and "this name is no UTF-8" in err and err.count("\n") == 1


def test_a_kernel_that_is_none_is_found_before_the_prompt_is_printed(
    cli: Cli, bundled: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RWKV_REV_KERNEL", "nonsense")
    code, out, err = cli("generate", bundled["4"], "--prompt", "some prompt")
    assert (code, out) == (1, "") and "no wkv kernel is called 'nonsense'" in err


def test_nothing_is_written_into_a_model(cli: Cli, bundled: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("text " * 100)
    output = bundled["4"] / "x"
    for more in ((), ("--dry-run",)):
        code, out, err = cli("finetune", bundled["4"], "--data", "book.txt", "--output", output, *more)
        assert (code, out) == (1, "") and "is inside the model's folder; choose another --output" in err
    assert not output.exists() and not output.with_name("x.training").exists()


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize(
    "arguments",
    [
        ("finetune", "model", "--data", "book.txt"),
        ("export", "model", "--to", "hf"),
        ("convert", "model"),
        ("convert", "model/model.safetensors"),
        ("merge", "model", "book.txt"),
        ("adapter", "model", "book.txt", "--to", "peft"),
        ("state", "load", "model", "book.txt"),
    ],
    ids=lambda value: " ".join(value[:2]),
)
def test_force_is_not_advised_where_it_replaces_nothing(
    cli: Cli, bundled: dict[str, Path], tmp_path: Path, arguments: tuple[str, ...], force: tuple[str, ...]
) -> None:
    """A model is never replaced by what is made of it, so nobody is told to ask for that."""
    shutil.copytree(bundled["4"], tmp_path / "model")
    (tmp_path / "book.txt").write_text("text " * 100)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    code, out, err = cli(*arguments, "--output", "model", *force)
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert " holds the " in err and "--force" not in err and err.endswith("choose another --output\n")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_a_dry_run_refuses_where_nothing_can_be_written(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that is read-only."""
    monkeypatch.setattr("rwkv_rev.folders.safe_output.os.access", lambda *_: False)
    for more in ((), ("--dry-run",)):
        code, out, err = cli("convert", "bundled:rwkv-4", "--output", "deep/model", *more)
        assert (code, out) == (1, "") and "no permission to write in" in err


def test_a_stop_that_nobody_hears_comes_again() -> None:
    """Raised in a destructor, an exception is told of by Python and forgotten."""
    program = """
import os, signal, sys, time
from rwkv_rev.cli.stopping import install_handlers
install_handlers()

class Held:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            pass

held = Held()
del held
for _ in range(500):  # what another thread raises wakes nobody
    time.sleep(0.01)
print("it went on")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "")


@pytest.mark.parametrize("signal_", ["SIGTERM", "SIGINT"])
def test_a_stop_is_heard_before_anything_heavy_is_imported(signal_: str) -> None:
    """typer alone takes as long as Python's own start."""
    program = f"""
import os, signal, sys

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.{signal_})

sys.meta_path.insert(0, Stop())
from rwkv_rev.cli import main
main(["inspect", "bundled:rwkv-4"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    code = 128 + int(getattr(signal, signal_))
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "stopped\n")
