"""Arguments of public functions: other kinds are refused by name, before anything is read or written."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

import rwkv_rev
from rwkv_rev.arguments import checked
from rwkv_rev.benchmark.settings import BenchSettings
from rwkv_rev.bptt_settings import BpttSettings
from rwkv_rev.errors import ConfigError, DataError, OutputError, RwkvRevError, SourceError, StrategyError
from rwkv_rev.training.config import FinetuneConfig


@checked
def anything(
    path: str | Path = "a",
    *,
    text: str | Path | None = None,
    count: int = 1,
    share: float = 0.5,
    wanted: bool | None = False,
    lengths: tuple[int, ...] = (1,),
    data: str | Path | Sequence[str | Path] = (),
    to: Literal["a", "b"] = "a",
    call: Callable[[str], object] = print,
    device: torch.device | None = None,
    **settings: Any,
) -> str:
    """What is checked."""
    return f"{path}"


def plain(value: object) -> str:
    """A name that is the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


@pytest.mark.parametrize(
    "given",
    [
        {"path": Path("x"), "text": ""},
        {"text": "a\0"},
        {"count": np.int64(3), "share": 1, "wanted": None},
        {"share": np.float32(0.1), "lengths": (), "data": ["a", Path("b")]},
        {"data": ("a",), "call": len, "device": torch.device("cpu"), "more": object()},
        {"to": "c"},  # of the right kind: what it says is the function's own affair
    ],
    ids=plain,
)
def test_right_kinds(given: dict[str, Any]) -> None:
    assert anything(**given) == str(given.get("path", "a"))
    assert anything.__doc__ == "What is checked." and anything.__name__ == "anything"


PATHS = (None, 3, b"a", [], float("nan"), {}, "", "\0", "a\0b", "\ud800")
WRONG = [
    *({"path": value} for value in PATHS),
    *({"text": value} for value in (3, b"x")),
    *({"count": value} for value in ("x", 1.5, None, True, 10**30, float("nan"))),
    *({"share": value} for value in ("x", None, True, 1j)),
    *({"wanted": value} for value in ("no", 0, 1, "")),
    *({"lengths": value} for value in (64, [64], ("a",), (True,))),
    *({"data": value} for value in (None, b"a", [3], {"a": 1})),
    *({"to": value} for value in (None, 3)),
    *({"call": value} for value in (None, "print")),
    {"device": "cpu"},
]


@pytest.mark.parametrize("given", WRONG, ids=plain)
def test_wrong_kinds(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(
        ConfigError, match=rf"^{name} (= .* (must|holds|is no text)|is a number of more)"
    ) as error:
        anything(**given)
    assert "\n" not in str(error.value) and error.value.exit_code == 2


def test_what_a_message_says() -> None:
    for given, message in (
        ({"path": None}, "path = None must be a text or a path"),
        ({"path": ""}, "path = '' must name something"),
        ({"wanted": "no"}, "wanted = 'no' must be True or False or None"),
        ({"lengths": 64}, "lengths = 64 must be a tuple (a whole number each)"),
        ({"data": 3}, "data = 3 must be a text or a path or a list (a text or a path each)"),
        ({"to": 3}, "to = 3 must be one of 'a', 'b'"),
    ):
        with pytest.raises(ConfigError) as error:
            anything(**given)  # type: ignore[arg-type]
        assert str(error.value) == message
    with pytest.raises(TypeError, match=r"missing|unexpected|too many"):
        anything("a", "b")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "given", "near"),
    [
        (rwkv_rev.verify, {"tokns": 8}, "did you mean tokens?"),
        (rwkv_rev.convert, {"zzz": 8}, "it takes source, output"),
        (rwkv_rev.evaluate, {"batchsize": 8}, "did you mean batch_size?"),
        (rwkv_rev.bench, {"setings": 8}, "did you mean settings?"),
        (BenchSettings, {"chunk_length": 8}, "did you mean chunk_lengths?"),
        (BpttSettings, {"stratgy": "full"}, "did you mean strategy?"),
        (FinetuneConfig, {"contextlength": 8}, "did you mean context_length?"),
        (FinetuneConfig, {"learning_rate": 8}, "did you mean lr?"),
    ],
)
def test_wrong_names_get_the_nearest(make: Any, given: dict[str, Any], near: str) -> None:
    (name,) = given
    with pytest.raises(
        TypeError, match=rf"\(\) got an unexpected keyword argument '{name}'; {re.escape(near)}"
    ):
        make(**given)


