"""The converted model in float64, a block at a time, is the model in float64 and the scan of its original."""

from pathlib import Path

import pytest
import torch
from foreign import VERSIONS, blinkdl_state_dict, scan_of
from safetensors.torch import load_file, save_file

from rwkv_rev import RwkvRevForCausalLM, convert
from rwkv_rev.converters.converted import ConvertedModel
from rwkv_rev.equivalence.float64 import float64_logits, float64_streams
from rwkv_rev.equivalence.naive_model import naive_logits, residual_streams

TOKENS = torch.randint(64, (150,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_streams_and_logits(tmp_path: Path, version: str, dtype: torch.dtype) -> None:
    tensors = blinkdl_state_dict(version, dtype=dtype)
    torch.save(tensors, tmp_path / "source.pth")
    directory = convert(str(tmp_path / "source.pth"), tmp_path / "model", tokenizer="none").directory
    model = RwkvRevForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with ConvertedModel(directory) as stored:
        found = dict(float64_streams(model, stored, TOKENS))
        logits = torch.cat(list(float64_logits(model, stored, TOKENS)))
    expected = dict(residual_streams(tensors, TOKENS, scan=scan_of(version)))
    assert list(found) == list(expected)
    for place, stream in found.items():
        assert stream.dtype == torch.float64
        torch.testing.assert_close(stream, expected[place], rtol=1e-11, atol=1e-11)
    truth = torch.cat(list(naive_logits(tensors, TOKENS, scan=scan_of(version))))
    torch.testing.assert_close(logits, truth, rtol=1e-11, atol=1e-11)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_initial_state(tmp_path: Path) -> None:
    torch.save(blinkdl_state_dict("5.2"), tmp_path / "source.pth")
    directory = convert(str(tmp_path / "source.pth"), tmp_path / "model", tokenizer="none").directory
    model = RwkvRevForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    model.add_initial_state()
    with torch.no_grad():
        for state in model.model.initial_wkv:
            state.copy_(torch.randn(state.shape, generator=torch.Generator().manual_seed(2)))
        expected = model(TOKENS[None]).logits[0]
    model.save_pretrained(tmp_path / "tuned")
    with ConvertedModel(tmp_path / "tuned") as stored:
        logits = torch.cat(list(float64_logits(model, stored, TOKENS)))
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11)


def test_the_stored_values_count(tmp_path: Path) -> None:
    torch.save(blinkdl_state_dict("4"), tmp_path / "source.pth")
    directory = convert(str(tmp_path / "source.pth"), tmp_path / "model", tokenizer="none").directory
    model = RwkvRevForCausalLM.from_pretrained(directory).eval()
    with ConvertedModel(directory) as stored:
        before = torch.cat(list(float64_logits(model, stored, TOKENS)))
    tensors = load_file(directory / "model.safetensors")
    tensors["model.blocks.1.time_mix.key.weight"][0, 0] += 1
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with ConvertedModel(directory) as stored:
        after = torch.cat(list(float64_logits(model, stored, TOKENS)))
    assert (after - before).abs().max() > 1e-3
