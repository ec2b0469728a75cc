"""Version and sizes from tensors alone, and every refusal by name."""

import json
import random
from collections.abc import Callable
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
from safetensors.torch import save_file

from rwkv_rev.architectures.registry import architecture
from rwkv_rev.converters.detection import Detected, detect
from rwkv_rev.converters.reading import open_checkpoint
from rwkv_rev.errors import CheckpointError
from rwkv_rev.folders.hub import resolve
from rwkv_rev.folders.source import parse_source

State = dict[str, torch.Tensor]
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture
def look(tmp_path: Path) -> Callable[..., Detected]:
    """Save a state dict in a directory (with a configuration, if given) and detect it.

    ``quick``: as safetensors, which is written and read in a quarter of the time.
    """

    def call(state: State, config: dict[str, Any] | None = None, *, quick: bool = False) -> Detected:
        if quick:
            save_file(state, tmp_path / "model.safetensors")
        else:
            torch.save(state, tmp_path / "pytorch_model.bin")
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
        with open_checkpoint(resolve(parse_source(str(tmp_path)))) as checkpoint:
            return detect(checkpoint)

    return call


def refused(look: Callable[..., Detected], state: State, *, quick: bool = False) -> str:
    with pytest.raises(CheckpointError) as caught:
        look(state, quick=quick)
    message = str(caught.value)
    assert "\n" not in message
    assert ("model.safetensors" if quick else "pytorch_model.bin") in message
    return message


def sizes(found: Detected) -> tuple[int, ...]:
    return (found.num_layers, found.D, found.H, found.N, found.F, found.V)


@pytest.mark.parametrize("hugging_face", [False, True], ids=["blinkdl", "hf"])
@pytest.mark.parametrize("layers", [1, 2, 11])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_version(look: Any, version: str, layers: int, hugging_face: bool) -> None:
    make = hf_state_dict if hugging_face else blinkdl_state_dict
    items = list(make(version, layers=layers).items())
    random.Random(layers).shuffle(items)
    # sizes of a configuration decide nothing; flash-linear-attention's must agree
    said = (
        hf_config(version, layers=layers) if version == "7" else hf_config(version, layers=99, D=640, vocab=7)
    )
    found = look(dict(items), said if hugging_face else None)
    assert found.version == version
    heads = (1, 32) if version == "4" else (4, 8)
    assert sizes(found) == (layers, 32, *heads, 128 if version in ("4", "5.0", "7") else 96, 64)
    known = architecture(version)
    assert found.layout == (known.hub_layout if hugging_face else known.own_layout)
    assert not found.bonus_is_exponential
    assert found.unusual_shapes == {}
    config = found.to_config()
    eps = 8e-5 if version == "7" and hugging_face else 64e-5  # N times the LayerNorm's there
    assert (config.rwkv_version, config.group_norm_epsilon) == (version, pytest.approx(eps, rel=1e-12))
    assert {entry.foreign for entry in found.tensors()} == {name for name, _ in items}


