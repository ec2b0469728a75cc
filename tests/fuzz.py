"""Mutations of every kind of file that the commands read, and one call of the command line on each.

A format knows how to lay down a whole input, how to damage it, and which commands read it. Everything is derived from
``random.Random(f"{format} {number}")``: a number names a mutation for good.
"""

import contextlib
import io
import json
import random
import shutil
import signal
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from foreign import blinkdl_state_dict, hf_config, hf_state_dict
from safetensors.torch import save_file

from rwkv_rev.cli import main

SECONDS = 10
SIZES: dict[str, Any] = {"vocab": 256, "D": 32, "head_size": 8}
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 8, 255, 256, 2**31, 2**63, -(2**63), 10**12, 10**300),
    *(0.0, -0.0, 1e-5, 0.5, -1.5, 1e200, 1e308, 1e-320, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        "a",
        "4",
        "5.2",
        "head.weight",
        "../../etc/passwd",
        "/dev/zero",
        "\x1b[2J",
        "a\nb",
        "\u202e",
        "\ud800",
    ),
    *("float32", "bfloat16", "int8", "auto", "none", "x" * 10_000, "rwkv_rev", "rwkv5", "model.safetensors"),
    *([], [[]], {}, {"a": {}}, [1, 2], [0, 8], [8, 0], [-1], [2**62, 2**62], ["a"], {"0": "a"}),
)
TOKENS = (b"\0", b"\xff" * 8, b"\x7f\xff\xff\xff", b"\x80\x02}", b"PK\x05\x06", b'{"', b"}" * 40, b"[" * 3000)


class TooLong(BaseException):
    """A command took more than :data:`SECONDS`."""


# --- damage ---------------------------------------------------------------------------------------------------------


def damage_bytes(data: bytes, rng: random.Random, *, near: int | None = None) -> bytes:
    """One to four changes of a few bytes, in the first ``near`` bytes if given."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        reach = max(1, min(near or len(found), len(found)))
        at = rng.randrange(reach)
        length = rng.choice((1, 2, 8, 64, 1000))
        kind = rng.randrange(8)
        if kind < 2 and found:
            found[min(at, len(found) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 2:
            found[at : at + length] = rng.randbytes(length)
        elif kind == 3:
            del found[at : at + length]
        elif kind == 4:
            found[at:at] = rng.choice(TOKENS)
        elif kind == 5:
            found[at : at + length] = bytes(length)
        elif kind == 6:
            found[at:at] = found[at : at + length]
        else:
            del found[rng.randrange(len(found) + 1) :]
    return bytes(found)


def damage_value(value: Any, rng: random.Random) -> Any:
    """A JSON value with one part replaced, removed, renamed or put in twice."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        found = dict(value)
        kind = rng.randrange(8)
        if kind == 0:
            del found[key]
        elif kind == 1:
            found[str(rng.choice(VALUES))] = found.pop(key)
        elif kind == 2:
            found[str(rng.choice(VALUES))] = rng.choice(VALUES)
        else:
            found[key] = damage_value(value[key], rng)
        return found
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], damage_value(value[at], rng), *value[at + rng.randrange(2) :]]
    return rng.choice(VALUES)


def damage_json(text: bytes, rng: random.Random) -> bytes:
    kind = rng.random()
    if kind < 0.2:
        return damage_bytes(text, rng)
    if kind < 0.23:
        return rng.choice((b'{"a":', b"[")) * rng.choice((500, 20_000))
    value = json.loads(text)
    for _ in range(rng.choice((1, 1, 2, 5))):
        value = damage_value(value, rng)
    return json.dumps(value).encode()


