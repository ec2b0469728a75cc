"""Fine-tuning beside weights in 4 and 8 bits: an adapter alone, resumed, merged, generated and evaluated with."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import english, relative_error
from finetune_cases import counting_text, finetune, losses, settings
from quantised_cases import quantised

from rwkv_rev.adapted_model import load_adapted
from rwkv_rev.errors import CheckpointError, ConfigError, RwkvRevError, SourceError
from rwkv_rev.foreign.quantised import KINDS, maps_of
from rwkv_rev.loading import load_model, load_quantised
from rwkv_rev.training.config import QUANTISE, FinetuneConfig
from rwkv_rev.training.finetune import plan
from rwkv_rev.training.tuning import count_parameters

CLI = Callable[..., tuple[int, str, str]]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
needs_bitsandbytes = pytest.mark.skipif(
    not pytest.importorskip("importlib.util").find_spec("bitsandbytes"), reason="needs bitsandbytes"
)


@pytest.fixture(autouse=True)
def device_is_there(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def config_of(model: Path, folder: Path, **changes: Any) -> FinetuneConfig:
    data = counting_text(folder / "data.txt", 100)
    values: dict[str, Any] = {"tune": "lora", "lora_rank": 4, "quantise": "nf4", "max_steps": 4}
    return settings(model, data, folder / "out", **values | {"context_length": 128} | changes)


@pytest.fixture(scope="module")
def trained(shallow: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    pytest.importorskip("bitsandbytes")
    config = config_of(shallow["7"], tmp_path_factory.mktemp("run"), lr=3e-3)
    finetune(config)
    return config


def test_kinds_are_named_once() -> None:
    assert QUANTISE == KINDS


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tune": "full"}, "quantise = nf4 belongs to tune='lora' and state"),
        ({"quantise": "int4"}, "quantise = 'int4' does not exist; choose one of nf4, int8"),
        ({"push_to_hub": "a/b"}, "makes an adapter: merge it with rwkv-rev merge, then rwkv-rev publish"),
        ({"save_dtype": "bfloat16"}, "save_dtype is of a model folder"),
    ],
)
def test_refused_settings(
    shallow: dict[str, Path], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    changes = {"lora_rank": 32} | changes if changes.get("tune") == "full" else changes
    with pytest.raises(ConfigError, match=words):
        config_of(shallow["7"], tmp_path, **changes).check()


def test_refused_without_bitsandbytes(
    shallow: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the data is read."""
    from importlib import metadata

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(
        RwkvRevError, match=r"quantise = nf4 needs bitsandbytes: pip install 'bitsandbytes>=0\.50'"
    ):
        plan(config_of(shallow["7"], tmp_path))