@pytest.mark.parametrize(("D", "head_size"), [(32, 32), (32, 2), (64, 16), (96, 32)])
@pytest.mark.parametrize("version", ["5.0", "5.1", "5.2"])
def test_head_sizes(look: Any, version: str, D: int, head_size: int) -> None:
    found = look(blinkdl_state_dict(version, D=D, head_size=head_size))
    assert (found.version, found.D, found.H, found.N) == (version, D, D // head_size, head_size)


@pytest.mark.parametrize("hugging_face", [False, True], ids=["blinkdl", "hf"])
def test_bonus_of_5_0(look: Any, hugging_face: bool) -> None:
    make = hf_state_dict if hugging_face else blinkdl_state_dict
    assert look(make("5.0", bonus="time_first")).bonus_is_exponential
    assert not look(make("5.0", bonus="time_faaaa")).bonus_is_exponential
    assert not look(make("4")).bonus_is_exponential


def test_channel_mix_width_is_read_not_computed(look: Any) -> None:
    state = blinkdl_state_dict("5.2")
    for i in range(2):
        state[f"blocks.{i}.ffn.key.weight"] = torch.randn(52, 32)
        state[f"blocks.{i}.ffn.value.weight"] = torch.randn(32, 52)
    assert look(state).F == 52


def test_null_intermediate_size_and_head_size_as_heads(look: Any) -> None:
    config = hf_config("5.2", D=256, head_size=64)
    assert config["intermediate_size"] is None
    assert config["num_attention_heads"] == 64
    found = look(hf_state_dict("5.2", D=256, head_size=64), config)
    assert sizes(found) == (2, 256, 4, 64, 896, 64)


def test_epsilons_come_from_the_configuration(look: Any) -> None:
    state = hf_state_dict("5.2")
    found = look(state, hf_config("5.2") | {"layer_norm_epsilon": 1e-6, "head_size_divisor": 1})
    assert (found.layer_norm_epsilon, found.group_norm_epsilon) == (1e-6, 1e-5)
    unsaid = look(state, hf_config("5.2") | {"layer_norm_epsilon": None, "head_size_divisor": None})
    assert (unsaid.layer_norm_epsilon, unsaid.group_norm_epsilon) == (1e-5, 64e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"layer_norm_epsilon": "small"},
        {"layer_norm_epsilon": float("nan")},
        {"layer_norm_epsilon": float("inf")},
        {"layer_norm_epsilon": 0},
        {"layer_norm_epsilon": -1e-5},
        {"layer_norm_epsilon": True},
        {"head_size_divisor": 1e200},
        {"head_size_divisor": 10**400},
        {"head_size_divisor": float("nan")},
        {"head_size_divisor": 0},
        {"head_size_divisor": 1e-200},
        {"head_size_divisor": [8]},
        {"num_hidden_layers": 10**12},
        {"num_hidden_layers": -1},
        {"vocab_size": 0},
        {"hidden_size": 1e3},
    ],
    ids=str,
)
def test_impossible_numbers_of_the_configuration(look: Any, config: dict[str, Any]) -> None:
    (name,) = config
    with pytest.raises(CheckpointError, match=rf"config\.json .*{name} = ") as caught:
        look(hf_state_dict("5.2"), hf_config("5.2") | config)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("version", "name", "shape"),
    [
        ("4", "blocks.0.att.time_mix_k", (32,)),
        ("4", "blocks.1.ffn.time_mix_r", (1, 32)),
        ("4", "blocks.0.att.time_decay", (1, 1, 32)),
        ("4", "blocks.1.att.time_first", (32, 1)),
        ("5.0", "blocks.0.att.time_decay", (4, 1, 1)),
        ("5.1", "blocks.1.att.time_faaaa", (4, 1, 1)),
        ("5.1", "blocks.0.att.time_decay", (4, 1)),
        ("5.2", "blocks.0.att.time_decay", (4, 8, 1)),
        ("5.2", "blocks.1.att.time_faaaa", (4, 8, 1)),
        ("5.2", "blocks.1.att.time_mix_g", (32,)),
        ("6", "blocks.1.att.time_maa_g", (32,)),
        ("6", "blocks.0.att.time_maa_x", (1, 32)),
        ("6", "blocks.0.att.time_decay", (32,)),
        ("6", "blocks.1.ffn.time_maa_k", (32,)),
        ("7", "blocks.1.att.x_g", (32,)),
        ("7", "blocks.0.att.w0", (32,)),
        ("7", "blocks.1.att.v0", (1, 32)),
        ("7", "blocks.0.att.k_a", (32,)),
        ("7", "blocks.1.ffn.x_k", (32,)),
    ],
)
def test_vectors_with_other_dimensions_of_size_one(
    look: Any, version: str, name: str, shape: tuple[int, ...]
) -> None:
    state = blinkdl_state_dict(version)
    state[name] = state[name].reshape(shape)
    found = look(state)
    assert found.version == version
    assert found.unusual_shapes == {name: shape}


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("blocks.1.att.tiny_q.weight", "tiny attention"),
        ("blocks.0.att.tiny_ln.weight", "tiny attention"),
        ("blocks.0.pos_emb_x", "position embeddings"),
        ("head_q.weight", "copying head"),
        ("blocks.0.ffnPre.key.weight", "in the place of the first time mix"),
        ("blocks.0.att.surprise", ""),
        ("optimizer.step", ""),
        ("blocks.0.att.time_first", ""),
    ],
)
def test_leftover(look: Any, name: str, meaning: str) -> None:
    message = refused(look, blinkdl_state_dict("5.2") | {name: torch.zeros(3)})
    assert f"left over {name}" in message
    assert meaning in message


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("hugging_face", [False, True], ids=["blinkdl", "hf"])
def test_any_missing_tensor_is_named(look: Any, version: str, hugging_face: bool) -> None:
    state = (hf_state_dict if hugging_face else blinkdl_state_dict)(version)
    for name in state:
        if hugging_face and ".1." in name and name.replace(".1.", ".0.") in state:
            continue  # as in the other layout
        without = {key: tensor for key, tensor in state.items() if key != name}
        message = refused(look, without, quick=True)
        assert f"missing {name}" in message


