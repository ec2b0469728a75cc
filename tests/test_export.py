"""convert -> export gives back the original bit for bit: all versions, all layouts, all dtypes."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import (
    VERSIONS,
    blinkdl_state_dict,
    fla_state_dict_of_6,
    hf_config,
    hf_state_dict,
    packed_state_dict,
)
from pairwise import every_two
from safetensors.torch import load_file, save_file

from rwkv_rev.architectures.registry import architecture
from rwkv_rev.bundled import BUNDLED, bundled_path
from rwkv_rev.conversion import convert
from rwkv_rev.converters.export import export
from rwkv_rev.errors import CheckpointError, OutputError, SourceError
from rwkv_rev.modeling import RwkvRevForCausalLM

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = {"vocab": 256, "D": 32, "head_size": 8}


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        other = right[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert torch.equal(tensor.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)), name


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_blinkdl_comes_back(tmp_path: Path, version: str, dtype: torch.dtype) -> None:
    original = blinkdl_state_dict(version, dtype=dtype, **SIZES)
    torch.save(original, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "model", max_shard_size="20KB")
    export(tmp_path / "model", tmp_path / "b.pth")
    same_bits(original, torch.load(tmp_path / "b.pth", weights_only=True))


@pytest.mark.parametrize("bonus", ["time_first", "time_faaaa"])
def test_both_names_of_the_bonus_come_back(tmp_path: Path, bonus: str) -> None:
    original = blinkdl_state_dict("5.0", bonus=bonus, **SIZES)
    torch.save(original, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "model")
    export(tmp_path / "model", tmp_path / "b.pth")
    same_bits(original, torch.load(tmp_path / "b.pth", weights_only=True))


@pytest.mark.parametrize(
    ("version", "dtype", "kind"), every_two(VERSIONS, DTYPES, ("bin", "safetensors")), ids=str
)
def test_hugging_face_comes_back(tmp_path: Path, version: str, dtype: torch.dtype, kind: str) -> None:
    """Every two of a version, a dtype and a kind of file meet."""
    original = hf_state_dict(version, dtype=dtype, **SIZES)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(hf_config(version, **SIZES)))
    if kind == "bin":
        torch.save(original, source / "pytorch_model.bin")
    else:
        save_file(original, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "back", to="hf", max_shard_size="20KB")
    assert (tmp_path / "back" / "model.safetensors.index.json").exists()
    same_bits(original, load_folder(tmp_path / "back"))


@pytest.mark.parametrize("version", VERSIONS)
def test_layouts_translate_into_each_other(tmp_path: Path, version: str) -> None:
    torch.save(blinkdl_state_dict(version, **SIZES), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "one")
    export(tmp_path / "one", tmp_path / "hf", to="hf")
    same_bits(hf_state_dict(version, **SIZES), load_folder(tmp_path / "hf"))
    again = convert(tmp_path / "hf", tmp_path / "two")
    assert again.record["layout"] == architecture(version).hub_layout
    export(tmp_path / "two", tmp_path / "b.pth")
    same_bits(blinkdl_state_dict(version, **SIZES), torch.load(tmp_path / "b.pth", weights_only=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rwkv6_in_the_layout_of_fla_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    """To it and from it, and what its config.json says of the eps comes back, too."""
    torch.save(blinkdl_state_dict("6", dtype=dtype, **SIZES), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "one")
    result = export(tmp_path / "one", tmp_path / "fla", to="fla", max_shard_size="20KB")
    assert result.note is not None and "GroupNorm eps 0.00064" in result.note and "1e-05" in result.note
    state = load_folder(tmp_path / "fla")
    assert result.tensors == len(state)
    same_bits(fla_state_dict_of_6(dtype=dtype, **SIZES), state)
    config = json.loads((tmp_path / "fla" / "config.json").read_text())
    expected = {"model_type": "rwkv6", "proj_low_rank_dim": 6, "gate_low_rank_dim": 5, "expand_k": 1.0}
    assert config | expected == config and "auto_map" not in config
    again = convert(tmp_path / "fla", tmp_path / "two", verify=dtype == torch.float32)
    assert again.record["layout"] == "fla" and again.config is not None
    assert again.config.group_norm_epsilon == pytest.approx(64e-5)
    export(tmp_path / "two", tmp_path / "b.pth")
    same_bits(
        blinkdl_state_dict("6", dtype=dtype, **SIZES), torch.load(tmp_path / "b.pth", weights_only=True)
    )
    export(tmp_path / "two", tmp_path / "hub", to="hf")
    same_bits(hf_state_dict("6", dtype=dtype, **SIZES), load_folder(tmp_path / "hub"))


@pytest.mark.parametrize("shape", [(6, 32), (6, 1, 1, 32)])
@pytest.mark.parametrize("to", ["hf", "fla"])
def test_the_first_version_of_fla_comes_back(tmp_path: Path, shape: tuple[int, ...], to: Any) -> None:
    """Six mixes in one tensor, as the original has them; the trainer's file has them one by one."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(hf_config("7", **SIZES)))
    save_file(packed_state_dict(shape, **SIZES), source / "model.safetensors")
    made = convert(source, tmp_path / "model")
    assert made.record["layout"] == "fla-x_x"
    export(tmp_path / "model", tmp_path / "back", to=to)
    same_bits(packed_state_dict(shape, **SIZES), load_folder(tmp_path / "back"))
    export(tmp_path / "model", tmp_path / "b.pth")
    expected = blinkdl_state_dict("7", **SIZES)
    same_bits(expected, torch.load(tmp_path / "b.pth", weights_only=True))


