"""peft's suite for decoders over our model; run by ``run.py``.

The suite names models of the Hub: ours stand in their place, tiny and random, every version as it is by default and
with ``reversible`` in short chunks. Its tests of particular models of the Hub are left out.
"""

import importlib.util
import re
import sys
import types
from pathlib import Path

import datasets
import peft.utils.constants
import pytest
import torch
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bptt_cases import RANKS, tiny_model

from rwkv_rev.architectures.registry import generations
from rwkv_rev.bptt_settings import BpttSettings
from rwkv_rev.tokenization import RwkvByteTokenizer

VERSIONS = [known.version for known in generations()]
SETTINGS = {"default": BpttSettings(), "reversible": BpttSettings("reversible", chunk_length=2)}
FOLDER = Path(".peers/models")
SUITE = "peer_peft.test_decoder_models"


def models() -> list[str]:
    """Folders of the models, made once by whichever process comes first."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 256}
    folders = []
    FOLDER.mkdir(exist_ok=True)
    with FileLock(FOLDER / "lock"):
        for version in VERSIONS:
            for name in SETTINGS:
                folder = FOLDER / f"rwkv-{version}-{name}"
                folders.append(str(folder))
                if not folder.is_dir():
                    ranks = dict.fromkeys(RANKS.get(version, {}), 32)  # the least of published models
                    model = tiny_model(version, pad_token_id=0, **sizes, **ranks)
                    model.save_pretrained(folder)
                    RwkvByteTokenizer().save_pretrained(folder)
    return folders


def targets() -> None:
    """What BEFT adapts, which needs to be told: it trains biases. All other methods adapt what they do by default."""
    peft.utils.constants.TRANSFORMERS_MODELS_TO_BEFT_TARGET_MODULES_MAPPING["rwkv_rev"] = ["value"]


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
    module.load_dataset_english_quotes = quotes
    return module


def quotes() -> datasets.DatasetDict:
    """In the place of a data set of the Hub."""
    lines = [f"{number} bottles of beer on the wall, {number} bottles of beer." for number in range(32)]
    return datasets.DatasetDict(train=datasets.Dataset.from_dict({"quote": lines}))


targets()
torch.set_num_threads(1)
TestDecoderModels = suite().TestDecoderModels


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def as_the_folder_says(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models begin with the settings that their folder is named after: no folder keeps any."""
    settings = SETTINGS[request.getfixturevalue("model_id").rpartition("-")[2]]
    monkeypatch.setattr("rwkv_rev.base_model.BpttSettings", lambda: settings)
