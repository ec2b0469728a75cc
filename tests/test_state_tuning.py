"""The tuned initial state: its gradient, what carries it, and that the ``rwkv`` package begins with the same one."""

from pathlib import Path

import pytest
import torch
from finetune_cases import counting_text, finetune, settings
from foreign import blinkdl_state_dict
from safetensors.torch import load_file

import rwkv_rev
from rwkv_rev.errors import OutputError
from rwkv_rev.modeling import RwkvRevForCausalLM

STRATEGIES = ("full", "checkpoint", "reversible", "truncated")
SIZES = {"vocab": 256, "D": 32, "head_size": 8}


def with_state(folder: Path, size: float = 0.3, seed: int = 1) -> RwkvRevForCausalLM:
    """A model with a random initial state."""
    model = RwkvRevForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    model.add_initial_state()
    assert model.model.initial_wkv is not None
    generator = torch.Generator().manual_seed(seed)
    for state in model.model.initial_wkv:
        state.data = size * torch.randn(state.shape, generator=generator)
    return model.eval()


def tokens(length: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def tuned(bundled: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder tuned for a few steps at a high rate."""
    folder = tmp_path_factory.mktemp("state")
    data = counting_text(folder / "data.txt")
    finetune(settings(bundled["5.2"], data, folder / "out", tune="state", lr=1.0))
    return folder / "out"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradient(bundled: dict[str, Path], strategy: str) -> None:
    """The parameters get what an initial state that is handed in gets, summed over the rows."""
    model, ids = with_state(bundled["5.2"]), tokens(48, rows=2)
    model.requires_grad_(False)
    assert model.model.initial_wkv is not None
    model.model.initial_wkv.requires_grad_(True)
    with model.set_bptt(strategy, chunk_length=16):
        model(ids, labels=ids).loss.backward()
        state = model.initial_state(2).detach()
        state.wkv.requires_grad_(True)
        model.model.initial_wkv.requires_grad_(False)
        model(ids, labels=ids, state=state).loss.backward()
    assert state.wkv.grad is not None
    for parameter, expected in zip(model.model.initial_wkv, state.wkv.grad.sum(1), strict=True):
        assert parameter.grad is not None and expected.abs().max() > 0
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-9)


def test_strategies_agree(bundled: dict[str, Path]) -> None:
    model, ids = with_state(bundled["5.2"]), tokens(64)
    found = {}
    for strategy in ("full", "reversible"):
        model.zero_grad()
        with model.set_bptt(strategy, chunk_length=16):
            model(ids, labels=ids).loss.backward()
        assert model.model.initial_wkv is not None
        found[strategy] = torch.stack([p.grad for p in model.model.initial_wkv if p.grad is not None])
    torch.testing.assert_close(found["reversible"], found["full"], rtol=1e-4, atol=1e-8)


def test_it_is_where_contexts_begin(bundled: dict[str, Path], tmp_path: Path) -> None:
    model, ids = with_state(bundled["5.2"]), tokens(20)
    plain = RwkvRevForCausalLM.from_pretrained(str(bundled["5.2"]), dtype=torch.float32).eval()
    model.save_pretrained(str(tmp_path / "saved"))
    again = RwkvRevForCausalLM.from_pretrained(str(tmp_path / "saved"), dtype=torch.float32).eval()
    with torch.no_grad():
        handed_in = plain(ids, state=model.initial_state(1)).logits
        assert not torch.allclose(handed_in, plain(ids).logits, atol=1e-2)
        for loaded in (model, again):
            torch.testing.assert_close(loaded(ids).logits, handed_in, rtol=0, atol=0)
        first = again(ids[:, :7])
        rest = again(ids[:, 7:], state=first.state).logits
    torch.testing.assert_close(rest, handed_in[:, 7:], rtol=1e-4, atol=1e-4)
    greedy = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    written = again.generate(ids, **greedy)
    assert written[0, 20] == handed_in[0, -1].argmax()


def test_rwkv_package_begins_with_it(tuned: Path, tmp_path: Path) -> None:
    """Through ``verify``, and through the exported file that the package reads itself."""
    report = rwkv_rev.verify(tuned, tokens=40)
    assert report.passed and "rwkv" in str(report.table()), report.table()
    rwkv_rev.export(tuned, tmp_path / "tuned.pth")
    exported = torch.load(tmp_path / "tuned.pth", weights_only=True)
    states = load_file(tuned / "model.safetensors")
    for i in range(6):
        state = exported[f"blocks.{i}.att.time_state"]
        assert torch.equal(state, states[f"model.initial_wkv.{i}"].mT)
        assert not torch.equal(state, state.mT), "the test would not see a missing transposition"
    # A copy without the state gives other logits there, so the package has read it.
    without = {name: tensor for name, tensor in exported.items() if not name.endswith("time_state")}
    torch.save(without, tmp_path / "plain.pth")
    assert (
        not rwkv_rev.verify(tuned, original=str(tmp_path / "plain.pth"), oracle="rwkv", tokens=16)
        .rows[0]
        .passed
    )


def test_an_exported_state_comes_back(tuned: Path, tmp_path: Path) -> None:
    rwkv_rev.export(tuned, tmp_path / "tuned.pth")
    rwkv_rev.convert(tmp_path / "tuned.pth", tmp_path / "again", verify=True)
    before, after = (
        load_file(tuned / "model.safetensors"),
        load_file(tmp_path / "again" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert rwkv_rev.RwkvRevConfig.from_pretrained(str(tmp_path / "again")).has_initial_state


@pytest.mark.parametrize("version", ["5.0", "5.1"])
def test_older_versions(tmp_path: Path, version: str) -> None:
    torch.save(blinkdl_state_dict(version, layers=2, **SIZES), tmp_path / "a.pth")
    rwkv_rev.convert(tmp_path / "a.pth", tmp_path / "model")
    data = counting_text(tmp_path / "data.txt", 50)
    config = settings(tmp_path / "model", data, tmp_path / "out", tune="state", lr=1.0, context_length=128)
    finetune(config)
    report = rwkv_rev.verify(tmp_path / "out", tokens=40)
    assert report.passed, report.table()


def test_refusals(bundled: dict[str, Path], tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no place for a tuned initial state; export with to='blinkdl'"):
        rwkv_rev.export(tuned, tmp_path / "hf", to="hf")
    with pytest.raises(ValueError, match="RWKV-4 has no state of matrices"):
        RwkvRevForCausalLM.from_pretrained(str(bundled["4"])).add_initial_state()