@pytest.mark.parametrize("version", ["5.2", "7"])
def test_a_tied_folder_comes_back(tmp_path: Path, version: str) -> None:
    """Without a head, as it came, and said to be tied; the trainer's file has one."""
    state = hf_state_dict(version, **SIZES)
    head = next(name for name in ("lm_head.weight", "head.weight") if name in state)
    del state[head]
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(
        json.dumps(hf_config(version, **SIZES) | {"tie_word_embeddings": True})
    )
    save_file(state, source / "model.safetensors")
    convert(source, tmp_path / "model")
    result = export(tmp_path / "model", tmp_path / "back", to="hf")
    same_bits(state, load_folder(tmp_path / "back"))
    assert result.tensors == len(state)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"] is True
    convert(tmp_path / "back", tmp_path / "again")
    export(tmp_path / "again", tmp_path / "b.pth")
    tensors = torch.load(tmp_path / "b.pth", weights_only=True)
    assert torch.equal(tensors["head.weight"], tensors["emb.weight"])


def test_a_layout_that_a_generation_has_not(tmp_path: Path) -> None:
    torch.save(blinkdl_state_dict("5.2", **SIZES), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "model")
    with pytest.raises(OutputError, match=r"RWKV-5\.2 has no layout 'fla'; use to='hf' or to='blinkdl'"):
        export(tmp_path / "model", tmp_path / "fla", to="fla")


def test_ranks_that_the_code_of_a_repository_does_not_know_are_told_of(tmp_path: Path) -> None:
    torch.save(blinkdl_state_dict("6", **SIZES), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "model")
    note = export(tmp_path / "model", tmp_path / "hf", to="hf").note
    assert note is not None and "ranks 6 and 5" in note and "32 and 64" in note
    convert("bundled:rwkv-6", tmp_path / "other")
    assert export(tmp_path / "other", tmp_path / "hf", to="hf", force=True).note is None


def test_the_unused_tensors_of_layer_0_come_back(tmp_path: Path) -> None:
    """They are there, bit for bit, and no parameters; flash-linear-attention's layout has no place for them."""
    original = blinkdl_state_dict("7", unused=True, **SIZES)
    torch.save(original, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "model", verify=True)
    export(tmp_path / "model", tmp_path / "b.pth")
    same_bits(original, torch.load(tmp_path / "b.pth", weights_only=True))
    model = RwkvRevForCausalLM.from_pretrained(tmp_path / "model")
    assert not [name for name, _ in model.named_parameters() if "unused" in name]
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "b.pth", force=True)
    same_bits(original, torch.load(tmp_path / "b.pth", weights_only=True))
    model.config.group_norm_epsilon = 8e-5
    model.save_pretrained(tmp_path / "model")
    result = export(tmp_path / "model", tmp_path / "hf", to="hf")
    assert result.note is not None and "v0, v1 and v2 of layer 0" in result.note
    assert load_folder(tmp_path / "hf").keys() == hf_state_dict("7", **SIZES).keys()


def test_an_eps_that_fla_does_not_compute_with_is_told_of(tmp_path: Path) -> None:
    torch.save(blinkdl_state_dict("7", **SIZES), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "model")
    note = export(tmp_path / "model", tmp_path / "hf", to="hf").note
    assert note is not None and "GroupNorm eps 0.00064" in note and "8e-05" in note
    convert("bundled:rwkv-7", tmp_path / "other")  # N = 64, as in every published model
    assert export(tmp_path / "other", tmp_path / "hf", to="hf", force=True).note is None


