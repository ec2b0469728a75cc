"""A conversion writes a whole, loadable folder with the source's values, or nothing."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import VERSIONS, blinkdl_state_dict, hf_config, hf_state_dict
from hub_server import HubServer, Repository, commit_id, use_hub
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

from rwkv_rev.bundled import BUNDLED
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.conversion import ConversionDiffers, convert
from rwkv_rev.converters.converted import ConvertedModel
from rwkv_rev.errors import CheckpointError, OutputError, SourceError
from rwkv_rev.folders.source import Source
from rwkv_rev.folders.whereabouts import recall

SIZES = {"vocab": 256, "D": 32, "head_size": 8}


def save(path: Path, version: str = "5.2", **kwargs: Any) -> dict[str, torch.Tensor]:
    state = blinkdl_state_dict(version, **(SIZES | kwargs))
    torch.save(state, path)
    return state


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("version", VERSIONS)
def test_folder_is_complete_and_holds_the_values(tmp_path: Path, version: str) -> None:
    state = save(tmp_path / "a.pth", version)
    result = convert(tmp_path / "a.pth", tmp_path / "model")
    assert listing(tmp_path / "model") == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "conversion.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    weights = load_file(tmp_path / "model" / "model.safetensors")
    in_one = 8 if version == "6" else 0  # its layers have five maps in one tensor, twice
    assert len(weights) == len(state) + 2 * in_one
    names = {"time_decay": "time_decay", "mix_key": "time_mix_k"}
    if version == "6":
        names = {"decay_base": "time_decay", "mix_before_key": "time_maa_k"}
        down = weights["model.blocks.1.time_mix.receptance_mix_down.weight"]
        assert torch.equal(down, state["blocks.1.att.time_maa_w1"][:, 18:24].mT)
    if version == "7":
        names = {"decay_base": "w0", "mix_before_key": "x_k"}
        down = weights["model.blocks.1.time_mix.decay_down.weight"]
        assert torch.equal(down, state["blocks.1.att.w1"].mT)
    for ours, theirs in names.items():
        found, stored = weights[f"model.blocks.1.time_mix.{ours}"], state[f"blocks.1.att.{theirs}"]
        assert torch.equal(found, stored if ours == "time_decay" else stored.flatten())
    config = RwkvRevConfig.from_pretrained(tmp_path / "model")
    assert config.rwkv_version == version
    assert config.architectures == ["RwkvRevForCausalLM"]
    assert config.dtype == torch.float32
    assert config.to_dict() == (result.config.to_dict() if result.config else None)
    assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("Hi\n")["input_ids"] == [72, 105, 10]


def test_record_remembers_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = save(tmp_path / "a.pth", dtype=torch.bfloat16)
    monkeypatch.chdir(tmp_path)
    result = convert("a.pth", "model", group_norm_eps=1e-5)
    record = json.loads((tmp_path / "model" / "conversion.json").read_text())
    assert record == result.record
    assert record["source"] == "a.pth"  # what others may read
    assert recall(record) == tmp_path / "a.pth"  # still found from another folder
    assert record["layout"] == "blinkdl"
    assert record["dtypes"] == {"bfloat16": len(state)}
    assert list(record["sha256"]) == ["a.pth"] and len(record["sha256"]["a.pth"]) == 64
    assert record["group_norm_eps"] == 1e-5
    assert result.config is not None and result.config.group_norm_epsilon == 1e-5
    assert set(record["versions"]) == {"rwkv-rev", "torch", "transformers", "python"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("RWKV-5-World-0.1B.v2.pth", "RWKV-5-World-0.1B.v2-rev"),
        ("bundled:rwkv-4", "rwkv-4-rev"),
        ("repo/", "repo-rev"),
    ],
)
def test_default_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "RWKV-5-World-0.1B.v2.pth")
    (tmp_path / "repo").mkdir()
    torch.save(hf_state_dict("4", **SIZES), tmp_path / "repo" / "pytorch_model.bin")
    (tmp_path / "repo" / "config.json").write_text(json.dumps(hf_config("4", **SIZES)))
    assert convert(source).directory == Path(expected)
    assert (tmp_path / expected / "config.json").exists()


def test_shards_and_index(tmp_path: Path) -> None:
    state = save(tmp_path / "a.pth")
    result = convert(tmp_path / "a.pth", tmp_path / "model", max_shard_size="20KB")
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [shard.filename for shard in result.shards]
    assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    for shard in result.shards:
        assert shard.nbytes <= 20_000 or len(shard.entries) == 1
        with safe_open(tmp_path / "model" / shard.filename, "pt") as file:
            assert set(file.keys()) == {entry.name for entry in shard.entries}
            assert file.metadata() == {"format": "pt"}
    with ConvertedModel(tmp_path / "model") as model:
        assert len(model.names()) == len(state)


def test_sharded_sources(tmp_path: Path) -> None:
    """``pytorch_model-0000x.bin`` with an index, in the old pickle layout that cannot be mapped."""
    state = hf_state_dict("5.2", **SIZES)
    (tmp_path / "repo").mkdir()
    names = sorted(state)  # not the order of the model
    weight_map = {}
    for i in range(3):
        part = names[i::3]
        file = f"pytorch_model-{i + 1:05d}-of-00003.bin"
        torch.save(
            {n: state[n] for n in part}, tmp_path / "repo" / file, _use_new_zipfile_serialization=False
        )
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "repo" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(tmp_path / "repo", tmp_path / "model", max_shard_size="20KB")
    with ConvertedModel(tmp_path / "model") as model:
        head = model.tensor("model.blocks.1.channel_mix.value.weight")
        assert torch.equal(head, state["rwkv.blocks.1.feed_forward.value.weight"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(tmp_path: Path, dtype: Any) -> None:
    state = save(tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "model", dtype=dtype)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    target = getattr(torch, dtype)
    assert {tensor.dtype for tensor in weights.values()} == {target}
    assert torch.equal(weights["head.weight"], state["head.weight"].to(target))
    assert RwkvRevConfig.from_pretrained(tmp_path / "model").dtype == target


def test_values_too_large_for_the_dtype_are_refused(tmp_path: Path) -> None:
    state = blinkdl_state_dict("4", **SIZES)
    state["blocks.1.ffn.key.weight"][3, 4] = 1e5
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(
        CheckpointError, match=r"ffn\.key\.weight holds values as large as 1e\+05, too large for float16"
    ):
        convert(tmp_path / "a.pth", tmp_path / "model", dtype="float16")
    assert listing(tmp_path) == {"a.pth"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_values_are_refused_and_nothing_is_left(tmp_path: Path, value: float) -> None:
    state = blinkdl_state_dict("4", **SIZES)
    state["blocks.1.att.key.weight"][3, 4] = value
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(
        CheckpointError, match=r"blocks\.1\.att\.key\.weight has 1 value that is NaN or infinite"
    ):
        convert(tmp_path / "a.pth", tmp_path / "deep" / "model")
    assert listing(tmp_path) == {"a.pth"}


def test_the_tokenizer_can_be_named_or_left_out(tmp_path: Path) -> None:
    save(tmp_path / "a.pth", vocab=300)
    with pytest.raises(CheckpointError, match="vocabulary of 300"):
        convert(tmp_path / "a.pth", tmp_path / "model")
    assert listing(tmp_path) == {"a.pth"}
    convert(tmp_path / "a.pth", tmp_path / "bytes", tokenizer="byte")
    convert(tmp_path / "a.pth", tmp_path / "without", tokenizer="none")
    assert listing(tmp_path / "bytes") - listing(tmp_path / "without") == {
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    state = save(tmp_path / "a.pth")
    result = convert(tmp_path / "a.pth", tmp_path / "model", dry_run=True, max_shard_size="20KB")
    assert not result.written
    assert result.files == (("a.pth", (tmp_path / "a.pth").stat().st_size),)
    assert sum(len(shard.entries) for shard in result.shards) == len(state)
    assert result.config is not None and result.config.rwkv_version == "5.2"
    assert listing(tmp_path) == {"a.pth"}
    json.dumps(result.to_dict(), default=str)


def test_an_existing_folder_needs_force(tmp_path: Path) -> None:
    save(tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "model")
    with pytest.raises(OutputError, match="force=True"):
        convert("bundled:rwkv-4", tmp_path / "model")
    assert RwkvRevConfig.from_pretrained(tmp_path / "model").rwkv_version == "5.2"
    convert("bundled:rwkv-4", tmp_path / "model", force=True)
    assert RwkvRevConfig.from_pretrained(tmp_path / "model").rwkv_version == "4"
    assert listing(tmp_path) == {"a.pth", "model"}


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    save(tmp_path / "repo" / "a.pth")
    (tmp_path / "repo" / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="holds the source"):
        convert(tmp_path / "repo" / "a.pth", tmp_path / "repo", force=True)
    with pytest.raises(OutputError, match="not a size"):
        convert("bundled:rwkv-4", tmp_path / "model", max_shard_size="much")
    with pytest.raises(CheckpointError, match="not one of auto"):
        convert("bundled:rwkv-4", tmp_path / "model", dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(SourceError):
        convert(tmp_path / "nothing.pth", tmp_path / "model")
    convert("bundled:rwkv-4", tmp_path / "model")
    with pytest.raises(CheckpointError, match="already converted"):
        convert(tmp_path / "model", tmp_path / "twice")
    assert listing(tmp_path) == {"repo", "model"}


@dataclass(frozen=True)
class FakeReport:
    directory: str
    passed: bool
    original: str = ""

    summary = "model differs: blocks.0"

    def to_dict(self) -> dict[str, Any]:
        return {"directory": self.directory, "passed": self.passed}

    def table(self) -> str:
        return "| oracle |\n|---|\n| naive |"


@pytest.mark.parametrize("passed", [True, False])
def test_the_folder_appears_only_if_verification_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: bool
) -> None:
    save(tmp_path / "a.pth")
    seen = []

    def verify_directory(directory: Path, *, original: Source, tokens: int, progress: bool) -> FakeReport:
        seen.append(tokens)
        assert original.path == tmp_path / "a.pth"
        assert not (tmp_path / "model").exists()
        with ConvertedModel(directory) as model:
            assert model.record["source"] == "a.pth"
        return FakeReport(str(directory), passed)

    monkeypatch.setattr("rwkv_rev.equivalence.verification.verify_directory", verify_directory)
    if passed:
        result = convert(tmp_path / "a.pth", tmp_path / "model", verify=True)
        assert result.verification.directory == str(tmp_path / "model")
        assert "| naive |" in (tmp_path / "model" / "README.md").read_text()
    else:
        with pytest.raises(ConversionDiffers, match=r"blocks\.0; nothing was written") as caught:
            convert(tmp_path / "a.pth", tmp_path / "model", verify=True)
        assert caught.value.exit_code == 3
        assert not caught.value.report.passed
        assert listing(tmp_path) == {"a.pth"}
    assert seen == [256]


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_checkpoints_verify(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_rev.conversion.VERIFY_TOKENS", 40)
    result = convert(f"bundled:{name}", tmp_path / "model", verify=True)
    assert result.verification.passed
    assert "PASS" in (tmp_path / "model" / "README.md").read_text()


def in_memory(state: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = {
        "RWKV-5-World-0.1B-v1.pth": in_memory(blinkdl_state_dict("5.2", **SIZES)),
        "RWKV-5-World-3B-v2.pth": in_memory(blinkdl_state_dict("5.1", **SIZES)),
    }
    monkeypatch.chdir(tmp_path)
    with HubServer({"BlinkDL/rwkv-5-world": Repository(world)}) as server:
        use_hub(monkeypatch, server.endpoint, tmp_path / "cache")
        with pytest.raises(SourceError, match=r"0\.1B-v1\.pth.*3B-v2\.pth"):
            convert("BlinkDL/rwkv-5-world")
        planned = convert("BlinkDL/rwkv-5-world", file="*0.1B*", dry_run=True)
        name, content = next(iter(world.items()))
        assert planned.files == ((name, len(content)),)
        assert planned.directory == Path("RWKV-5-World-0.1B-v1-rev")
        assert planned.config is None and not planned.shards  # known only once it is here
        assert not any(request.method == "GET" and name in request.path for request in server.requests)

        result = convert("BlinkDL/rwkv-5-world", file="*0.1B*", verify=True)
        assert result.directory == planned.directory
        assert result.verification.passed  # against the same file, from the cache
        assert result.record["source"] == "BlinkDL/rwkv-5-world"
        assert result.record["file"] == name
        assert result.record["commit"] == commit_id(world)
        again = convert("BlinkDL/rwkv-5-world", file="*0.1B*", dry_run=True)
        assert again.config is not None and again.config.rwkv_version == "5.2"
    card = (result.directory / "README.md").read_text()
    assert "base_model: BlinkDL/rwkv-5-world" in card and commit_id(world) in card
