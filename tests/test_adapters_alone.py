"""Files that hold an adapter and no model: one line that says which, and that a base is needed."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bptt_cases import tiny_model
from foreign import blinkdl_state_dict

from rwkv_rev.adapted_model import load_adapted
from rwkv_rev.loading import load_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning", "ignore::UserWarning:peft"
)
Cli = Callable[..., tuple[int, str, str]]
RWKV_PEFT = {  # names as RWKV-PEFT's trainers save them
    "lora": ("LoRA", ["att.receptance.lora_A", "att.receptance.lora_B", "ffn.key.lora_A", "ffn.key.lora_B"]),
    "lora, with norms": ("LoRA", ["att.key.lora_A", "att.key.lora_B", "ln1.weight", "att.time_decay"]),
    "pissa": ("LoRA", ["att.receptance.lora_A", "att.receptance.lora_B"]),
    "init_pissa": ("initial values of PiSSA", ["att.receptance.init_lora_A", "att.receptance.init_lora_B"]),
    "bone": ("DiSHA", ["att.receptance.bone", "ffn.value.bone"]),
    "disha": ("DiSHA", ["att.receptance.disha", "ffn.value.disha"]),
    "state": ("tuned initial states", ["att.time_state"]),
}


def refused(cli: Cli, source: str, folder: Path) -> str:
    before = sorted(folder.rglob("*"))
    lines = []
    for arguments in (("convert", source, "--output", "model"), ("inspect", source)):
        code, out, err = cli(*arguments)
        assert (code, out, err.count("\n")) == (1, "", 1)
        lines.append(err)
    assert sorted(folder.rglob("*")) == before
    assert lines[0] == lines[1]
    return lines[0]


@pytest.mark.parametrize("prefix", ["", "module.", "_forward_module."])
@pytest.mark.parametrize("kind", RWKV_PEFT)
def test_rwkv_peft(cli: Cli, tmp_path: Path, kind: str, prefix: str) -> None:
    what, names = RWKV_PEFT[kind]
    state = {f"{prefix}blocks.{i}.{name}": torch.ones(4, 4) for i in range(2) for name in names}
    torch.save(state, tmp_path / "rwkv-0.pth")
    line = refused(cli, "rwkv-0.pth", tmp_path)
    assert what in line
    assert "base model" in line or kind == "state"


@pytest.mark.parametrize(
    ("what", "settings"),
    [
        ("LoRA", {"method": "LoraConfig"}),
        ("LoRA", {"method": "LoraConfig", "use_dora": True}),
        ("LoRA", {"method": "LoraConfig", "init_lora_weights": "pissa"}),
        ("DiSHA", {"method": "MissConfig"}),
        ("peft", {"method": "LoKrConfig"}),
        ("peft", {"method": "OFTConfig", "oft_block_size": 4, "r": 0}),
        ("peft", {"method": "VeraConfig"}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value.values())),
)
def test_peft(cli: Cli, tmp_path: Path, what: str, settings: dict[str, Any]) -> None:
    """Folders as peft saves them."""
    method = getattr(peft, settings.pop("method"))
    config = method(target_modules=["key", "value"], **({"r": 4} | settings))
    peft.get_peft_model(tiny_model("5.2"), config).save_pretrained(tmp_path / "adapter")
    line = refused(cli, "adapter", tmp_path)
    assert f"is a {what}" in line
    assert "needs its base model" in line


def test_beside_the_model(cli: Cli, tmp_path: Path) -> None:
    state = blinkdl_state_dict("5.2") | {"blocks.0.att.key.lora_A": torch.ones(4, 32)}
    torch.save(state, tmp_path / "unmerged.pth")
    assert "LoRA adapter weights that are not merged" in refused(cli, "unmerged.pth", tmp_path)


def test_one_beside_its_base_is_loaded_without_a_warning(shallow: dict[str, Path], tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["key"])
    cpu = torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(load_model(shallow["5.2"], cpu, torch.float32), config)
    made.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapted(shallow["5.2"], cpu, torch.float32, adapter=tmp_path / "adapter")
