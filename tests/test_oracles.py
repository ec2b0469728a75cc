"""The oracles agree with each other and with outside references, and each trap they avoid is real."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from foreign import VERSIONS, blinkdl_state_dict, hf_state_dict, scan_of
from processes import run_python

from rwkv_rev.architectures.registry import architecture
from rwkv_rev.bundled import BUNDLED, bundled_path
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.equivalence import oracles
from rwkv_rev.equivalence.logits import compare_logits
from rwkv_rev.equivalence.naive_model import naive_logits, residual_streams
from rwkv_rev.equivalence.oracles import OracleUnavailable
from rwkv_rev.equivalence.original import Original
from rwkv_rev.equivalence.text import default_text

PEER = Path(__file__).parents[2] / "shared" / "peer"
TOKENS = torch.randint(64, (300,), generator=torch.Generator().manual_seed(1))
FLOAT32_NOISE = 2e-5  # random models of two layers; logits up to 5

needs_rwkv = pytest.mark.skipif(
    importlib.util.find_spec("rwkv") is None, reason="the rwkv package is not installed"
)


def naive(original: Original, tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(oracles.naive(original, tokens)))


def original_of(version: str, **kwargs: object) -> Original:
    hf = hf_state_dict(version, **kwargs) if version == "4" else None
    return made(version, blinkdl_state_dict(version, **kwargs), transformers_tensors=hf)


def made(version: str, tensors: dict[str, torch.Tensor], **facts: object) -> Original:
    vocabulary, width = tensors["emb.weight"].shape
    sizes = architecture(version).sizes(width)
    sizes["intermediate_size"] = tensors["blocks.0.ffn.key.weight"].shape[0]
    config = RwkvRevConfig(rwkv_version=version, vocab_size=vocabulary, hidden_size=width, **sizes)
    return Original(tensors, "random", config, **facts)


@pytest.mark.parametrize("peer", ["tiny-rwkv-4v0-660K", "tiny-rwkv-5v2-730K", "tiny-rwkv-7v0-834K"])
def test_naive_reproduces_the_expected_logits_of_other_peoples_models(peer: str) -> None:
    if not PEER.is_dir():
        pytest.skip("no ../shared/peer")
    expected = json.loads((PEER / f"{peer}.expected.json").read_text())
    tensors = torch.load(PEER / f"{peer}.pth", weights_only=True)
    version = {"4v0": "4", "5v2": "5.2", "7v0": "7"}[peer.split("-")[2]]
    eps = expected.get("group_norm_eps") or 64e-5
    logits = torch.cat(
        list(
            naive_logits(
                tensors,
                torch.tensor(expected["prompt_bytes"]),
                scan=scan_of(version),
                group_norm_epsilon=eps,
            )
        )
    )
    truth = torch.tensor(expected["logits_after_last_byte"], dtype=torch.float64)
    assert (logits[-1] - truth).abs().max() < 1e-5


@needs_rwkv
@pytest.mark.parametrize("name", BUNDLED)
def test_rwkv_package_agrees_with_naive_on_trained_models(name: str) -> None:
    tokens = torch.tensor(list(default_text().encode()[:400]))
    original = made(name.removeprefix("rwkv-"), torch.load(bundled_path(name), weights_only=True))
    comparison = compare_logits(oracles.rwkv_package(original, tokens), naive(original, tokens), tokens)
    assert comparison.largest < 1e-4
    assert comparison.top1 == 1
    assert comparison.original_bits == pytest.approx(comparison.converted_bits, abs=1e-6)
    assert comparison.original_bits < 3  # it has learnt English


CASES = [
    *((version, {}) for version in VERSIONS),
    ("4", {"layers": 1}),
    ("5.0", {"layers": 1, "bonus": "time_first"}),
    ("5.1", {"layers": 1, "dtype": torch.bfloat16}),
    ("5.2", {"dtype": torch.float16}),
    ("7", {"layers": 1}),
    ("7", {"dtype": torch.bfloat16, "unused": True}),
]


@needs_rwkv
@pytest.mark.parametrize(
    ("version", "kwargs"), CASES, ids=["-".join([v, *map(str, k.values())]) for v, k in CASES]
)
def test_rwkv_package_agrees_with_naive(version: str, kwargs: dict[str, object]) -> None:
    original = original_of(version, **kwargs)
    # 257 tokens: the second piece is a single token, which the package computes by another path.
    tokens = TOKENS[:257]
    comparison = compare_logits(oracles.rwkv_package(original, tokens), naive(original, tokens), tokens)
    assert comparison.largest < FLOAT32_NOISE


@needs_rwkv
@pytest.mark.parametrize(
    ("version", "dtype"), [("4", torch.float32), ("5.0", torch.bfloat16), ("5.2", torch.float32)]
)
def test_rwkv_package_in_float64(version: str, dtype: torch.dtype) -> None:
    """No rounding is left: what it computes is what the scan computes."""
    original, tokens = original_of(version, dtype=dtype), TOKENS[:257]
    found = torch.cat(list(oracles.rwkv_package(original, tokens, torch.float64)))
    assert found.dtype == torch.float64
    assert (found - naive(original, tokens)).abs().max() < 1e-12


@needs_rwkv
def test_rwkv_package_with_a_tuned_state_of_rwkv7() -> None:
    """Which its class does not read by itself."""
    states = {f"blocks.{i}.att.time_state": torch.randn(4, 8, 8) for i in range(2)}
    original = made("7", blinkdl_state_dict("7") | states)
    found = torch.cat(list(oracles.rwkv_package(original, TOKENS)))
    assert (found - naive(original, TOKENS)).abs().max() < FLOAT32_NOISE
    assert (found - naive(original_of("7"), TOKENS)).abs().max() > 0.1


@needs_rwkv
def test_rwkv_package_has_no_float64_of_rwkv7() -> None:
    with pytest.raises(OracleUnavailable, match=r"0\.606531"):
        next(oracles.rwkv_package(original_of("7"), TOKENS, torch.float64))


def test_transformers_has_no_float64() -> None:
    with pytest.raises(OracleUnavailable, match="rounds the keys"):
        next(oracles.transformers_class(original_of("4"), TOKENS, torch.float64))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_scan_in_float32_rounds(version: str) -> None:
    original = original_of(version)
    found = torch.cat(list(oracles.naive(original, TOKENS, torch.float32)))
    assert found.dtype == torch.float32
    assert 1e-7 < (found - naive(original, TOKENS)).abs().max() < FLOAT32_NOISE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_agrees_with_naive(dtype: torch.dtype) -> None:
    # Seven layers: the class rescales every six of them when it is left to.
    original = original_of("4", layers=7, dtype=dtype)
    comparison = compare_logits(oracles.transformers_class(original, TOKENS), naive(original, TOKENS), TOKENS)
    assert comparison.largest < FLOAT32_NOISE


def test_transformers_knows_no_rwkv5() -> None:
    with pytest.raises(OracleUnavailable, match=r"RWKV-4 only.*oracle='rwkv'"):
        next(oracles.transformers_class(original_of("5.2"), TOKENS))


@needs_rwkv
def test_rwkv_package_refuses_another_group_norm_eps() -> None:
    original = made("5.2", blinkdl_state_dict("5.2"), group_norm_epsilon=1e-5)
    with pytest.raises(OracleUnavailable, match=r"eps 0.00064 built in, this model's is 1e-05"):
        next(oracles.rwkv_package(original, TOKENS))


@needs_rwkv
def test_rwkv_package_refuses_another_layer_norm_eps() -> None:
    original = made("4", blinkdl_state_dict("4"), layer_norm_epsilon=1e-6)
    with pytest.raises(OracleUnavailable, match="LayerNorm eps 1e-05 built in"):
        next(oracles.rwkv_package(original, TOKENS))


@needs_rwkv
def test_rwkv_package_failure_is_one_line() -> None:
    tensors = blinkdl_state_dict("4")
    del tensors["blocks.1.ffn.value.weight"]
    with pytest.raises(OracleUnavailable, match=r"failed on this checkpoint: KeyError.*ffn.value") as caught:
        next(oracles.rwkv_package(made("4", tensors), TOKENS))
    assert "\n" not in str(caught.value)


@needs_rwkv
def test_rwkv_package_answers_again_after_its_process_died(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever the environment says then; and nothing is printed, nor imported here."""
    original, tokens = original_of("4"), TOKENS[:20]
    first = torch.cat(list(oracles.rwkv_package(original, tokens)))
    worker = oracles._workers[os.getpid(), torch.float32]
    assert torch.equal(torch.cat(list(oracles.rwkv_package(original, tokens))), first)
    assert oracles._workers[os.getpid(), torch.float32] is worker, "one process answers all"
    worker._process.kill()
    worker._process.wait()
    # the next one starts in this environment
    monkeypatch.setenv("RWKV_V7_ON", "1")  # would choose another class, and print
    monkeypatch.setenv("RWKV_RESCALE_LAYER", "1")
    monkeypatch.setenv("RWKV_CUDA_ON", "1")
    before = set(sys.modules)  # other tests of this process may have imported the package
    assert torch.equal(torch.cat(list(oracles.rwkv_package(original, tokens))), first)
    other = original_of("5.1")
    comparison = compare_logits(oracles.rwkv_package(other, tokens), naive(other, tokens), tokens)
    assert comparison.largest < FLOAT32_NOISE
    assert capfd.readouterr() == ("", "")
    assert "rwkv" not in set(sys.modules) - before