def damage_safetensors(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.4:
        return damage_bytes(data, rng, near=8 + length)
    header = damage_json(data[8 : 8 + length], rng)
    said = len(header) if rng.random() < 0.9 else rng.choice((0, 2**31, 2**63 - 1, len(header) + 1))
    return said.to_bytes(8, "little") + header + data[8 + length :]


def damage_pth(data: bytes, rng: random.Random) -> bytes:
    """The bytes of the file, or the pickle in it under a checksum that is right again."""
    if not data.startswith(b"PK"):
        return damage_bytes(data, rng, near=rng.choice((200, 5000, len(data))))
    if rng.random() < 0.5:
        return damage_bytes(data, rng, near=rng.choice((None, 1000, 10_000)))
    source, target = io.BytesIO(data), io.BytesIO()
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(target, "w") as changed:
        for info in whole.infolist():
            content, name = whole.read(info), info.filename
            if name.endswith("data.pkl"):
                content = damage_bytes(content, rng, near=rng.choice((None, 100)))
            elif rng.random() < 0.02:
                content, name = rng.choice(((content[:3], name), (content, name + "x"), (b"", name)))
            changed.writestr(name, content, zipfile.ZIP_DEFLATED if rng.random() < 0.001 else None)
    return target.getvalue()


def damage_idx(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return damage_bytes(data, rng, near=rng.choice((34, len(data))))
    found = bytearray(data)
    at = rng.randrange(9, len(data) - 8)
    number = rng.choice((0, 1, -1, 2**31, 2**61, 2**63 - 1, -(2**63), 7))
    found[at : at + 8] = struct.pack("<q", number)
    return bytes(found)


def damage_lines(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return damage_bytes(data, rng)
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = damage_json(lines[at], rng)
    return b"\n".join(lines) + b"\n"


def damage_yaml(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        return damage_bytes(data, rng)
    values = damage_value(yaml.safe_load(data), rng)
    try:
        return yaml.safe_dump(values).encode("utf-8", "surrogatepass")
    except yaml.YAMLError:
        return damage_bytes(data, rng)


# --- formats --------------------------------------------------------------------------------------------------------

READERS = (
    ("inspect", "model"),
    ("export", "model", "--output", "out.pth"),
    ("export", "model", "--to", "hf", "--output", "out"),
    ("generate", "model", "--prompt", "a", "--max-new-tokens", "1"),
    ("eval", "model", "--data", "text.txt", "--context-length", "8", "--max-tokens", "8"),
    ("finetune", "model", "--data", "text.txt", "--output", "out", "--context-length", "8", "--dry-run"),
    ("verify", "model", "--oracle", "naive", "--tokens", "4", "--no-reversal", "--no-gradients"),
)
CONVERTERS = (
    ("convert", "source", "--output", "out", "--no-verify"),
    ("convert", "source", "--output", "out", "--dry-run"),
    ("inspect", "source"),
)
DATA_READERS = (
    ("eval", "model", "--data", "DATA", "--context-length", "8", "--max-tokens", "8"),
    ("finetune", "model", "--data", "DATA", "--output", "out", "--context-length", "8", "--dry-run"),
)

STATE_READERS = (
    ("state", "save", "DATA", "--output", "out.st", "--to", "web-rwkv"),
    ("state", "load", "model", "DATA", "--output", "out"),
    ("state", "merge", "DATA", "DATA", "--output", "out.pth"),
    ("generate", "model", "--prompt", "a", "--max-new-tokens", "1", "--state", "DATA"),
)
ADAPTER_READERS = (
    ("merge", "model", "DATA", "--output", "out"),
    ("adapter", "model", "DATA", "--output", "out.pth"),
    ("adapter", "model", "DATA", "--to", "peft", "--output", "out"),
)


@dataclass(frozen=True)
class Format:
    """``lay`` writes a whole input below a folder and says which file is to be damaged."""

    lay: Callable[[Path], Path]
    damage: Callable[[bytes, random.Random], bytes]
    commands: tuple[tuple[str, ...], ...]
    keeps_values: bool = False


def _model(file: str) -> Callable[[Path], Path]:
    return lambda folder: folder / "model" / file


def _pth(zipped: bool) -> Callable[[Path], Path]:
    def lay(folder: Path) -> Path:
        torch.save(
            blinkdl_state_dict("5.2", **SIZES), folder / "s.pth", _use_new_zipfile_serialization=zipped
        )
        return folder / "s.pth"

    return lay


def _source(file: str) -> Callable[[Path], Path]:
    def lay(folder: Path) -> Path:
        source = folder / "source"
        source.mkdir()
        state = hf_state_dict("5.2", **SIZES)
        (source / "config.json").write_text(json.dumps(hf_config("5.2", **SIZES)))
        if file != "model.safetensors.index.json":
            save_file(state, source / "model.safetensors")
            return source / file
        names = list(state)
        index = {name: f"model-{1 + (i > 30):05}-of-00002.safetensors" for i, name in enumerate(names)}
        for shard in set(index.values()):
            save_file({name: state[name] for name in names if index[name] == shard}, source / shard)
        (source / file).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
        return source / file

    return lay


def _binidx(folder: Path) -> Path:
    lengths, pieces = [3, 9, 5], 3
    ids = np.arange(sum(lengths), dtype="<u2")
    ids.tofile(folder / "data.bin")
    starts = np.cumsum([0, *lengths[:-1]]) * 2
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, pieces, pieces + 1)
    body = np.array(lengths, "<i4").tobytes() + starts.astype("<i8").tobytes()
    (folder / "data.idx").write_bytes(header + body + np.arange(pieces + 1, dtype="<i8").tobytes())
    return folder / "data.idx"


def _jsonl(folder: Path) -> Path:
    rows = [{"text": f"line {i}", "n": i, "more": [1, {"a": None}]} for i in range(4)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "data.jsonl"


def _json(folder: Path) -> Path:
    (folder / "data.json").write_text(json.dumps([{"text": f"line {i}", "n": [i]} for i in range(4)]))
    return folder / "data.json"


def _csv(folder: Path) -> Path:
    (folder / "data.csv").write_text('n,text\n1,some words\n2,"more, of\nthem"\n3,the last\n')
    return folder / "data.csv"


def _yaml(folder: Path) -> Path:
    settings = {
        "model": "model",
        "data": ["text.txt"],
        "output": "out",
        "context_length": 8,
        "chunk_length": 4,
        "lr": "1e-4",
        "epochs": 1,
        "bptt": "reversible",
        "seed": 1,
        "tune": "lora",
        "lora_rank": 2,
        "lora_targets": ["key"],
        "eval_data": ["text.txt"],
        "end_token": "auto",
        "batch_size": 1,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder / "run.yaml"


def _sizes(folder: Path) -> tuple[int, int, int]:
    """L, H and N of the model beside."""
    config = json.loads((folder / "model" / "config.json").read_text())
    return config["num_hidden_layers"], config["num_attention_heads"], config["head_size"]


def _state(name: str) -> Callable[[Path], Path]:
    def lay(folder: Path) -> Path:
        layers, heads, size = _sizes(folder)
        state = {f"blocks.{i}.att.time_state": torch.ones(heads, size, size).half() for i in range(layers)}
        if name.endswith(".st"):
            save_file(state, folder / name, {"format": "pt", "rwkv_version": "5.2"})
        else:
            _save(state, folder / name, rwkv_version="5.2")
        return folder / name

    return lay


def _lora(folder: Path) -> Path:
    layers, heads, size = _sizes(folder)
    shapes = {"lora_A": (2, heads * size), "lora_B": (heads * size, 2)}
    state = {
        f"blocks.{i}.att.key.{n}": torch.ones(shape) for i in range(layers) for n, shape in shapes.items()
    }
    _save(state, folder / "lora.pth", lora_alpha="4.0")
    return folder / "lora.pth"


def _save(state: dict[str, torch.Tensor], path: Path, **metadata: str) -> None:
    ordered = OrderedDict(state)
    vars(ordered)["_metadata"] = metadata
    torch.save(ordered, path)


def _peft(folder: Path) -> Path:
    _, heads, size = _sizes(folder)
    (folder / "adapter").mkdir()
    where = "base_model.model.model.blocks.0.time_mix.key."
    state = {"lora_A.weight": torch.ones(2, heads * size), "lora_B.weight": torch.ones(heads * size, 2)}
    save_file(
        {where + name: tensor for name, tensor in state.items()},
        folder / "adapter" / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["key"], "use_rslora": False,
                "alpha_pattern": {"time_mix.key": 3}, "rank_pattern": {}, "bias": "none"}  # fmt: skip
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    return folder / "adapter" / "adapter_config.json"


def _reading(name: str, commands: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(name if word in ("DATA", "source") else word for word in line) for line in commands)


FORMATS: dict[str, Format] = {
    "config.json": Format(_model("config.json"), damage_json, READERS),
    "config.json of a source": Format(_source("config.json"), damage_json, CONVERTERS),
    "conversion.json": Format(_model("conversion.json"), damage_json, READERS),
    "generation_config.json": Format(_model("generation_config.json"), damage_json, READERS[3:6]),
    "tokenizer_config.json": Format(_model("tokenizer_config.json"), damage_json, READERS[3:]),
    "index.json": Format(_source("model.safetensors.index.json"), damage_json, CONVERTERS),
    "safetensors": Format(_model("model.safetensors"), damage_safetensors, READERS),
    "safetensors of a source": Format(_source("model.safetensors"), damage_safetensors, CONVERTERS),
    ".pth": Format(_pth(True), damage_pth, _reading("s.pth", CONVERTERS)),
    ".pth, bytes": Format(_pth(True), damage_bytes, _reading("s.pth", CONVERTERS[:1]), keeps_values=True),
    ".pth before 1.6": Format(_pth(False), damage_pth, _reading("s.pth", CONVERTERS)),
    "state": Format(_state("s.pth"), damage_pth, _reading("s.pth", STATE_READERS)),
    "state of web-rwkv": Format(_state("s.st"), damage_safetensors, _reading("s.st", STATE_READERS)),
    "adapter": Format(_lora, damage_pth, _reading("lora.pth", ADAPTER_READERS)),
    "adapter_config.json": Format(_peft, damage_json, _reading("adapter", ADAPTER_READERS)),
    "binidx": Format(_binidx, damage_idx, _reading("data.idx", DATA_READERS)),
    "jsonl": Format(_jsonl, damage_lines, _reading("data.jsonl", DATA_READERS)),
    "json": Format(_json, damage_json, _reading("data.json", DATA_READERS)),
    "csv": Format(_csv, damage_bytes, _reading("data.csv", DATA_READERS)),
    "YAML": Format(_yaml, damage_yaml, (("finetune", "--config", "run.yaml", "--dry-run"),)),
}


# --- one mutation ----------------------------------------------------------------------------------------------------


def run(arguments: tuple[str, ...]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line in this process; TooLong after :data:`SECONDS`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _alarm():
        try:
            main(arguments)
        except SystemExit as left:
            return int(left.code or 0), out.getvalue(), err.getvalue()
    raise AssertionError("main always leaves")


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    if not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: object) -> None:
        raise TooLong

    former = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def prepare(kind: str, folder: Path, model: Path) -> Path:
    """Lay down the whole input of a format, beside a converted model and a text; which file of it is to be damaged."""
    shutil.copytree(model, folder / "model")
    (folder / "text.txt").write_text("some text " * 20)
    return FORMATS[kind].lay(folder).relative_to(folder)


def mutate(kind: str, number: int, whole: Path, file: Path, place: Path) -> tuple[bool, str]:
    """One damaged input and one command on it, in ``place``: whether it was refused, and what is wrong, if anything."""
    rng = random.Random(f"{kind} {number}")
    this = FORMATS[kind]
    shutil.copytree(whole, place)
    (place / file).write_bytes(this.damage((place / file).read_bytes(), rng))
    arguments = rng.choice(this.commands)
    cache = ("--cache-dir", str(place / "cache")) if arguments[0] in ("eval", "finetune") else ()
    before = files(place)
    try:
        with contextlib.chdir(place):
            code, out, err = run((*arguments, *cache))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return True, f"{arguments}: {type(error).__name__}: {error}"
    left = files(place) - before
    lines = err.splitlines()
    told = "" if not lines else lines[-1]
    wrong = [
        f"exit code {code}" * (code not in (0, 1, 2, 3)),
        "unexpected" * ("error: unexpected" in err),
        "no error line" * (code in (1, 3) and not told.startswith("error: ")),
        "two errors" * (sum(line.startswith("error: ") for line in lines) > 1),
        "not printable" * (arguments[0] != "generate" and not (err + out).replace("\n", "").isprintable()),
        f"left {sorted(left)}" * bool(code and any(not name.startswith("cache") for name in left)),
        "other values" * (this.keeps_values and code == 0 and not _same_values(place / "out")),
    ]
    faults = "; ".join(fault for fault in wrong if fault)
    return bool(code), faults and f"{arguments}: {faults}: {err[-500:]}"


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def _same_values(model: Path) -> bool:
    """Whether a conversion holds what the undamaged file held."""
    from rwkv_rev import export

    export(model, model.parent / "back.pth")
    back = torch.load(model.parent / "back.pth", weights_only=True)
    state = blinkdl_state_dict("5.2", **SIZES)
    return set(back) == set(state) and all(torch.equal(back[name], state[name]) for name in state)
