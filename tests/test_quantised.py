"""Frozen weights in 4 and 8 bits: exact gradients in every strategy, or refused by name.

Those of a GPU have the marker ``gpu``; the rest runs where bitsandbytes is installed, which has kernels for the CPU.
"""

import logging
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import english, relative_errors
from quantised_cases import (
    TARGETS,
    Heard,
    gradients,
    in_float64,
    quantised,
    stands_for,
    with_lora,
)
from torch import Tensor, nn

from rwkv_rev import RwkvRevForCausalLM, position_wise
from rwkv_rev.errors import CheckpointError, RwkvRevError, StrategyError
from rwkv_rev.foreign import quantised as ours

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2.5e-2}
"""Relative RMS error by float64, of the whole gradient."""
ROUNDED = 5e-2
"""The same where x is rounded to 8 bits: a number at the edge of two goes to the other one."""
STRATEGIES = ("full", "checkpoint", "reversible")
VERSIONS = ("4", "5.2", "6", "7")
"""Of trained models: with random weights a norm may divide by nearly nothing, where 16 bits are far from float64."""

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def device_is_there(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def whole_error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Relative RMS error of the whole gradient."""
    assert found.keys() == truth.keys()
    names = [name for name in truth if name != "loss"]
    error = sum(float((found[n].double() - truth[n].double()).square().sum()) for n in names)
    return (error / sum(float(truth[n].double().square().sum()) for n in names)) ** 0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ours.KINDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_gradient(
    shallow: dict[str, Path],
    version: str,
    kind: str,
    dtype: torch.dtype,
    device: str,
    record_property: Any,
) -> None:
    """That of float64 by the weights that the bits stand for; the two sweeps agree to the bit."""
    model = quantised(shallow[version], kind, dtype, device)
    wrapped = with_lora(model)
    reference = in_float64(wrapped)
    truth = gradients(reference.base_model.model, reference, "full", 64)
    assert all(bool(gradient.any()) for gradient in truth.values())
    rounds = kind == "int8" and device == "cuda"
    allowed = max(TOLERANCE[dtype], ROUNDED if rounds else 0)
    found = {}
    for strategy in STRATEGIES:
        for length in (16,) if strategy == "full" else (16, 10):
            each = found[strategy, length] = gradients(model, wrapped, strategy, length)
            error = whole_error(each, truth)
            record_property(f"{strategy} {length}", error)
            print(f"RWKV-{version} {kind} {dtype} {device} {strategy} C={length}: {error:.2e}")
            assert error <= allowed, (strategy, length)
            assert abs(float(each["loss"]) / float(truth["loss"]) - 1) <= allowed
    for length in (16, 10):
        one, other = found["checkpoint", length], found["reversible", length]
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ours.KINDS)
def test_other_chunks_only_round_otherwise(shallow: dict[str, Path], kind: str, device: str) -> None:
    """Each row is computed by itself: the outputs of a part are those of the whole."""
    model = quantised(shallow["7"], kind, torch.float32, device)
    for layer in ours.maps_of(model):
        x = torch.randn(3, 40, layer.in_features, generator=torch.Generator().manual_seed(1)).to(device)
        x[0, 5] *= 100
        whole = layer(x)
        parts = torch.cat([layer(x[:, :7]), layer(x[:, 7:8]), layer(x[:, 8:])], dim=1)
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ours.KINDS)
def test_a_last_chunk_of_one_token(shallow: dict[str, Path], kind: str, device: str) -> None:
    """For one row of one token libraries have kernels of their own: not another one in the second sweep."""
    model = quantised(shallow["7"], kind, torch.float32, device)
    wrapped = with_lora(model)
    ids = english(81, 1)
    one = gradients(model, wrapped, "checkpoint", 40, ids)
    other = gradients(model, wrapped, "reversible", 40, ids)
    assert all(torch.equal(one[name], other[name]) for name in one)
    error = whole_error(other, gradients(model, wrapped, "full", 96, ids))
    print(f"RWKV-7 {kind} {device} last chunk of one token, to full: {error:.2e}")
    assert error <= (ROUNDED if kind == "int8" and device == "cuda" else 3e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_gradient_after_reading(shallow: dict[str, Path], training: bool, device: str) -> None:
    """bitsandbytes may pack weights for reading on a CPU: then no gradient comes through them."""
    model = quantised(shallow["7"], "nf4", torch.float32, device)
    wrapped = with_lora(model)
    expected = gradients(model, wrapped, "full", 64)
    wrapped.eval()
    with torch.no_grad():
        model(english(9).to(device))
    if training:
        wrapped.train()
    for strategy in STRATEGIES:
        assert whole_error(gradients(model, wrapped, strategy, 16), expected) <= TOLERANCE[torch.float32]


def test_packed_weights_are_refused(shallow: dict[str, Path]) -> None:
    """However they came to be packed."""
    model = quantised(shallow["7"], "nf4")
    wrapped = with_lora(model)
    layer: Any = next(ours.maps_of(model))
    layer.support_avx512bf16_for_cpu = True
    wrapped.eval()
    with pytest.raises(StrategyError, match=r"Linear4bit at .* packs its weights for reading on this CPU"):
        gradients(model, wrapped, "reversible", 16)
    wrapped.train()
    layer.weight.quant_state.packing_format_for_cpu = True
    for strategy in STRATEGIES:
        with pytest.raises(StrategyError, match="pack"):
            gradients(model, wrapped, strategy, 16)


@pytest.mark.parametrize("device", DEVICES)
def test_columns_chosen_by_all_tokens_are_refused_in_chunks(shallow: dict[str, Path], device: str) -> None:
    """LLM.int8() with its usual threshold."""
    model = quantised(shallow["7"], "int8", torch.float32, device, llm_int8_threshold=6.0)
    wrapped = with_lora(model)
    for strategy in ("checkpoint", "reversible", "truncated"):
        with pytest.raises(
            StrategyError, match=r"Linear8bitLt at .* llm_int8_threshold=0\.0.*use bptt='full'"
        ):
            gradients(model, wrapped, strategy, 16)
    assert gradients(model, wrapped, "full", 16).keys()
    for layer in ours.maps_of(model):
        position_wise(layer)  # declared: exact for what the chunks compute
    one, other = (gradients(model, wrapped, strategy, 16) for strategy in ("checkpoint", "reversible"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_weights_rounded_in_each_call_are_refused(shallow: dict[str, Path]) -> None:
    model = quantised(shallow["5.2"], "int8", llm_int8_has_fp16_weight=True)
    with pytest.raises(StrategyError, match="has_fp16_weights"):
        gradients(model, with_lora(model), "reversible", 16)


def test_what_stays_in_float(shallow: dict[str, Path]) -> None:
    """Decays, mixes, bonuses, norms, embedding, head, and the narrow maps of the decay and of its like."""
    import bitsandbytes

    for version in VERSIONS:
        model = quantised(shallow[version], "nf4")
        maps = {name for name, module in model.named_modules() if ours.is_quantised(type(module))}
        assert {name.rpartition(".")[2] for name in maps} <= {"receptance", "key", "value", "gate", "output"}
        assert all(
            p.dtype == torch.float32
            for p in model.parameters()
            if not isinstance(p, bitsandbytes.nn.Params4bit)
        )
        plain = {name for name, module in model.named_modules() if type(module) is nn.Linear}
        assert plain == {"head"} | {name for name in plain if name.endswith(("_down", "_up"))}
    own = quantised(shallow["7"], "nf4", llm_int8_skip_modules=["head", ".*channel_mix"])
    maps = {name for name, module in own.named_modules() if ours.is_quantised(type(module))}
    assert "model.blocks.1.time_mix.decay_up" in maps and not any("channel_mix" in name for name in maps)


@pytest.mark.filterwarnings(
    "ignore:inner dimension .* is not aligned:UserWarning"
)  # of narrow maps, on a GPU
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("version", ["6", "7"])
def test_gradient_where_every_map_is_quantised(shallow: dict[str, Path], version: str, device: str) -> None:
    """The head and the narrow maps, too, if somebody wants that."""
    model = quantised(shallow[version], "nf4", torch.float32, device, llm_int8_skip_modules=["no such"])
    assert ours.is_quantised(type(model.head))
    wrapped = with_lora(model, [*TARGETS, "decay_up", "decay_down"])
    reference, plain = in_float64(wrapped), in_float64(wrapped, torch.float32)
    truth = gradients(reference.base_model.model, reference, "full", 64)
    control = whole_error(gradients(plain.base_model.model, plain, "full", 64), truth)
    print(f"RWKV-{version} every map {device}, float maps: {control:.2e}")
    for strategy in STRATEGIES:
        error = whole_error(gradients(model, wrapped, strategy, 16), truth)
        print(f"RWKV-{version} every map {device} {strategy}: {error:.2e}")
        assert error <= max(TOLERANCE[torch.float32], 1.5 * control), strategy


@pytest.mark.parametrize("kind", ours.KINDS)
@pytest.mark.parametrize("device", DEVICES)
def test_quantise_is_what_transformers_does(shallow: dict[str, Path], kind: str, device: str) -> None:
    theirs = quantised(shallow["7"], kind, torch.float32, device)
    model = RwkvRevForCausalLM.from_pretrained(shallow["7"], dtype=torch.float32)
    ours.quantise(model, kind, torch.float32, torch.device(device))
    pairs = list(zip(ours.maps_of(model), ours.maps_of(theirs), strict=True))
    assert pairs
    for one, other in pairs:
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(stands_for(one), stands_for(other))


@pytest.mark.parametrize("kind", ours.KINDS)
def test_bytes(shallow: dict[str, Path], kind: str) -> None:
    """What is forecast is what there is."""
    model = quantised(shallow["7"], kind)
    maps = list(ours.maps_of(model))
    total = 0
    for layer in maps:
        weight: Any = layer.weight
        if kind == "nf4":
            state = weight.quant_state
            assert ours.numbers_in(weight) == layer.in_features * layer.out_features
            total += weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
        else:
            total += weight.nbytes + weight.SCB.nbytes
    assert ours.bytes_of(kind, [(one.out_features, one.in_features) for one in maps]) == total


@pytest.mark.parametrize("device", DEVICES)
def test_prepared_for_training_by_peft(shallow: dict[str, Path], device: str) -> None:
    """With all that ``prepare_model_for_kbit_training`` does: gradient checkpointing, and inputs that want one."""
    from peft import prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(quantised(shallow["7"], "nf4", torch.bfloat16, device))
    wrapped = with_lora(model)
    reference = in_float64(wrapped)
    truth = gradients(reference.base_model.model, reference, "full", 64)
    for strategy in STRATEGIES:
        error = whole_error(gradients(model, wrapped, strategy, 16), truth)
        print(f"RWKV-7 prepared {device} {strategy}: {error:.2e}")
        assert error <= TOLERANCE[torch.bfloat16], strategy


@pytest.mark.parametrize("device", DEVICES)
def test_initial_state(shallow: dict[str, Path], device: str) -> None:
    """State tuning of a quantised model."""
    model = quantised(shallow["5.2"], "nf4", torch.float32, device)
    model.add_initial_state()
    assert model.model.initial_wkv is not None
    model.model.initial_wkv.requires_grad_(True)
    expected = gradients(model, model, "full", 64)
    assert len(expected) > 1
    for strategy in ("checkpoint", "reversible"):
        assert whole_error(gradients(model, model, strategy, 16), expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("device", DEVICES)
def test_a_loss_of_ones_own(shallow: dict[str, Path], device: str) -> None:
    """Hidden states in sweeps, for somebody else's loss."""
    model = quantised(shallow["7"], "nf4", torch.float32, device)
    wrapped = with_lora(model)
    ids = english(48, 2).to(device)
    found = []
    for strategy in ("full", "reversible"):
        wrapped.zero_grad()
        with model.set_bptt(strategy, chunk_length=16):
            wrapped(input_ids=ids).logits.square().mean().backward()
        found.append({n: p.grad.clone() for n, p in wrapped.named_parameters() if p.grad is not None})
    assert max(relative_errors(found[1], found[0]).values()) <= 1e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ours.KINDS)