def test_missing_and_leftover_together(look: Any) -> None:
    state = blinkdl_state_dict("4")
    state["blocks.0.att.key.wieght"] = state.pop("blocks.0.att.key.weight")
    message = refused(look, state)
    assert "missing blocks.0.att.key.weight; left over blocks.0.att.key.wieght" in message


def test_missing_block(look: Any) -> None:
    state = blinkdl_state_dict("5.2", layers=3)
    without = {name: tensor for name, tensor in state.items() if ".1." not in name}
    message = refused(look, without)
    assert "missing blocks.1.att" in message
    assert "more" in message
    far = state | {"blocks.9999999999.ln1.weight": torch.zeros(32)}
    assert "block 9999999999" in refused(look, far)


@pytest.mark.parametrize("version", VERSIONS)
def test_any_wrong_shape_is_named(look: Any, version: str) -> None:
    state = blinkdl_state_dict(version)
    for name, tensor in state.items():
        if version != "5.2" and ".1." in name and name.replace(".1.", ".0.") in state:
            continue  # as in 5.2
        if version == "7" and name.endswith("1.att.v1"):
            continue  # one of two that tell this rank
        wrong = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1)
        message = refused(look, state | {name: wrong}, quick=True)
        told = {"time_decay": version != "4", "time_faaaa": version == "6", "r_k": True}.get(
            name.removeprefix("blocks.0.att.")
        )
        if told:
            last = name.rpartition(".")[2]
            assert f"{last} has the shape {list(wrong.shape)}" in message or "wrong shapes" in message
        else:
            assert f"{name} is {list(wrong.shape)} instead of {list(tensor.shape)}" in message


@pytest.mark.parametrize(
    ("version", "name", "shape"),
    [
        ("7", "blocks.1.att.v1", (32, 3)),
        ("7", "blocks.1.att.v2", (3, 32)),
        ("7", "blocks.0.att.w1", (32, 3)),
        ("7", "blocks.0.att.r_k", (2, 16)),
        ("7", "blocks.0.ffn.key.weight", (60, 32)),
        ("6", "blocks.0.att.time_maa_w1", (32, 35)),
        ("6", "blocks.2.att.time_maa_w1", (32, 35)),
        ("6", "blocks.0.att.time_maa_w2", (5, 3, 32)),
        ("6", "blocks.0.att.time_decay_w1", (32, 3)),
        ("6", "blocks.0.att.time_faaaa", (2, 16)),
        ("5.2", "blocks.0.att.time_decay", (2, 16)),
        ("5.2", "blocks.0.ffn.value.weight", (32, 90)),
        ("4", "blocks.0.ffn.key.weight", (90, 32)),
    ],
)
def test_one_wrong_shape_is_the_only_one_named(
    look: Any, version: str, name: str, shape: tuple[int, ...]
) -> None:
    """What all layers have is what most of them say; the odd one is named, and once."""
    state = blinkdl_state_dict(version, layers=3)
    message = refused(look, state | {name: torch.zeros(shape)}, quick=True)
    expected = f"has wrong shapes: {name} is {list(shape)} instead of {list(state[name].shape)}; use an undamaged copy"
    assert expected in message