def test_wrong_names_of_a_model(bundled: dict[str, Path]) -> None:
    model = rwkv_rev.RwkvRevForCausalLM.from_pretrained(bundled["4"])
    with pytest.raises(TypeError, match=r"set_bptt\(\) got .* 'chunklength'; did you mean chunk_length\?"):
        model.set_bptt("full", chunklength=8)  # type: ignore[call-arg]
    for part in (model, model.model):
        with pytest.raises(
            TypeError, match=r"initial_state\(\) got .* 'batchsize'; did you mean batch_size\?"
        ):
            part.initial_state(batchsize=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("value", PATHS, ids=plain)
def test_every_function_refuses_what_is_no_path(
    bundled: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    model = bundled["4"]
    (tmp_path / "book.txt").write_text("text " * 100)
    for call in (
        lambda: rwkv_rev.inspect(value),
        lambda: rwkv_rev.convert(value, "out"),
        lambda: rwkv_rev.verify(value),
        lambda: rwkv_rev.evaluate(value, "book.txt"),
        lambda: rwkv_rev.generate(value, "a"),
        lambda: rwkv_rev.export(value, "out.pth"),
        lambda: rwkv_rev.export(model, value),
        lambda: rwkv_rev.publish(value, "me/model"),
        lambda: rwkv_rev.finetune(value, "book.txt", "out"),
        lambda: rwkv_rev.finetune(model, "book.txt", value),
        *(
            ()
            if value == []
            else (
                lambda: rwkv_rev.finetune(model, value, "out"),
                lambda: rwkv_rev.evaluate(model, value),
            )
        ),
        *(() if value is None else (lambda: rwkv_rev.evaluate(model, "book.txt", cache_dir=value),)),
    ):
        with pytest.raises(ConfigError) as error:
            call()
        assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["book.txt"]  # noqa: PTH208


@pytest.mark.parametrize(
    ("function", "given"),
    [
        *(("evaluate", {"batch_size": value}) for value in (0, -1, "x", 1.5, True)),
        *(("evaluate", {"max_tokens": value}) for value in (-1, "x", 1.5)),
        ("evaluate", {"cache_dir": ""}),
        *(("generate", {"device": value}) for value in (None, 3)),
        *(
            ("generate", {"prompt": value}) for value in ("\ud800", "a\udcff")
        ),  # half a character, a byte of none
        ("generate", {"max_new_tokens": 10**30}),
        ("generate", {"max_new_tokens": 2**41}),
        *(("verify", {"text": value}) for value in (3, b"x")),
        *(("verify", {"tokens": value}) for value in ("x", None, 1.5, 3, 2, 1, 0, 10**15)),
        *(("verify", {"context": value}) for value in ("x", 3, 1, True)),
        *(("verify", {"chunk": value}) for value in ("x", 0)),
        *(("verify", {"original": value}) for value in (3, "", "\ud800")),
        ("verify", {"text": "\ud800"}),
        *(("convert", {name: ""}) for name in ("file", "revision", "dtype", "tokenizer")),
        *(("evaluate", {name: ""}) for name in ("text_field", "dtype", "device")),
        *(("verify", {name: "no"}) for name in ("reversal", "gradients", "progress")),
        *(("convert", {name: "no"}) for name in ("verify", "force", "dry_run")),
        *(("inspect", {name: value}) for name, value in (("file", []), ("revision", 3))),
        *(("bench", {"kind": value}) for value in ("zz", 3, None)),
        ("bench", {"settings": None}),
    ],
    ids=plain,
)
def test_arguments_of_other_kinds(
    bundled: dict[str, Path], tmp_path: Path, function: str, given: Any
) -> None:
    (tmp_path / "book.txt").write_text("text " * 100)
    usual: dict[str, dict[str, Any]] = {
        "evaluate": {"directory": bundled["4"], "data": tmp_path / "book.txt"},
        "generate": {"directory": bundled["4"], "prompt": "a"},
        "verify": {"directory": bundled["4"], "oracle": "naive"},
        "convert": {"source": "bundled:rwkv-4", "output": tmp_path / "out"},
        "inspect": {"source": bundled["4"]},
        "bench": {"kind": "convert", "settings": BenchSettings("bundled:rwkv-4")},
    }
    (name,) = given
    with pytest.raises(ConfigError, match=f"^{name} "):
        getattr(rwkv_rev, function)(**usual[function] | given)
    assert not (tmp_path / "out").exists()


def test_what_would_be_ignored_is_refused(bundled: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("text " * 100)
    with pytest.raises(SourceError, match="choose from several checkpoints"):
        rwkv_rev.inspect(bundled["4"], file="a.pth")
    with pytest.raises(OutputError, match="'abc' is not a size"):
        rwkv_rev.export(bundled["4"], tmp_path / "x.pth", max_shard_size="abc")
    with pytest.raises(OutputError, match="'abc' is not a size"):
        rwkv_rev.convert("bundled:rwkv-4", tmp_path / "out", max_shard_size="abc")
    with pytest.raises(DataError, match="a field 'zz' was named, but none of the data has fields"):
        rwkv_rev.evaluate(bundled["4"], tmp_path / "book.txt", text_field="zz")
    with pytest.raises(DataError, match="a field 'zz' was named, but none of the data has fields"):
        rwkv_rev.finetune(bundled["4"], tmp_path / "book.txt", tmp_path / "out", text_field="zz")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("lr", value) for value in ("1e-4", "", True, [], 1j)),
        *(("context_length", value) for value in ("16k", "64", 64.0, 2**70)),
        *(("max_steps", value) for value in ("3", 3.5, True)),
        *(("pack", value) for value in ("yes", 1)),
        *(
            (name, "")
            for name in ("push_to_hub", "resume", "cache_dir", "device", "tune", "end_token", "text_field")
        ),
        *(("lora_targets", value) for value in ("key", [3], [""])),
        *(("eval_data", value) for value in (3, [b"a"], [""])),
        *(("device", value) for value in (3, "\ud800")),
    ],
)
def test_settings_of_other_kinds(bundled: dict[str, Path], tmp_path: Path, name: str, value: Any) -> None:
    """From Python a number is a number: texts that read as one are for files and options."""
    (tmp_path / "book.txt").write_text("text " * 100)
    with pytest.raises(ConfigError, match=f"^{name} ") as error:
        rwkv_rev.finetune(bundled["4"], tmp_path / "book.txt", tmp_path / "out", **{name: value})
    assert "\n" not in str(error.value) and sorted(os.listdir(tmp_path)) == ["book.txt"]  # noqa: PTH208