@torch.no_grad()
def test_generation(shallow: dict[str, Path], kind: str, device: str) -> None:
    """With the state carried: the tokens that reading everything again gives."""
    model = quantised(shallow["7"], kind, torch.float32, device).eval()
    ids = english(12).to(device)
    kept = model.generate(ids, max_new_tokens=6, do_sample=False)
    again = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(kept, again)


@pytest.mark.parametrize("device", DEVICES)
def test_dora(shallow: dict[str, Path], device: str) -> None:
    """LoRA's variant that reads the weights: peft looks up what the bits stand for."""
    model = quantised(shallow["5.2"], "nf4", torch.float32, device)
    wrapped = with_lora(model, use_dora=True)
    expected = gradients(model, wrapped, "full", 64)
    for strategy in ("checkpoint", "reversible"):
        assert whole_error(gradients(model, wrapped, strategy, 16), expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("kind", ours.KINDS)
def test_saved_in_few_bits(shallow: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """transformers' own folder: loaded as it was, trained beside, and no folder for commands, which say so."""
    from transformers import AutoModelForCausalLM

    from rwkv_rev.converters.converted import ConvertedModel

    model, ids = quantised(shallow["5.2"], kind), english(30)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").requires_grad_(False).train()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    one, other = (gradients(m, with_lora(m), "reversible", 16) for m in (model, loaded))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(CheckpointError, match="give the folder of the float model they were made of"):
        ConvertedModel(tmp_path / "saved")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ours.KINDS)
def test_recorded_launches(shallow: dict[str, Path], kind: str) -> None:
    """A chunk's launches can be recorded and replayed: later steps give what the first gave."""
    model = quantised(shallow["7"], kind, torch.bfloat16, "cuda")
    wrapped = with_lora(model)
    ids = english(512, 1)
    first, *later = (gradients(model, wrapped, "reversible", 64, ids) for _ in range(4))
    for each in later:
        assert all(torch.equal(first[name], each[name]) for name in first)
    checkpoint = gradients(model, wrapped, "checkpoint", 64, ids)
    assert all(torch.equal(first[name], checkpoint[name]) for name in first)


def test_messages_once(shallow: dict[str, Path]) -> None:
    """bitsandbytes says in every call that int8 goes through float16."""
    log, heard = logging.getLogger("bitsandbytes.autograd._functions"), Heard()
    log.addHandler(heard)
    try:
        model = quantised(shallow["7"], "int8").eval()
        with torch.no_grad():
            model(english(9))
    finally:
        log.removeHandler(heard)
    assert len(heard.said) == len(set(heard.said))


def test_refused_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    ours.refuse_unusable("nf4", cpu)
    with pytest.raises(RwkvRevError, match="not on mps"):
        ours.refuse_unusable("nf4", torch.device("mps"))
    monkeypatch.setattr(metadata, "version", lambda name: "0.49.3")
    with pytest.raises(RwkvRevError, match=r"bitsandbytes 0\.50 or newer, not 0\.49\.3: pip install"):
        ours.refuse_unusable("nf4", cpu)

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(RwkvRevError, match=r"needs bitsandbytes: pip install 'bitsandbytes>=0\.50'"):
        ours.refuse_unusable("int8", cpu)
