"""One meaning of a device's name: for functions, for finetune and eval, for forecasts, for benchmarks."""

from pathlib import Path

import pytest
import torch
from test_imports import sources

import rwkv_rev
from rwkv_rev.benchmark.settings import BenchSettings
from rwkv_rev.cli import main
from rwkv_rev.device import choose_device, named_device
from rwkv_rev.errors import RwkvRevError
from rwkv_rev.loading import load_model
from rwkv_rev.training.launch import choose_dtype, training_device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """As many GPUs as the test says, none of which is touched."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    return int(request.param)


@pytest.mark.parametrize(
    ("gpus", "name", "device"),
    [
        (0, "auto", "cpu"),
        (2, "auto", "cuda"),
        (2, "cpu", "cpu"),
        (2, "cuda", "cuda"),
        (2, "cuda:1", "cuda:1"),
    ],
    indirect=["gpus"],
)
def test_names(gpus: int, name: str, device: str) -> None:
    assert choose_device(name) == named_device(name) == torch.device(device)


@pytest.mark.parametrize(
    "name",
    [
        "tpu",
        "",
        "cuda:x",
        "meta",
        "cpu:0:0",
        "cpu:3",
        "cpu:1",
        "CPU",
        " cpu",
        "cuda:256",
        "cuda:300",
        "cuda:-1",
        "meta:1",
    ],
)
def test_what_is_no_name_of_a_device(name: str) -> None:
    for rule in (named_device, choose_device):
        with pytest.raises(
            RwkvRevError, match=f"device = '{name}' is not known; use auto, cpu, cuda or cuda:1"
        ):
            rule(name)


@pytest.mark.parametrize(
    ("gpus", "name", "seen"),
    [(0, "cuda", "no GPU"), (1, "cuda:1", "1 GPU"), (2, "cuda:2", "2 GPUs"), (0, "xla", "no such device")],
    indirect=["gpus"],
)
def test_devices_that_are_not_here(gpus: int, name: str, seen: str) -> None:
    assert named_device(name) == torch.device(name)
    with pytest.raises(
        RwkvRevError, match=f"device = {name}, but PyTorch sees {seen} here; use device = cpu"
    ):
        choose_device(name)


@pytest.mark.parametrize("gpus", [0], indirect=True)
@pytest.mark.parametrize(
    "command",
    [
        ("generate", "MODEL", "--prompt", "a"),
        ("eval", "MODEL", "--data", "DATA"),
        ("finetune", "MODEL", "--data", "DATA", "--output", "OUT", "--dry-run"),
        ("bench", "training", "--quick"),
    ],
    ids=lambda command: command[0],
)
def test_commands_say_the_same(
    bundled: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    gpus: int,
    command: tuple[str, ...],
) -> None:
    data = tmp_path / "text.txt"
    data.write_text("a text " * 20)
    places = {"MODEL": str(bundled["4"]), "DATA": str(data), "OUT": str(tmp_path / "out")}
    words = [places.get(word, word) for word in command]
    for device, reason in (("tpu", "'tpu' is not known"), ("cuda", "cuda, but PyTorch sees no GPU here")):
        with pytest.raises(SystemExit):
            main([*words, "--device", device])
        assert f"device = {reason}; use " in capsys.readouterr().err


@pytest.mark.parametrize("gpus", [2], indirect=True)
def test_finetune_has_its_processes_placed(gpus: int) -> None:
    assert training_device("auto") == training_device("cuda") == "cuda"
    assert training_device("cpu") == "cpu"
    with pytest.raises(
        RwkvRevError, match=r"device = cuda:1: .* use device = cuda with CUDA_VISIBLE_DEVICES=1"
    ):
        training_device("cuda:1")


@pytest.mark.parametrize("gpus", [0], indirect=True)
def test_forecasts_are_for_cpu_and_cuda(capsys: pytest.CaptureFixture[str], gpus: int) -> None:
    """Of a GPU that this machine may lack."""
    words = ["inspect", "bundled:rwkv-4", "--context-length", "4096", "--device"]
    with pytest.raises(SystemExit, match="0"):
        main([*words, "cuda:1"])
    assert "CUDA kernels" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*words, "mps"])
    assert "device = mps: forecasts are for cpu and cuda" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "bfloat16", "dtype"),
    [
        ("cpu", True, "float32"),
        ("mps", True, "float32"),
        ("cuda:1", True, "bfloat16"),
        ("cuda", False, "float32"),
    ],
)
def test_dtype_of_a_device(monkeypatch: pytest.MonkeyPatch, device: str, bfloat16: bool, dtype: str) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bfloat16)
    assert choose_dtype("auto", torch.device(device)) == dtype


def test_a_model_is_loaded_where_it_is_asked_for(bundled: dict[str, Path]) -> None:
    model = load_model(bundled["4"], "cpu", torch.bfloat16)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert load_model(bundled["4"], torch.device("meta"), torch.float32).device.type == "meta"


def test_functions_take_any_device_that_is_here(bundled: dict[str, Path]) -> None:
    made = rwkv_rev.generate(bundled["4"], "The", max_new_tokens=1, temperature=0, device="cpu:0")
    assert made.startswith("The")


@pytest.mark.parametrize("device", ["cpu:3", "cuda:256"])
def test_functions_refuse_what_is_no_device(bundled: dict[str, Path], tmp_path: Path, device: str) -> None:
    """PyTorch would compute on the CPU, and on the first GPU."""
    (tmp_path / "text.txt").write_text("a text " * 20)
    text = str(tmp_path / "text.txt")
    for call in (
        lambda: rwkv_rev.generate(bundled["4"], "a", device=device),
        lambda: rwkv_rev.evaluate(bundled["4"], text, device=device),
        lambda: rwkv_rev.finetune(bundled["4"], text, tmp_path / "out", device=device),
    ):
        with pytest.raises(RwkvRevError, match=f"device = '{device}' is not known"):
            call()
    with pytest.raises(RwkvRevError, match="device = "):
        rwkv_rev.bench("kernels", BenchSettings(device=torch.device(device)))


def test_one_rule_says_what_is_here() -> None:
    found = {module for module, path in sources().items() if "cuda.is_available" in path.read_text("utf-8")}
    assert found == {"rwkv_rev.device"}