@needs_rwkv
def test_rwkv_package_says_when_its_process_dies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text("import sys; sys.stdin.readline(); sys.exit('killed on purpose')")
    monkeypatch.setattr(oracles, "_WORKER", tmp_path / "worker.py")
    monkeypatch.setattr(oracles, "_workers", {})
    with pytest.raises(OracleUnavailable, match="failed on this checkpoint: killed on purpose"):
        next(oracles.rwkv_package(original_of("4"), TOKENS))
    assert not oracles._workers


def test_rwkv_package_says_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise oracles.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(oracles.importlib.metadata, "version", missing)
    with pytest.raises(OracleUnavailable, match=r"pip install 'rwkv-rev\[verify\]'"):
        next(oracles.rwkv_package(original_of("4"), TOKENS))


@needs_rwkv
def test_rwkv_package_says_when_the_disk_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracles.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OracleUnavailable, match="set TMPDIR"):
        next(oracles.rwkv_package(original_of("4"), TOKENS))


TRAPS = """
import json, os, sys, torch
os.environ.update(RWKV_JIT_ON="0", RWKV_CUDA_ON="0")
from rwkv.model import RWKV
folder, tokens = sys.argv[1], json.loads(sys.argv[2])
def load(name):
    return RWKV(model=f"{folder}/{name}", strategy="cpu fp32", verbose=False)
found = {}
model = load("bfloat16")
logits, state = model.forward(tokens, None, full_output=True)
torch.save(logits, f"{folder}/logits.pt")
before = [entry.clone() for entry in state]
model.forward(tokens, state)
found["overwrites the state"] = any(not torch.equal(a, b) for a, b in zip(before, state))
found["one token gives [V]"] = list(model.forward(tokens[:1], None, full_output=True)[0].shape)
try:
    load("one-layer").forward(tokens, None)
    found["one-layer v5"] = "works"
except AttributeError as error:
    found["one-layer v5"] = str(error)
found["tf32"] = torch.backends.cuda.matmul.allow_tf32
print(json.dumps(found))
"""


