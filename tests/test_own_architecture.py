"""An architecture from outside of the package, with two memories in a cell, through every part that takes one."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import differentiate, random_like, random_state, random_tokens, relative_errors
from contract_laws import LAWS, Trial, chunks
from finetune_cases import counting_text, finetune, settings
from safetensors.torch import load_file
from test_linear_attention import filled
from torch import Tensor
from toy_architecture import TWO_SUMS, Two, TwoState, TwoSums, loop

import rwkv_rev
from rwkv_rev.architectures import registry
from rwkv_rev.architectures.scan import Scan, SubLayer
from rwkv_rev.cells.mask import ChunkMask
from rwkv_rev.fresh import init


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "ARCHITECTURES", dict(registry.ARCHITECTURES))
    registry.register(TWO_SUMS)


@pytest.mark.parametrize("law", LAWS)
def test_laws(law: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start = Two(*(torch.randn(2, size, generator=generator, dtype=torch.float64) for size in (12, 36)))
    LAWS[law](Trial(filled(TwoSums(12, 3)).double(), start, chunks(12, 2, 4)))


def test_gradients() -> None:
    model = rwkv_rev.RwkvRevForCausalLM(
        rwkv_rev.RwkvRevConfig(
            rwkv_version="two-sums", hidden_size=12, num_hidden_layers=3, vocab_size=32, times=3, **sizes()
        )
    )
    model = filled(model).double().train()
    ids, mask = random_tokens(60, batch=2), torch.ones(2, 60, dtype=torch.long)
    mask[0, :9], mask[1, 20:41] = 0, 0
    state = random_state(model, 2)
    assert isinstance(state, TwoState) and state.broad.shape == (3, 2, 36)
    given = {
        "input_ids": ids,
        "attention_mask": mask,
        "state": state,
        "final_state_gradient": random_like(state),
    }
    full = differentiate(model, "full", **given)
    for strategy in ("reversible", "checkpoint", "reversible-lossy"):
        if strategy == "reversible-lossy":
            with pytest.raises(rwkv_rev.StrategyError, match="cannot be divided back; use 'reversible'"):
                differentiate(model, strategy, 8, **given)
            continue
        found = differentiate(model, strategy, 8, **given)
        assert max(relative_errors(found.gradients, full.gradients).values()) < 1e-10


def sizes() -> dict[str, int]:
    return TWO_SUMS.sizes(12)


def test_commands(tmp_path: Path) -> None:
    text = counting_text(tmp_path / "data.txt")
    init("two-sums", tmp_path / "model", settings={"hidden_size": 12, "num_hidden_layers": 2, "times": 3})
    found = rwkv_rev.inspect(tmp_path / "model")
    assert found.bits_forgotten == () and found.to_dict()["fields"] == {"times": 3}
    assert found.fields()["version"] == "two sums" and found.fields()["times"] == 3
    for tune in ("full", "lora", "state"):
        changes = {"tune": tune, "carry_state": tune == "full", "save_every": 2 if tune == "full" else 0}
        finetune(settings(tmp_path / "model", text, tmp_path / tune, **changes))
        report = rwkv_rev.verify(
            tmp_path / tune, tokens=60, reversal=True, gradients=True, context=100, chunk=20
        )
        assert report.passed, report.table()
        assert report.reversal.theory_bits is None and "theory" not in "".join(report.reversal.lines())
    assert rwkv_rev.evaluate(tmp_path / "full", [text], context_length=128).total.bits_per_byte < 9
    assert rwkv_rev.generate(tmp_path / "state", "7 sq", max_new_tokens=3, seed=0).startswith("7 sq")
    with pytest.raises(rwkv_rev.OutputError, match="no other tool reads models of two sums"):
        rwkv_rev.export(tmp_path / "full", tmp_path / "x.pth")


def test_without_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init("two-sums", tmp_path / "model", settings={"hidden_size": 12, "num_hidden_layers": 1})
    monkeypatch.delitem(registry.ARCHITECTURES, "two-sums")
    with pytest.raises(rwkv_rev.CheckpointError, match=r"rwkv_version = 'two-sums' must be one of 4, 5\.0"):
        rwkv_rev.inspect(tmp_path / "model")


def test_without_a_scan_what_needs_none_is_verified(tmp_path: Path) -> None:
    registry.register(replace(TWO_SUMS, version="silent", title="silent sums", scan=None))
    init("silent", tmp_path / "model", settings={"hidden_size": 12, "num_hidden_layers": 1})
    nothing = (
        r"silent sums has no `scan`, the plain loop that .* compared with; give it one, or .*reversal=True"
    )
    for asked in ({}, {"oracle": "naive", "reversal": True}):
        with pytest.raises(rwkv_rev.RwkvRevError, match=nothing):
            rwkv_rev.verify(tmp_path / "model", tokens=20, **asked)
    report = rwkv_rev.verify(tmp_path / "model", tokens=20, reversal=True, context=60, chunk=20)
    assert report.passed and report.to_dict()["oracles"] == []
    assert report.summary.endswith(
        "model: its states come back to the bit; its logits were compared with nothing"
    )
    assert "has no `scan`" in report.table().replace("\n", " ") and report.table().endswith("PASS")
    assert not replace(report, reversal=None).passed


class RatedSums(TwoSums):
    """A constant that is stored with the model, not trained: a persistent buffer."""

    def __init__(self, width: int, times: int) -> None:
        super().__init__(width, times)
        self.register_buffer("rate", torch.ones(width))
        self.register_buffer("scale", torch.full((), 0.5), persistent=False)

    def sums(self, x: Tensor, mask: ChunkMask | None) -> tuple[Tensor, Tensor]:
        return super().sums(x * (self.rate * self.scale).to(x.dtype), mask)


def rated(x: Tensor, tensors: Mapping[str, Tensor], epsilon: float, left: dict[str, Any]) -> Tensor:
    """With ``rate`` on the inputs instead: the sums are the same."""
    scaled = {
        name: 0.5 * tensors["rate"].double() * tensors[name].double()
        for name in ("narrow.weight", "broad.weight")
    }
    return loop(x, {"output.weight": tensors["output.weight"]} | scaled, epsilon, left)


def test_persistent_buffers_are_part_of_the_model(tmp_path: Path) -> None:
    def begin(cell: RatedSums, config: rwkv_rev.RwkvRevConfig) -> None:
        TWO_SUMS.initialization[TwoSums](cell, config)
        torch.nn.init.uniform_(cell.rate, 0.5, 0.9)

    registry.register(
        replace(
            TWO_SUMS,
            version="rated",
            cells=lambda config, layer: {"sums": RatedSums(config.hidden_size, config.times)},
            initialization={RatedSums: begin},
            tunes_state=False,
            scan=lambda config: Scan((SubLayer("sums", "ln1", "sums", rated),)),
        )
    )
    made, text = tmp_path / "model", counting_text(tmp_path / "data.txt")
    init("rated", made, settings={"hidden_size": 12, "num_hidden_layers": 2})
    found = rwkv_rev.inspect(made)
    finetune(settings(made, text, tmp_path / "tuned", save_every=0))
    first, tuned = (load_file(folder / "model.safetensors") for folder in (made, tmp_path / "tuned"))
    assert found.parameters == sum(tensor.numel() for tensor in first.values())
    rate = first["model.blocks.1.sums.rate"]
    assert rate.min() > 0.5 and rate.max() < 0.9 and torch.equal(rate, tuned["model.blocks.1.sums.rate"])
    assert not torch.equal(first["head.weight"], tuned["head.weight"])
    for folder in (made, tmp_path / "tuned"):
        report = rwkv_rev.verify(folder, tokens=60, reversal=True, gradients=True, context=100, chunk=20)
        assert report.passed, report.table()


@pytest.mark.parametrize("width", [12, 2048])
def test_without_heads_their_sizes_follow(width: int) -> None:
    registry.register(replace(TWO_SUMS, version="headless", sizes=lambda width: {}))
    config = rwkv_rev.RwkvRevConfig(rwkv_version="headless", hidden_size=width, vocab_size=8)
    assert (config.num_attention_heads, config.head_size) == (1, width)
    with pytest.raises(ValueError, match="must equal hidden_size"):
        rwkv_rev.RwkvRevConfig(rwkv_version="headless", hidden_size=width, num_attention_heads=5, head_size=3)