def test_settings_of_like_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy's numbers, paths, tuples and None are taken as what they mean."""
    seen: list[FinetuneConfig] = []
    monkeypatch.setattr("rwkv_rev.training.finetune.run", lambda config, **_: seen.append(config))
    given: dict[str, Any] = {"lr": np.float32(0.5), "seed": np.int64(3), "epochs": 2, "max_steps": None}
    rwkv_rev.finetune("m", (tmp_path,), Path("o"), eval_data=tmp_path / "a", lora_targets=("key",), **given)
    (config,) = seen
    assert (config.lr, config.seed, config.epochs, config.max_steps) == (0.5, 3, 2.0, None)
    assert (config.data, config.output, config.lora_targets) == ([str(tmp_path)], "o", ["key"])
    assert config.eval_data == [str(tmp_path / "a")] and type(config.seed) is int


@pytest.mark.parametrize("given", [{"context": 8}, {"chunk": 8}])
def test_settings_of_checks_that_do_not_run(
    bundled: dict[str, Path], monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    with pytest.raises(
        ConfigError, match="= 8 is without effect: neither reversal=True nor gradients=True is"
    ):
        rwkv_rev.verify(bundled["4"], **given)
    monkeypatch.setattr("rwkv_rev.equivalence.verification.SMALL_MODEL", 1)
    with pytest.raises(ConfigError, match="is without effect"):
        rwkv_rev.verify(bundled["4"], **given, reversal=None, gradients=None)


def test_settings_without_effect(bundled: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(
        ConfigError, match=r"max_shard_size = 1GB is without effect on a .pth, .* export to='hf'"
    ):
        rwkv_rev.export(bundled["4"], out, max_shard_size="1GB")
    with pytest.raises(
        ConfigError, match=r"group_norm_eps = 1e-05 is without effect: RWKV-4 has no GroupNorm"
    ):
        rwkv_rev.convert("bundled:rwkv-4", out, group_norm_eps=1e-5)
    with pytest.raises(ConfigError, match=r"top_p = 0.7 is without effect at temperature = 0"):
        rwkv_rev.generate(bundled["4"], "a", temperature=0, top_p=0.7)
    assert not out.exists()
    assert rwkv_rev.export(bundled["4"], out, to="hf", max_shard_size="1GB").path == out


@pytest.mark.parametrize("name", ["../x", "a/b/c", "a b", "x" * 5000, "a\n", "-a/b"])
def test_publish_refuses_the_name_first(bundled: dict[str, Path], name: str) -> None:
    with pytest.raises(OutputError, match="is no name of a repository, such as owner/name") as error:
        rwkv_rev.publish(bundled["4"], name)
    assert "rwkv-rev publish" not in str(error.value) and len(str(error.value)) < 600


def test_publish_refuses_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is not a folder"):
        rwkv_rev.publish(tmp_path / "absent", "me/model")
    with pytest.raises(RwkvRevError, match="too long"):
        rwkv_rev.publish("x" * 5000, "me/model")


@pytest.mark.parametrize("text", ["a", "ab", "abc"])
def test_a_text_of_few_tokens_proves_nothing(bundled: dict[str, Path], text: str) -> None:
    with pytest.raises(DataError, match=r"the text has .* tokens?; at least 4 prove something"):
        rwkv_rev.verify(bundled["4"], oracle="naive", text=text)


def test_a_context_of_one_chunk_proves_nothing(bundled: dict[str, Path]) -> None:
    """No border between chunks is compared, whichever of the three is too short or too long."""
    usual: dict[str, Any] = {"oracle": "naive", "tokens": 8}
    for given, message in (
        (
            {"reversal": True, "context": 8, "chunk": 8},
            "in the 8 tokens that .* of reversal reads; use at most 7",
        ),
        (
            {"gradients": True, "chunk": 600},
            "in the 512 tokens that the check of gradients reads; use at most 511",
        ),
        (
            {"reversal": True, "text": "a text", "chunk": 6},
            "in the 6 tokens .* use at most 5, or a longer context",
        ),
    ):
        with pytest.raises(
            ConfigError, match=f"chunk = .* leaves no border between chunks to compare {message}"
        ):
            rwkv_rev.verify(bundled["4"], **usual | given)
    assert rwkv_rev.verify(bundled["4"], **usual, reversal=True, context=8, chunk=7).passed


@pytest.mark.parametrize(
    "given",
    [
        {"device": "cpu"},
        {"dtype": "float32"},
        {"lengths": 64},
        {"lengths": ("a",)},
        {"shape": 3},
        {"repeats": 1.5},
        {"repeats": 0},
        {"batch_size": 0},
        {"memory_limit": -1},
        {"lora_rank": -1},
        {"command": None},
    ],
    ids=plain,
)
def test_bench_settings(given: Any) -> None:
    (name,) = given
    with pytest.raises(ConfigError, match=f"^{name} = "):
        BenchSettings(**given)


@pytest.mark.parametrize("chunk_length", [1.5, 2**70, True, 0, -1, "8", None, float("nan")])
def test_chunk_lengths(chunk_length: Any) -> None:
    with pytest.raises(StrategyError, match=r"^chunk_length = .* must be a whole number"):
        BpttSettings(chunk_length=chunk_length)


@pytest.mark.parametrize("tape_dir", ["/no/such/folder", "", 3, "\0", b"a", __file__])
def test_tape_folders(tape_dir: Any) -> None:
    """Found when they are set, not at the first loss."""
    with pytest.raises(StrategyError, match=r"^tape_dir = .* is no folder that can be written to"):
        BpttSettings(tape_dir=tape_dir)