@needs_rwkv
def test_the_traps_of_the_rwkv_package_are_real(tmp_path: Path) -> None:
    """Each would spoil a comparison; the day one is gone from the package, a detour of ours can go."""
    tokens = TOKENS[:60]
    tensors = blinkdl_state_dict("5.2", layers=2, dtype=torch.bfloat16)
    torch.save(tensors, tmp_path / "bfloat16.pth")
    torch.save(blinkdl_state_dict("5.2", layers=1), tmp_path / "one-layer.pth")
    command = [sys.executable, "-c", TRAPS, str(tmp_path), json.dumps(tokens.tolist())]
    found = json.loads(run_python(command, check=True).stdout)
    assert found == {
        "overwrites the state": True,
        "one token gives [V]": [64],
        "one-layer v5": "'types.SimpleNamespace' object has no attribute 'n_head'",
        "tf32": True,
    }
    ln0_in_bfloat16 = torch.load(tmp_path / "logits.pt", weights_only=True)
    error = (ln0_in_bfloat16 - naive(made("5.2", tensors), tokens)).abs().max()
    assert error > 100 * FLOAT32_NOISE


def test_the_trap_of_transformers_is_real() -> None:
    """Left to its default the class divides its weights in place: read back, they are another model."""
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(
        vocab_size=16, hidden_size=8, attention_hidden_size=8, intermediate_size=16, num_hidden_layers=7
    )
    model = RwkvForCausalLM(config).eval()
    before = model.rwkv.blocks[6].attention.output.weight.clone()
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert torch.equal(model.rwkv.blocks[6].attention.output.weight * 2, before)


def test_transformers_oracle_leaves_the_original_alone() -> None:
    original = original_of("4", layers=7)
    before = {name: tensor.clone() for name, tensor in original.transformers_tensors.items()}
    next(oracles.transformers_class(original, TOKENS[:5]))
    assert all(torch.equal(before[name], tensor) for name, tensor in original.transformers_tensors.items())


@pytest.mark.parametrize("version", VERSIONS)
def test_naive_is_causal_and_names_every_sub_layer(version: str) -> None:
    tensors = blinkdl_state_dict(version)
    streams = dict(residual_streams(tensors, TOKENS[:20], scan=scan_of(version)))
    assert list(streams) == [
        "ln0",
        *(f"blocks.{i}.{mix}" for i in range(2) for mix in ("time_mix", "channel_mix")),
        "ln_out",
    ]
    shorter = dict(residual_streams(tensors, TOKENS[:11], scan=scan_of(version)))
    for place, stream in streams.items():
        torch.testing.assert_close(shorter[place], stream[:11], rtol=1e-12, atol=1e-12)
        assert stream.dtype == torch.float64


@pytest.mark.parametrize("version", ["5.0", "5.1", "5.2"])
def test_group_norm_eps_changes_the_naive_logits(version: str) -> None:
    original = original_of(version)
    other = made(version, original.tensors, group_norm_epsilon=1e-5)
    assert (naive(original, TOKENS) - naive(other, TOKENS)).abs().max() > 1e-3


def test_naive_survives_extreme_keys_of_rwkv4() -> None:
    tensors = blinkdl_state_dict("4")
    tensors["blocks.0.att.key.weight"] = 200 * tensors["blocks.0.att.key.weight"]  # e^k overflows float64
    assert naive(made("4", tensors), TOKENS).isfinite().all()
