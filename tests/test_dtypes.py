"""Which parameter has which dtype: the same however a model comes to be."""

from pathlib import Path

import pytest
import torch
from bptt_cases import VERSIONS, random_tokens, tiny_model
from pairwise import every_two
from transformers import AutoModel, AutoModelForCausalLM

from rwkv_rev import RwkvRevForCausalLM

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def dtypes_of(model: torch.nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("dtype", "version", "tied"), every_two(DTYPES, VERSIONS, (True, False)), ids=str)
def test_construction_gives_what_loading_gives(
    tmp_path: Path, dtype: torch.dtype, version: str, tied: bool
) -> None:
    """Decays act through a double exponential: they stay float32, or float64 in a float64 model.

    Every two of a dtype, a version and whether the head is the embedding meet.
    """
    model = tiny_model(version, tie_word_embeddings=tied)
    if version != "4":
        model.add_initial_state()
    model.save_pretrained(tmp_path)
    wide = model.config.architecture.float32
    for auto, base in ((AutoModelForCausalLM, model), (AutoModel, model.model)):
        loaded = dtypes_of(auto.from_pretrained(tmp_path, dtype=dtype))
        made = dtypes_of(auto.from_config(base.config, dtype=dtype))
        assert made == loaded
        for name, found in loaded.items():
            narrow = dtype in (torch.float16, torch.bfloat16)
            kept = narrow and not {*wide, "initial_wkv"}.isdisjoint(name.split("."))
            assert found == (torch.float32 if kept else dtype), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_default_dtype_and_a_device(dtype: torch.dtype) -> None:
    """Made without transformers' help, and on no device."""
    config = tiny_model("5.2").config
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        made = dtypes_of(RwkvRevForCausalLM(config))
        with torch.device("meta"):
            assert dtypes_of(RwkvRevForCausalLM(config)) == made
    finally:
        torch.set_default_dtype(before)
    assert made == dtypes_of(AutoModelForCausalLM.from_config(config, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_initial_state_that_is_added(dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_config(tiny_model("5.2").config, dtype=dtype)
    model.add_initial_state()
    assert {p.dtype for p in model.model.initial_wkv} == {
        torch.float64 if dtype == torch.float64 else torch.float32
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_fresh_model_decays_as_in_float32(dtype: torch.dtype) -> None:
    """Initial decays are not rounded, and the model runs."""
    torch.manual_seed(0)
    expected = AutoModelForCausalLM.from_config(tiny_model("5.2").config)
    made = AutoModelForCausalLM.from_config(tiny_model("5.2").config, dtype=dtype)
    for block, other in zip(made.blocks, expected.blocks, strict=True):
        assert torch.equal(block.time_mix.time_decay, other.time_mix.time_decay)
    tokens = random_tokens(12)
    made.train()(tokens, labels=tokens).loss.backward()
    assert made.blocks[0].time_mix.time_decay.grad.dtype == torch.float32
