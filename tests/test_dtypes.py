"""Which parameter has which dtype: the same however a model comes to be."""

from pathlib import Path

import pytest
import torch
from bptt_cases import VERSIONS, random_tokens, tiny_model
from pairwise import every_two
from transformers import AutoModel, AutoModelForCausalLM

from rwkv_rev import RwkvRevForCausalLM
from rwkv_rev.errors import ConfigError

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


def decays(model: RwkvRevForCausalLM) -> None:
    for name, parameter in model.blocks[1].time_mix.named_parameters():
        if "decay" in name:
            parameter.data = parameter.data.double()


ODD = {
    "blocks.1.ln1.weight is bfloat16": lambda model: model.blocks[1].to(torch.bfloat16),
    "embeddings.weight is bfloat16": lambda model: model.model.embeddings.to(torch.bfloat16),
    "ln_out.weight is float64": lambda model: model.model.ln_out.double(),
    "head.weight is bfloat16": lambda model: model.head.to(torch.bfloat16),
    "blocks.1.time_mix.mix_before_decay is float64": decays,
}
WAYS = ("no gradient", "full", "checkpoint", "reversible", "truncated", "a loss of one's own")


@pytest.mark.parametrize(("way", "odd", "version"), every_two(WAYS, ODD, ("6", "7")), ids=str)
def test_mixed_dtypes_name_a_parameter(way: str, odd: str, version: str) -> None:
    """One line, in the place of PyTorch's error, which stands behind it."""
    model, ids = tiny_model(version), random_tokens(24)
    ODD[odd](model)
    model.set_bptt(way if way in ("full", "checkpoint", "truncated") else "reversible", chunk_length=8)
    labels = None if way in ("no gradient", "a loss of one's own") else ids
    message = f"of another dtype .* model, which is float32: (model.)?{odd}; call model.to.torch.float32.$"
    with torch.set_grad_enabled(way != "no gradient"):
        with pytest.raises(ConfigError, match=message) as caught:
            model(ids, labels=labels)
        assert "\n" not in str(caught.value)
        assert type(caught.value.__cause__) is RuntimeError
        model.float()(ids, labels=labels)


def test_embeddings_of_another_dtype_than_the_model() -> None:
    model = tiny_model("7")
    given = torch.randn(1, 8, model.config.hidden_size, dtype=torch.bfloat16)
    with pytest.raises(
        ConfigError, match=r"inputs_embeds are bfloat16, .* float32: give inputs_embeds.to\(torch"
    ):
        model(inputs_embeds=given)


@torch.no_grad()
def test_mixed_dtypes_explain_no_other_error() -> None:
    """What is raised stays as it is where dtypes are not its subject, or do not differ."""
    model, ids = tiny_model("7"), random_tokens(8)
    for text, dtype in (("out of something", torch.bfloat16), ("expected the same dtype", torch.float32)):
        error = RuntimeError(text)

        def fail(*_: object, error: RuntimeError = error) -> None:
            raise error

        hook = model.model.ln0.register_forward_pre_hook(fail)
        model.head.to(dtype)
        with pytest.raises(RuntimeError) as caught:
            model(ids)
        assert caught.value is error
        hook.remove()