@pytest.mark.parametrize(
    ("version", "shapes", "sizes_of"),
    [
        ("7", {"w1": (32, 3), "w2": (3, 32)}, "decay rank"),
        ("7", {"v1": (32, 3), "v2": (3, 32), "g1": (32, 4), "g2": (4, 32)}, "gate rank and residual rank"),
        ("6", {"time_maa_w1": (32, 35), "time_maa_w2": (5, 7, 32)}, "mix rank"),
    ],
)
def test_other_ranks_in_one_layer(
    look: Any, version: str, shapes: dict[str, tuple[int, ...]], sizes_of: str
) -> None:
    odd = {f"blocks.1.att.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    message = refused(look, blinkdl_state_dict(version, layers=3) | odd, quick=True)
    assert message.endswith(f"; all layers must have the same {sizes_of}")


def test_layer_0_tells_no_rank_of_what_it_does_not_read(look: Any) -> None:
    state = blinkdl_state_dict("7", layers=3, unused=True)
    odd = {"blocks.0.att.v1": torch.zeros(32, 3), "blocks.0.att.v2": torch.zeros(3, 32)}
    message = refused(look, state | odd)
    assert (
        "wrong shapes: blocks.0.att.v1 is [32, 3] instead of [32, 7], blocks.0.att.v2 is [3, 32]" in message
    )
    assert "blocks.1" not in message


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blocks.0.ffn.key.weight", (32, 128)),
        ("blocks.1.att.key.weight", (1, 32, 32)),
        ("blocks.0.att.time_mix_k", (2, 16)),
        ("head.weight", (63, 32)),
        ("ln_out.bias", (0,)),
        ("emb.weight", (64,)),
        ("emb.weight", (64, 33)),
    ],
)
def test_wrong_shapes(look: Any, name: str, shape: tuple[int, ...]) -> None:
    assert name.split(".")[0] in refused(look, blinkdl_state_dict("4") | {name: torch.zeros(shape)})


def test_5_x_with_a_decay_per_channel_but_no_heads(look: Any) -> None:
    state = blinkdl_state_dict("5.1")
    for i in range(2):
        state[f"blocks.{i}.att.time_decay"] = torch.zeros(32)
    assert "time_decay has the shape [32]" in refused(look, state)
    state["blocks.0.att.time_decay"] = torch.zeros(5)
    assert "time_decay has the shape [5]" in refused(look, state)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised(look: Any, dtype: torch.dtype) -> None:
    state = blinkdl_state_dict("4")
    state["blocks.1.att.key.weight"] = torch.zeros(32, 32).to(dtype)
    message = refused(look, state)
    assert "blocks.1.att.key.weight" in message
    assert "unquantised" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_floating_dtypes(look: Any, dtype: torch.dtype) -> None:
    assert look(blinkdl_state_dict("5.2", dtype=dtype)).version == "5.2"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.0.att.gate_w1", r"is an RWKV-6a \(x060a, a low-rank gate\) model"),
        ("blocks.0.att.time_maa_rkvw_w1", r"is an RWKV-6b or 6c \(x060b, x060c, no gate\) model"),
        ("model.layers.0.self_attn.time_maa_w1", r"is an RWKV-6 in a Qwen \(QRWKV6\) model"),
        ("blocks.0.ffn.s_emb.weight", r"is an RWKV-7a or 7b \(deep embeddings\) model"),
        ("blocks.0.ffn.s1", r"is an RWKV-7a or 7b \(deep embeddings\) model"),
        ("blocks.0.rosa.x_q", "is an RWKV-8 model"),
        ("blocks.0.ffn.enn.weight", "is an RWKV-8 model"),
        ("blocks.0.att.time_alpha", "is an RWKV-1 model"),
        ("blocks.0.att.key.lora_A", "adapter"),
        ("blocks.0.att.key.weight_mx", "quantised by the rwkv package"),
        ("blocks.0.attention.key.weight", "without its head"),
        ("_strategy", "rewritten by the rwkv package"),
        ("model.blocks.0.time_mix.time_decay", "converted model already"),
    ],
)
def test_other_kinds_by_name(look: Any, tmp_path: Path, name: str, message: str) -> None:
    for state in (blinkdl_state_dict("5.2"), hf_state_dict("4")):
        # As safetensors too: there the names alone tell.
        save_file(state | {name: torch.zeros(2)}, tmp_path / "model.safetensors")
        with (
            open_checkpoint(resolve(parse_source(str(tmp_path / "model.safetensors")))) as checkpoint,
            pytest.raises(CheckpointError, match=message) as caught,
        ):
            detect(checkpoint)
        assert name in str(caught.value)


@pytest.mark.parametrize("name", ["emb.weight", "head.weight", "blocks.0.ffn.key.weight"])
def test_nothing_has_no_rows(look: Any, name: str) -> None:
    state = blinkdl_state_dict("4")
    if name == "emb.weight":
        state |= {"emb.weight": torch.zeros(0, 32), "head.weight": torch.zeros(0, 32)}
    else:
        state[name] = torch.zeros(0, 32)
    assert name in refused(look, state)