@needs_bitsandbytes
def test_adapter_alone(trained: FinetuneConfig, shallow: dict[str, Path]) -> None:
    """What lies in the output, and that it was trained beside 4 bits."""
    output = Path(trained.output)
    names = {path.name for path in output.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json"} <= names
    assert {"README.md", "training"} <= names and not {"config.json", "model.safetensors"} & names
    assert "rwkv-rev merge BASE" in (output / "README.md").read_text()
    assert "nf4, by bitsandbytes" in (output / "README.md").read_text()
    said = json.loads((output / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == shallow["7"].name
    summary = json.loads((output / "training" / "summary.json").read_text())
    assert summary["plan"]["settings"]["quantise"] == "nf4" and summary["result"]["adapter_only"]
    assert losses(output)[-1] < losses(output)[0]
    assert not trained.working_directory.exists()


@needs_bitsandbytes
def test_counts_numbers_and_not_bytes(trained: FinetuneConfig, shallow: dict[str, Path]) -> None:
    result = json.loads((Path(trained.output) / "training" / "summary.json").read_text())["result"]
    plain = count_parameters(load_model(shallow["7"], "cpu", torch.float32))[1]
    assert result["parameters"] == plain + result["trainable_parameters"]


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_is_the_same(shallow: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Stopped after two steps and gone on with: the adapter of a run that was never stopped, to the bit."""
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    whole.mkdir()
    halved.mkdir()
    finetune(config_of(shallow["5.2"], whole, quantise=kind))
    config = config_of(shallow["5.2"], halved, quantise=kind, save_every=2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("rwkv_rev.training.finetune.save_finetuned", lambda *_: 1 / 0)
        finetune(config)
    newest = max(config.working_directory.glob("checkpoint-*"))
    newest.rename(halved / "gone")
    config.resume = "auto"
    finetune(config)
    files = [folder / "out" / "adapter_model.safetensors" for folder in (whole, halved)]
    assert files[0].read_bytes() == files[1].read_bytes()
    other = replace(config, quantise=None, output=str(halved / "other"))
    other.working_directory.mkdir()
    (halved / "gone").rename(other.working_directory / newest.name)
    with pytest.raises(CheckpointError, match=f"quantise was {kind} and is now None"):
        plan(other)


@needs_bitsandbytes
@pytest.mark.parametrize("device", DEVICES)
def test_loaded_with_its_base(trained: FinetuneConfig, shallow: dict[str, Path], device: str) -> None:
    """Beside the bits that it was trained with, and beside the float weights, as merging gives."""
    import rwkv_rev

    place, ids = torch.device(device), english(40).to(device)
    with torch.no_grad():
        base = load_quantised(shallow["7"], place, torch.float32, "nf4").eval()(ids).logits
        beside = load_adapted(
            shallow["7"], place, torch.float32, quantised="nf4", adapter=trained.output
        ).eval()
        assert list(maps_of(beside))
        assert relative_error(beside(ids).logits, base) > 1e-3
        plain = load_adapted(shallow["7"], place, torch.float32, adapter=trained.output).eval()(ids).logits
        merged = rwkv_rev.merge(
            shallow["7"], trained.output, Path(trained.output).parent / f"merged-{device}"
        )
        loaded = load_model(merged.path, place, torch.float32).eval()(ids).logits
    assert relative_error(loaded, plain) <= 1e-5


@needs_bitsandbytes
def test_quantised_folder_is_what_transformers_makes(shallow: dict[str, Path]) -> None:
    ids = english(20)
    with torch.no_grad():
        ours = load_quantised(shallow["5.2"], torch.device("cpu"), torch.bfloat16, "nf4").eval()(ids).logits
        theirs = quantised(shallow["5.2"], "nf4", torch.bfloat16).eval()(ids).logits
    assert torch.equal(ours, theirs)


@needs_bitsandbytes
def test_commands(cli: CLI, trained: FinetuneConfig, shallow: dict[str, Path], tmp_path: Path) -> None:
    beside = ("--adapter", trained.output, "--quantise", "nf4", "--device", "cpu")
    code, text, errors = cli(
        "generate", shallow["7"], "--prompt", "7 squared", "--max-new-tokens", 4, *beside, "--no-stream"
    )
    assert code == 0, errors
    assert text.startswith("7 squared")
    data = counting_text(tmp_path / "held-out.txt", 30)
    scores = []
    for more in ((), beside):
        code, text, errors = cli("eval", shallow["7"], "--data", data, "--json", *more)
        assert code == 0, errors
        scores.append(json.loads(text)["total"]["bits_per_byte"])
    assert scores[1] < scores[0]
    for command in (("generate", trained.output, "--prompt", "a"), ("eval", trained.output, "--data", data)):
        code, _, errors = cli(*command)
        assert code != 0 and "is an adapter alone: generate and eval take it as --adapter" in errors


@needs_bitsandbytes
def test_adapters_of_others_are_refused(
    trained: FinetuneConfig, shallow: dict[str, Path], tmp_path: Path
) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(CheckpointError, match="another model"):
        load_adapted(shallow["4"], cpu, torch.float32, adapter=trained.output)
    file = tmp_path / "lora.pth"
    file.write_bytes(b"")
    with pytest.raises(SourceError, match="--to peft"):
        load_adapted(shallow["7"], cpu, torch.float32, adapter=file)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_initial_state(shallow: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """State tuning writes a normal model folder: the stored weights, every bit, and the state."""
    from rwkv_rev.converters.converted import ConvertedModel

    config = config_of(shallow["7"], tmp_path, tune="state", quantise=kind, lora_rank=32, lr=0.3)
    finetune(config)
    output = Path(config.output)
    assert losses(output)[-1] < losses(output)[0]
    with ConvertedModel(output) as after, ConvertedModel(shallow["7"]) as before:
        assert after.config.has_initial_state
        assert any(after.tensor(n).any() for n in after.names() if "initial_wkv" in n)
        for name in before.names():
            assert torch.equal(after.tensor(name), before.tensor(name))


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_forecast_of_weights(shallow: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """What a plan says of the weights is what they take."""
    planned = plan(config_of(shallow["7"], tmp_path, quantise=kind))
    model = load_quantised(shallow["7"], torch.device("cpu"), torch.float32, kind)
    total = 0
    for parameter in model.parameters():
        total += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += state.absmax.nbytes + state.state2.absmax.nbytes
        total += getattr(parameter, "SCB", torch.empty(0)).nbytes
    assert planned.memory.gradient.parameters == total
    whole = plan(config_of(shallow["7"], tmp_path, quantise=None)).memory
    assert planned.memory.device < whole.device


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_for_bench(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A model with random weights, made in few bits part by part: initialised, and trained beside."""
    from rwkv_rev.benchmark import models
    from rwkv_rev.benchmark.settings import BenchSettings
    from rwkv_rev.benchmark.training import random_tokens, step

    shape = {"rwkv_version": "7", "layers": 2, "width": 128, "vocab": 256, **models._ranks(128)}
    monkeypatch.setitem(models.SHAPES, "tiny", shape)
    model = BenchSettings(shape="tiny", lora_rank=4, quantise=kind).model()
    assert len(list(maps_of(model))) == 2 * 6
    assert models.matrix_parameters(model) > 2 * (4 * 128 * 128 + 2 * 128 * 512)
    ids = random_tokens(model, 1, 96)
    losses = []
    for strategy in ("checkpoint", "reversible", "full"):
        with model.set_bptt(strategy, chunk_length=40):
            losses.append(step(model, ids)[1]["loss"])
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-5)


@needs_bitsandbytes
def test_bench_is_for_random_shapes(cli: CLI) -> None:
    code, _, errors = cli("bench", "training", "--quantise", "nf4", "--shape", "7-7b")
    assert code != 0 and "--lora-rank" in errors
    code, _, errors = cli("bench", "training", "--quantise", "nf4", "--lora-rank", 2, "--quick")
    assert code != 0 and "a shape with random weights" in errors
