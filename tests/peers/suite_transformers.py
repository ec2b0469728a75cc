"""transformers' common tests over our model, configuration and tokenizers; run by ``run.py``."""

import unittest
from unittest.mock import patch

import torch
from peer_transformers.test_configuration_common import ConfigTester
from peer_transformers.test_modeling_common import (
    GenerationTesterMixin,
    ModelTesterMixin,
    ids_tensor,
    random_attention_mask,
)
from peer_transformers.test_training_mixin import TrainingTesterMixin

from rwkv_rev import RwkvRevConfig, RwkvRevForCausalLM, RwkvRevModel
from rwkv_rev.architectures.registry import generations
from rwkv_rev.bptt_settings import BpttSettings

VERSIONS = [known.version for known in generations()]
SETTINGS = {
    "default": BpttSettings(),
    "reversible": BpttSettings("reversible", chunk_length=3),
}


class Tester:
    """What the suites ask of a model: tiny configurations and inputs."""

    causal_lm_class = RwkvRevForCausalLM
    base_model_class = RwkvRevModel
    is_training = True
    batch_size, seq_length = 4, 7
    num_hidden_layers, hidden_size, vocab_size = 2, 32, 99
    num_attention_heads = 4

    def __init__(self, version: str) -> None:
        heads = 1 if version == "4" else self.num_attention_heads
        self.num_attention_heads = heads
        self.fields = {
            "rwkv_version": version,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": heads,
            "head_size": self.hidden_size // heads,
            "intermediate_size": 64,
            "vocab_size": self.vocab_size,
            "pad_token_id": 0,
        }

    def get_config(self) -> RwkvRevConfig:
        """For training over 64 tokens."""
        return RwkvRevConfig(**self.fields)

    def prepare_config_and_inputs(self) -> tuple[RwkvRevConfig, torch.Tensor, torch.Tensor]:
        shape = (self.batch_size, self.seq_length)
        return RwkvRevConfig(**self.fields), ids_tensor(shape, self.vocab_size), random_attention_mask(shape)

    def prepare_config_and_inputs_for_common(self) -> tuple[RwkvRevConfig, dict[str, torch.Tensor]]:
        config, tokens, mask = self.prepare_config_and_inputs()
        return config, {"input_ids": tokens, "attention_mask": mask}


class ModelSuite(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    """Everything that transformers asks of a language model."""

    version: str
    settings: BpttSettings
    all_model_classes = (RwkvRevModel, RwkvRevForCausalLM)
    has_attentions = False
    pipeline_model_mapping: dict[str, type] = {}  # noqa: RUF012

    @property
    def model_tester(self) -> Tester:
        return Tester(self.version)

    def setUp(self) -> None:
        super().setUp()
        replaced = patch("rwkv_rev.base_model.BpttSettings", lambda: self.settings)
        replaced.start()
        self.addCleanup(replaced.stop)

    def test_config(self) -> None:
        fields = {k: v for k, v in self.model_tester.fields.items() if k != "vocab_size"}
        ConfigTester(self, config_class=RwkvRevConfig, has_text_modality=True, **fields).run_common_tests()


for _version in VERSIONS:
    for _name, _settings in SETTINGS.items():
        _label = f"Rwkv{_version.replace('.', '')}{_name.capitalize()}ModelTest"
        globals()[_label] = type(
            _label, (ModelSuite, unittest.TestCase), {"version": _version, "settings": _settings}
        )
del _version, _name, _settings, _label, ModelSuite