def test_initial_states(look: Any) -> None:
    """Part of a whole RWKV-5 model; alone, in part, or with RWKV-4 they are refused."""
    model = blinkdl_state_dict("5.2")
    heads, size = model["blocks.0.att.time_decay"].shape
    blocks = [name.split(".")[1] for name in model if name.endswith("att.time_decay")]
    states = {f"blocks.{i}.att.time_state": torch.zeros(heads, size, size) for i in blocks}
    assert look(model | states).has_initial_state and not look(model).has_initial_state
    assert "tuned initial states, not a whole model" in refused(look, states)
    states.pop("blocks.1.att.time_state")
    partly = refused(look, model | states)
    assert (
        "an incomplete tuned initial state: missing blocks.1.att.time_state; give one for every layer"
        in partly
    )
    assert "a tuned initial state of RWKV-4" in refused(look, blinkdl_state_dict("4") | states)


def test_the_unused_tensors_of_layer_0(look: Any) -> None:
    assert look(blinkdl_state_dict("7", unused=True)).own["unused_residual"]
    assert not look(blinkdl_state_dict("7")).own["unused_residual"]
    state = blinkdl_state_dict("7", unused=True)
    del state["blocks.0.att.v1"]
    assert "missing blocks.0.att.v1" in refused(look, state)
    state = hf_state_dict("7") | {"model.layers.0.attn.v_lora.lora.2.bias": torch.zeros(32)}
    assert "left over model.layers.0.attn.v_lora.lora.2.bias" in refused(look, state)


