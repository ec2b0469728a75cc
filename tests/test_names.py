"""The name tables against the independently written foreign state dicts, and against transformers' own
class."""

import pytest
import torch
from foreign import VERSIONS, blinkdl_state_dict, fla_state_dict_of_6, hf_config, hf_state_dict
from transformers import RwkvConfig, RwkvForCausalLM

from rwkv_rev.architectures.registry import architecture
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.converters.names import by_foreign, foreign_tensor, layouts, tensor_table

DECAYS = {"4": (32,), "5.0": (4,), "5.1": (4,), "5.2": (4, 8), "6": (32,), "7": (32,)}
RANKS = {"6": {"mix_rank": 6, "decay_rank": 5}}
RANKS["7"] = {"decay_rank": 5, "rate_rank": 6, "residual_rank": 7, "gate_rank": 9}


def hub_layout(version: str) -> str:
    return architecture(version).hub_layout


def config_of(version: str, *, layers: int = 2, exponential: bool = False) -> RwkvRevConfig:
    heads = 1 if version == "4" else 4
    return RwkvRevConfig(
        rwkv_version=version,
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        head_size=32 // heads,
        intermediate_size=128 if version in ("4", "5.0", "7") else 96,
        bonus_is_exponential=exponential,
        **RANKS.get(version, {}),
    )


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("version", VERSIONS)
def test_blinkdl_names_shapes_and_order(version: str, layers: int) -> None:
    table = tensor_table(config_of(version, layers=layers), "blinkdl")
    foreign = blinkdl_state_dict(version, layers=layers)
    assert {entry.foreign: entry.foreign_shape for entry in table} == {
        name: tuple(tensor.shape) for name, tensor in foreign.items()
    }
    assert table[0].foreign == "emb.weight"
    assert table[-1].foreign == "head.weight"


@pytest.mark.parametrize("version", VERSIONS)
def test_hugging_face_names_and_shapes(version: str) -> None:
    table = tensor_table(config_of(version), hub_layout(version))
    foreign = hf_state_dict(version)
    assert {entry.foreign: entry.foreign_shape for entry in table} == {
        name: tuple(tensor.shape) for name, tensor in foreign.items()
    }


def test_transformers_names_are_those_of_its_class() -> None:
    with torch.device("meta"):
        model = RwkvForCausalLM(RwkvConfig(**hf_config("4")))
    table = tensor_table(config_of("4"), "transformers")
    assert {entry.foreign: entry.foreign_shape for entry in table} == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("layout", ["blinkdl", "v5-hub"])
def test_exponential_bonus_keeps_its_old_name(layout: str) -> None:
    names = {entry.foreign for entry in tensor_table(config_of("5.0", exponential=True), layout)}
    assert sum(name.endswith("time_first") for name in names) == 2
    assert not any(name.endswith("time_faaaa") for name in names)


def test_names_of_fla_of_rwkv6() -> None:
    table = tensor_table(config_of("6"), "fla")
    assert {entry.foreign: entry.foreign_shape for entry in table} == {
        name: tuple(tensor.shape) for name, tensor in fla_state_dict_of_6().items()
    }


@pytest.mark.parametrize("version", ["6", "7"])
def test_pieces_make_the_whole(version: str) -> None:
    """From every layout to ours and back, bit for bit, in each of the others."""
    config, states = config_of(version), {"blinkdl": blinkdl_state_dict(version)}
    states[hub_layout(version)] = hf_state_dict(version)
    if version == "6":
        states["fla"] = fla_state_dict_of_6()
    for layout, state in states.items():
        own = {row.name: row.of(state[row.foreign]) for row in tensor_table(config, layout)}
        for other, expected in states.items():
            rows = by_foreign(tensor_table(config, other))
            assert rows.keys() == expected.keys()
            for name, parts in rows.items():
                assert torch.equal(foreign_tensor(parts, own.__getitem__), expected[name])


@pytest.mark.parametrize("version", VERSIONS)
def test_our_names_are_the_same_in_every_layout(version: str) -> None:
    config = config_of(version)
    blinkdl, hub = tensor_table(config, "blinkdl"), tensor_table(config, hub_layout(version))
    assert [(entry.name, entry.shape) for entry in blinkdl] == [(entry.name, entry.shape) for entry in hub]
    names = [entry.name for entry in blinkdl]
    assert len(set(names)) == len(names)
    shapes = {entry.name: entry.shape for entry in blinkdl}
    decay, mix = ("decay_base", "mix_before_key") if version in RANKS else ("time_decay", "mix_key")
    assert shapes[f"model.blocks.1.time_mix.{decay}"] == DECAYS[version]
    assert shapes[f"model.blocks.0.time_mix.{mix}"] == (32,)


@pytest.mark.parametrize(
    ("version", "layout"),
    [
        ("4", "v5-hub"),
        ("5.0", "transformers"),
        ("5.2", "transformers"),
        ("5.2", "gguf"),
        ("6", "v5-hub"),
        ("7", "v6-hub"),
    ],
)
def test_impossible_layouts(version: str, layout: str) -> None:
    with pytest.raises(ValueError, match=f"{layout}|{layouts()[0]}"):
        tensor_table(config_of(version), layout)
