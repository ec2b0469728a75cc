"""Prefixes of wrappers: read without, told of, and refused where two names become one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign import blinkdl_state_dict, hf_config, hf_state_dict

from rwkv_rev import convert, export
from rwkv_rev.converters.inspection import inspect_source
from rwkv_rev.equivalence.verification import verify_directory
from rwkv_rev.errors import CheckpointError

Cli = Callable[..., tuple[int, str, str]]
NESTINGS = (
    "module.",
    "_orig_mod.",
    "_forward_module.",
    "base_model.model.",
    "model.",
    "model.model.",
    "module._orig_mod.",
    "_forward_module.module._orig_mod.model.",
    "base_model.model._fsdp_wrapped_module.",
)


def wrapped(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("prefix", NESTINGS)
def test_any_nesting_is_stripped(tmp_path: Path, prefix: str) -> None:
    state = blinkdl_state_dict("5.2", vocab=256)
    torch.save(wrapped(state, prefix), tmp_path / "wrapped.pth")
    result = convert(tmp_path / "wrapped.pth", tmp_path / "model")
    assert verify_directory(tmp_path / "model", oracle="naive", tokens=20).passed
    assert result.record["wrappers"] == [prefix]
    (note,) = result.notes
    assert prefix in note and "plain names" in note
    assert inspect_source(tmp_path / "wrapped.pth").notes == result.notes
    export(tmp_path / "model", tmp_path / "plain.pth")
    back = torch.load(tmp_path / "plain.pth", weights_only=True)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_in_shards_of_the_hugging_face_layout(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    state = wrapped(hf_state_dict("4", vocab=256), "module.")
    names = list(state)
    index = {name: f"pytorch_model-0000{1 + (i > 20)}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(index.values()):
        torch.save({name: state[name] for name in names if index[name] == file}, source / file)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    (source / "config.json").write_text(json.dumps(hf_config("4", vocab=256)))
    result = convert(source, tmp_path / "model")
    assert verify_directory(tmp_path / "model", oracle="transformers", tokens=20).passed
    assert result.record["wrappers"] == ["module."]


def test_compiled_and_recomputed_blocks(tmp_path: Path) -> None:
    """What torch.compile and FSDP put into the middle of names, of some blocks only."""
    state = {
        name.replace("blocks.1.", "blocks.1._orig_mod.").replace(
            "blocks.0.att.", "blocks.0._checkpoint_wrapped_module.att."
        ): tensor
        for name, tensor in blinkdl_state_dict("4", vocab=256).items()
    }
    torch.save(state, tmp_path / "some.pth")
    result = convert(tmp_path / "some.pth", tmp_path / "model")
    assert set(result.record["wrappers"]) == {"_orig_mod.", "_checkpoint_wrapped_module."}


def test_two_names_that_become_one(tmp_path: Path) -> None:
    state = blinkdl_state_dict("4", vocab=256)
    torch.save(state | {"module.ln_out.bias": torch.ones(32)}, tmp_path / "both.pth")
    with pytest.raises(CheckpointError, match=r"both ln_out\.bias and module\.ln_out\.bias.*one tensor"):
        convert(tmp_path / "both.pth", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_command_line_tells(cli: Cli, tmp_path: Path) -> None:
    torch.save(wrapped(blinkdl_state_dict("4", vocab=256), "module._orig_mod."), tmp_path / "w.pth")
    for arguments in (("convert", "w.pth", "--output", "m", "--no-verify"), ("inspect", "w.pth")):
        code, _, err = cli(*arguments)
        assert code == 0
        assert err.startswith("note: names of tensors carry module._orig_mod.") and err.count("\n") == 1


def test_errors_name_the_tensor_as_the_file_does(tmp_path: Path) -> None:
    state = wrapped(blinkdl_state_dict("4", vocab=256) | {"surprise": torch.ones(2)}, "module.")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"left over module\.surprise"):
        inspect_source(tmp_path / "w.pth")