def test_mixed_dtypes_stay_mixed(tmp_path: Path) -> None:
    original = blinkdl_state_dict("5.2", dtype=torch.bfloat16, **SIZES)
    for name in [name for name in original if "time_" in name]:
        original[name] = original[name].float() / 3
    torch.save(original, tmp_path / "a.pth")
    result = convert(tmp_path / "a.pth", tmp_path / "model")
    assert result.config is not None and result.config.dtype == torch.float32
    export(tmp_path / "model", tmp_path / "b.pth")
    same_bits(original, torch.load(tmp_path / "b.pth", weights_only=True))


def test_unusual_shapes_come_back(tmp_path: Path) -> None:
    original = blinkdl_state_dict("5.1", **SIZES)
    for name in [name for name in original if name.endswith("att.time_decay")]:
        original[name] = original[name].reshape(-1, 1, 1)
    torch.save(original, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "model")
    export(tmp_path / "model", tmp_path / "b.pth")
    same_bits(original, torch.load(tmp_path / "b.pth", weights_only=True))


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_checkpoints_come_back(tmp_path: Path, name: str) -> None:
    convert(f"bundled:{name}", tmp_path / "model")
    result = export(tmp_path / "model", tmp_path / "b.pth")
    original = torch.load(bundled_path(name), weights_only=True)
    same_bits(original, torch.load(tmp_path / "b.pth", weights_only=True))
    assert result.tensors == len(original)
    assert result.nbytes == sum(tensor.nbytes for tensor in original.values())
    # torch.save writes a storage whole: a view into a mapped file must not bring the file along.
    assert (tmp_path / "b.pth").stat().st_size < result.nbytes + 1000 * result.tensors


def test_transformers_loads_the_rwkv4_export(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, RwkvForCausalLM

    convert("bundled:rwkv-4", tmp_path / "model", dtype="float32")
    export(tmp_path / "model", tmp_path / "hf", to="hf")
    model, info = RwkvForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")) is type(model)


def test_the_v5_config_says_what_the_remote_code_reads(tmp_path: Path) -> None:
    convert("bundled:rwkv-5.2", tmp_path / "model", group_norm_eps=1e-5)
    export(tmp_path / "model", tmp_path / "hf", to="hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == "rwkv5"
    assert (config["head_size"], config["head_size_divisor"]) == (64, 1)
    again = convert(tmp_path / "hf", tmp_path / "again")
    assert again.config is not None
    assert again.config.group_norm_epsilon == pytest.approx(1e-5)


def test_an_epsilon_that_a_pth_cannot_say_is_noted(tmp_path: Path) -> None:
    convert("bundled:rwkv-5.2", tmp_path / "usual")
    convert("bundled:rwkv-5.2", tmp_path / "other", group_norm_eps=1e-5)
    assert export(tmp_path / "usual", tmp_path / "a.pth").note is None
    note = export(tmp_path / "other", tmp_path / "b.pth").note
    assert note is not None and "1e-05" in note
    assert export(tmp_path / "other", tmp_path / "hf", to="hf").note is None


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not a folder"):
        export(tmp_path / "nope", tmp_path / "x.pth")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="not a converted model"):
        export(tmp_path / "other", tmp_path / "x.pth")
    model = convert("bundled:rwkv-4", tmp_path / "model").directory
    with pytest.raises(OutputError, match="blinkdl, hf"):
        export(model, tmp_path / "x", to="gguf")  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="holds the model itself"):
        export(model, model, to="hf", force=True)
    weights = load_file(model / "model.safetensors")
    del weights["model.blocks.3.ln1.bias"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks model\.blocks\.3\.ln1\.bias"):
        export(model, tmp_path / "x.pth")
    (model / "model.safetensors").unlink()
    with pytest.raises(SourceError):
        export(model, tmp_path / "x.pth")
    assert {path.name for path in tmp_path.iterdir()} == {"other", "model"}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_stopped_while_a_pth_is_written(
    bundled: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    """torch then closes its archive, which fails as well, with an error of its own."""

    class Writer(io.BufferedWriter):
        def write(self, data: Any) -> int:
            if self.tell() > 100_000:
                raise stop
            return super().write(data)

    plain = Path.open

    def opened(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if mode == "wb" and path.suffix == ".partial":
            return Writer(io.FileIO(path, "w"))
        return plain(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(stop):
        export(bundled["5.2"], tmp_path / "a.pth")
    assert not list(tmp_path.iterdir())
