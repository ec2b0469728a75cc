"""peft's suite for decoders over our model; run by ``run.py``.

The suite names models of the Hub: ours stand in their place, tiny and random, every version as it is by default and
with ``reversible`` in short chunks. Its tests of particular models of the Hub are left out.
"""

import importlib.util
import re
import sys
import types
from pathlib import Path

import peft.utils.constants
import pytest
import torch
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bptt_cases import tiny_model

from rwkv_rev.tokenization import RwkvByteTokenizer

VERSIONS = ("4", "5.0", "5.1", "5.2")
SETTINGS = {"default": {}, "reversible": {"bptt": "reversible", "chunk_length": 2}}
FOLDER = Path(".peers/models")
SUITE = "peer_peft.test_decoder_models"


def models() -> list[str]:
    """Folders of the models, made once by whichever process comes first."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 256}
    folders = []
    FOLDER.mkdir(exist_ok=True)
    with FileLock(FOLDER / "lock"):
        for version in VERSIONS:
            for name, settings in SETTINGS.items():
                folder = FOLDER / f"rwkv-{version}-{name}"
                folders.append(str(folder))
                if not folder.is_dir():
                    model = tiny_model(version, pad_token_id=0, **sizes, **settings)
                    model.save_pretrained(folder)
                    RwkvByteTokenizer().save_pretrained(folder)
    return folders


def targets() -> None:
    """What peft's methods adapt where nothing is said, as it has it for other models."""
    maps = ["key", "value", "receptance", "output"]
    for name, mapping in vars(peft.utils.constants).items():
        if name.endswith("_FEEDFORWARD_MODULES_MAPPING"):
            mapping["rwkv_rev"] = ["value"]
        elif name.endswith("LNTUNING_TARGET_MODULES_MAPPING"):
            mapping["rwkv_rev"] = ["ln1", "ln2"]
        elif name.endswith("_TARGET_MODULES_MAPPING"):
            mapping["rwkv_rev"] = maps


def suite() -> types.ModuleType:
    """The suite's module, over our models."""
    spec = importlib.util.find_spec(SUITE)
    source = Path(spec.origin).read_text("utf-8")
    for name in ("PEFT_DECODER_MODELS_TO_TEST", "SMALL_GRID_MODELS"):
        source, count = re.subn(rf"^{name} = \[.*?^\]", f"{name} = {models()!r}", source, flags=re.M | re.S)
        assert count == 1, f"peft's suite has no {name}"
    module = importlib.util.module_from_spec(spec)
    stands_in = "diffusers" not in sys.modules and importlib.util.find_spec("diffusers") is None
    if stands_in:  # the common part imports it for tests of pictures
        sys.modules["diffusers"] = types.ModuleType("diffusers")
        sys.modules["diffusers"].StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    try:
        exec(compile(source, spec.origin, "exec"), module.__dict__)
    finally:
        if stands_in:
            del sys.modules["diffusers"]
    return module


targets()
torch.set_num_threads(1)
TestDecoderModels = suite().TestDecoderModels


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
