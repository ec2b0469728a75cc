"""Which modules a folder of peft's adapts: its configuration and its tensors agree, as peft itself reads them."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from foreign import blinkdl_state_dict
from safetensors.torch import load_file

import rwkv_rev
from rwkv_rev.errors import CheckpointError
from rwkv_rev.modeling import RwkvRevForCausalLM

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning", "ignore::UserWarning:peft"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("base")
    torch.save(blinkdl_state_dict("7", vocab=256), root / "a.pth")
    rwkv_rev.convert(root / "a.pth", root / "model")
    return root / "model"


def adapted(base: Path, output: Path, **config: Any) -> RwkvRevForCausalLM:
    """A LoRA of peft, saved; gives the model that peft merges it into."""
    model = RwkvRevForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, **config))
    for seed, (name, parameter) in enumerate(wrapped.named_parameters()):
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    wrapped.save_pretrained(str(output), save_embedding_layers=False)
    merged: Any = wrapped.merge_and_unload()
    return merged


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        ({"target_modules": ["key"], "layers_to_transform": 1}, 2),
        ({"target_modules": ["key"], "layers_to_transform": [0], "layers_pattern": "blocks"}, 2),
        ({"target_modules": ["model.blocks.1.time_mix.key"], "layers_to_transform": [0]}, 1),
        ({"target_modules": ["key", "value"], "exclude_modules": ["channel_mix.key"]}, 6),
        ({"target_modules": r".*\.time_mix\.key"}, 2),
        ({"target_modules": ["key"], "use_rslora": True}, 4),
    ],
    ids=["a layer", "layers", "a whole name", "excluded", "pattern", "rslora"],
)
def test_as_peft_merges_it(base: Path, tmp_path: Path, config: dict[str, Any], changed: int) -> None:
    expected = adapted(base, tmp_path / "adapter", **config).state_dict()
    assert rwkv_rev.merge(base, tmp_path / "adapter", tmp_path / "out").weights == changed
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_rslora": "false"}, "is damaged: use_rslora = 'false' is neither true nor false"),
        ({"use_rslora": 1}, "is damaged: use_rslora = 1 is neither"),
        ({"use_dora": "false"}, "use_dora = 'false' is not understood"),
        ({"init_lora_weights": "true"}, "init_lora_weights = 'true' is not understood"),
        ({"layers_to_transform": [0]}, "changes model.blocks.1.time_mix.key, and adapter_config.json says"),
        ({"layers_to_transform": 1}, "that it does not: layers_to_transform = 1"),
        ({"layers_to_transform": ["0"]}, "is damaged: layers_to_transform = ['0']"),
        ({"layers_to_transform": True}, "is damaged: layers_to_transform = True"),
        ({"layers_to_transform": [0, 1], "layers_pattern": "layers"}, "not: layers_pattern = 'layers'"),
        ({"target_modules": ["value"]}, "does not: target_modules = ['value']"),
        ({"target_modules": 3}, "is damaged: target_modules = 3"),
        ({"exclude_modules": ["key"]}, "does not: exclude_modules = ['key']"),
    ],
    ids=str,
)
def test_contradictions_are_refused(base: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    adapted(base, tmp_path / "adapter", target_modules=["time_mix.key"])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError) as caught:
        rwkv_rev.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert message in str(caught.value) and not (tmp_path / "out").exists()