@pytest.mark.parametrize("hugging_face", [False, True], ids=["blinkdl", "hf"])
@pytest.mark.parametrize(("D", "head_size"), [(32, 8), (64, 64), (8, 4)])  # the last narrower than a rank
def test_ranks(look: Any, D: int, head_size: int, hugging_face: bool) -> None:
    make = hf_state_dict if hugging_face else blinkdl_state_dict
    found = look(make("7", D=D, head_size=head_size))
    assert {name: found.own[name] for name in found.own if name.endswith("rank")} == {
        "decay_rank": 5, "rate_rank": 6, "residual_rank": 7, "gate_rank": 9,
    }  # fmt: skip
    assert (D, D // head_size, head_size) == (found.D, found.H, found.N)


@pytest.mark.parametrize("wrapper", ["", "module.", "base_model.model.", "_orig_mod.module."])
def test_a_layout_that_begins_as_a_wrapper_does(look: Any, wrapper: str) -> None:
    """``model.`` is a part of flash-linear-attention's names, and of nobody else's."""
    state = {wrapper + name: tensor for name, tensor in hf_state_dict("7").items()}
    assert look(state, hf_config("7")).layout == "fla"
    assert look({f"model.{name}": t for name, t in blinkdl_state_dict("7").items()}).layout == "blinkdl"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"attn": {"layers": [1]}}, r"attn = .*only None is understood"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': only 'sqrelu' is understood"),
        ({"norm_first": False}, "norm_first = False: only True is understood"),  # no ln0 there, though stored
        ({"norm_bias": False}, "norm_bias = False: only True is understood"),
        ({"norm_eps": 0}, "norm_eps = 0; it must be above 0"),
    ],
)
def test_what_a_configuration_of_fla_says(look: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        look(hf_state_dict("7"), hf_config("7") | config)
    found = look(hf_state_dict("7"), hf_config("7") | {"norm_eps": 1e-6})
    assert (found.layer_norm_epsilon, found.group_norm_epsilon) == (1e-6, 8e-6)


def test_rwkv6_in_the_layout_of_fla(look: Any) -> None:
    found = look(fla_state_dict_of_6(), {"model_type": "rwkv6", "norm_eps": 1e-6})
    assert (found.version, found.layout, found.own) == ("6", "fla", {"mix_rank": 6, "decay_rank": 5})
    assert (found.layer_norm_epsilon, found.group_norm_epsilon) == (1e-6, 1e-6)  # what that library computes
    found = look(fla_state_dict_of_6(), {"norm_eps": 1e-5, "head_size_divisor": 8})  # what our exports say
    assert (found.layer_norm_epsilon, found.group_norm_epsilon) == (1e-5, 64e-5)
    for name in list(fla_state_dict_of_6()):
        without = {key: tensor for key, tensor in fla_state_dict_of_6().items() if key != name}
        assert f"missing {name}" in refused(look, without, quick=True)
    halved = fla_state_dict_of_6() | {"model.layers.0.attn.k_proj.linear.weight": torch.zeros(16, 32)}
    assert "k_proj.linear.weight is [16, 32] instead of [32, 32]" in refused(
        look, halved, quick=True
    )  # expand_k = 0.5
    with pytest.raises(CheckpointError, match=r"attn = .*only None is understood"):
        look(fla_state_dict_of_6(), {"attn": {"layers": [1]}}, quick=True)
    with pytest.raises(CheckpointError, match=r"norm_first = False: only True"):
        look(fla_state_dict_of_6(), {"norm_first": False}, quick=True)


@pytest.mark.parametrize(("D", "head_size"), [(32, 8), (64, 64), (16, 4)])
def test_ranks_of_rwkv6(look: Any, D: int, head_size: int) -> None:
    for make in (blinkdl_state_dict, hf_state_dict, lambda _, **sizes: fla_state_dict_of_6(**sizes)):
        found = look(make("6", D=D, head_size=head_size))
        assert found.own == {"mix_rank": 6, "decay_rank": 5}
        assert (D, D // head_size, head_size) == (found.D, found.H, found.N)


@pytest.mark.parametrize(
    ("gone", "added"),
    [
        (("gate.weight",), ("gate_w1", "gate_w2")),
        (("gate.weight", "time_maa_g", "time_maa_w1"), ("time_maa_rkvw_w1", "time_maa_rkvw_w2")),
        (("gate.weight", "time_decay"), ()),
    ],
    ids=["x060a", "x060c", "x060b of others"],
)
def test_variants_of_x060(look: Any, gone: tuple[str, ...], added: tuple[str, ...]) -> None:
    """Other models that a trainer calls x060 and something: refused, in one line."""
    state = {name: tensor for name, tensor in blinkdl_state_dict("6").items() if not name.endswith(gone)} | {
        f"blocks.{i}.att.{name}": torch.zeros(32, 8) for i in range(2) for name in added
    }
    message = refused(look, state)
    assert "RWKV-6" in message and ("model" in message or "missing" in message)


@pytest.mark.parametrize("shape", [(6, 32), (6, 1, 1, 32)])
def test_the_first_version_of_fla(look: Any, shape: tuple[int, ...]) -> None:
    """Its six mixes are one tensor."""
    found = look(packed_state_dict(shape), hf_config("7"))
    assert (found.version, found.layout, sizes(found)) == ("7", "fla-x_x", (2, 32, 4, 8, 128, 64))
    mixed = hf_state_dict("7") | {"model.layers.0.attn.x_x": torch.zeros(6, 32)}
    assert "flash-linear-attention's later versions beside its first one's attn.x_x" in refused(look, mixed)
    wrong = packed_state_dict(shape) | {"model.layers.1.attn.x_x": torch.zeros(5, 32)}
    assert "model.layers.1.attn.x_x is [5, 32] instead of [6, 32]" in refused(look, wrong)


@pytest.mark.parametrize(
    ("field", "value", "tensor"),
    [
        ("hidden_size", 64, r"model\.embeddings\.weight is \[64, 32\]: hidden_size would be 32"),
        ("vocab_size", 63, r"model\.embeddings\.weight is \[64, 32\]: vocab_size would be 64"),
        ("head_dim", 16, r"model\.layers\.0\.attn\.r_k is \[4, 8\]: head_dim would be 8"),
        ("num_heads", 8, r"model\.layers\.0\.attn\.r_k is \[4, 8\]: num_heads would be 4"),
        ("decay_low_rank_dim", 64, r"attn\.w_lora\.lora\.0\.weight is \[5, 32\]: .* would be 5"),
        ("a_low_rank_dim", 64, r"attn\.a_lora\.lora\.0\.weight is \[6, 32\]: .* would be 6"),
        (
            "v_low_rank_dim",
            64,
            r"model\.layers\.1\.attn\.v_lora\.lora\.0\.weight is \[7, 32\]: .* would be 7",
        ),
        ("gate_low_rank_dim", 64, r"attn\.g_lora\.lora\.0\.weight is \[9, 32\]: .* would be 9"),
        ("num_hidden_layers", 3, r"there are 2 blocks \(model\.layers\.0 to 1\)"),
        ("intermediate_size", 96, r"model\.layers\.0\.ffn\.key\.weight is \[128, 32\]: .* would be 128"),
        ("hidden_ratio", 3.0, r"model\.layers\.0\.ffn\.key\.weight is \[128, 32\]: hidden_ratio would be 4"),
        ("head_dim", "8", r"attn\.r_k is \[4, 8\]: head_dim would be 8"),
    ],
)
def test_a_configuration_of_fla_that_contradicts_its_tensors(
    look: Any, field: str, value: object, tensor: str
) -> None:
    with pytest.raises(
        CheckpointError, match=rf"config\.json says {field} = {value!r}, and .*{tensor}"
    ) as caught:
        look(hf_state_dict("7"), hf_config("7") | {field: value})
    assert "\n" not in str(caught.value)


def test_what_a_configuration_of_fla_may_leave_open(look: Any) -> None:
    names = ("num_heads", "head_dim", "intermediate_size", "hidden_ratio", "vocab_size", "v_low_rank_dim")
    assert look(hf_state_dict("7"), hf_config("7") | dict.fromkeys(names)).version == "7"
    assert look(hf_state_dict("7"), hf_config("7") | {"intermediate_size": 128, "hidden_ratio": 3.5}).F == 128
    rounded = {"hidden_ratio": 2.9}  # 92, and the next multiple of 32 is 96
    assert look(fla_state_dict_of_6(), {"model_type": "rwkv6"} | rounded).F == 96
    with pytest.raises(CheckpointError, match=r"proj_low_rank_dim = 32, and .*would be 6"):
        look(fla_state_dict_of_6(), {"model_type": "rwkv6", "proj_low_rank_dim": 32})


@pytest.mark.parametrize(
    ("version", "field", "value", "wanted"),
    [
        ("5.2", "head_size_divisor", "8", "it must be a number above 0.01 and below 100"),
        ("6", "head_size_divisor", "8", "it must be a number above 0.01 and below 100"),
        ("5.2", "layer_norm_epsilon", "1e-5", "it must be a number above 0 and below 1"),
        ("7", "norm_eps", "1e-5", "it must be a number above 0 and below 1"),
        ("5.2", "tie_word_embeddings", "true", "it must be true or false"),
        ("7", "tie_word_embeddings", "true", "it must be true or false"),
    ],
)
def test_numbers_that_are_text(look: Any, version: str, field: str, value: str, wanted: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json says {field} = {value!r}; {wanted}"):
        look(hf_state_dict(version), hf_config(version) | {field: value})


def test_not_rwkv(look: Any) -> None:
    message = refused(look, {"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)})
    assert "is not an RWKV model" in message
    assert "self_attn" in message


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("checkpoints/rwkv-4-docs-1.3M-ctx512.pth", ("4", 6, 128, 1, 128, 512, 256)),
        ("checkpoints/rwkv-5.2-docs-1.3M-ctx512.pth", ("5.2", 6, 128, 2, 64, 448, 256)),
        ("peer/tiny-rwkv-4v0-660K.pth", ("4", 4, 128, 1, 128, 256, 256)),
        ("checkpoints/rwkv-6-docs-1.3M-ctx512.pth", ("6", 6, 128, 2, 64, 448, 256)),
        ("checkpoints/rwkv-7-docs-1.3M-ctx512.pth", ("7", 6, 128, 2, 64, 512, 256)),
        ("peer/tiny-rwkv-5v2-730K.pth", ("5.2", 12, 64, 8, 8, 256, 256)),
        ("peer/tiny-rwkv-7v0-834K.pth", ("7", 12, 64, 1, 64, 256, 256)),
    ],
)
def test_trained_files(file: str, expected: tuple[Any, ...]) -> None:
    if not (SHARED / file).exists():
        pytest.skip("the shared checkpoints are not here")
    with open_checkpoint(resolve(parse_source(str(SHARED / file)))) as checkpoint:
        found = detect(checkpoint)
    assert (found.version, *sizes(found)) == expected


@pytest.mark.parametrize(
    ("name", "version"), [(f"rwkv-{version}", version) for version in ("4", "5.2", "6", "7")]
)
def test_bundled(name: str, version: str) -> None:
    with open_checkpoint(resolve(parse_source(f"bundled:{name}"))) as checkpoint:
        assert detect(checkpoint).version == version
