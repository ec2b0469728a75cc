"""Runs of a few steps: what gets better, what is written, what is refused, and that a resumed run is the same run."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from finetune_cases import counting_text, finetune, losses, settings, split_text
from safetensors.torch import load_file

import rwkv_rev
from rwkv_rev.errors import OutputError, RwkvRevError
from rwkv_rev.modeling import RwkvRevForCausalLM
from rwkv_rev.training.callbacks import StopAtBadLoss, read_log
from rwkv_rev.training.checkpoints import checkpoints
from rwkv_rev.training.finetune import plan

RATES = {"full": 1e-3, "lora": 3e-3, "state": 1.0}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("tune", RATES)
def test_held_out_text_gets_better(shallow: dict[str, Path], tmp_path: Path, tune: str) -> None:
    train, held_out = split_text(tmp_path)
    result = finetune(
        settings(
            shallow["5.2"],
            train,
            tmp_path / "out",
            tune=tune,
            lr=RATES[tune],
            max_steps=6,
            context_length=192,
            chunk_length=64,
            eval_data=[str(held_out)],
            eval_tokens=1024,
        )
    )
    assert result.held_out is not None
    before, after = result.held_out
    assert after < before - (0.02 if tune == "state" else 0.1), result
    before_weights, after_weights = weights(shallow["5.2"]), weights(tmp_path / "out")
    changed = {
        name for name, tensor in before_weights.items() if not torch.equal(tensor, after_weights[name])
    }
    if tune == "full":
        assert len(changed) > 0.95 * len(before_weights)
    elif tune == "lora":
        assert changed and all(".blocks." in name and name.endswith(".weight") for name in changed)
        assert not any(".ln" in name for name in changed)
    else:
        assert not changed
        assert set(after_weights) - set(before_weights) == {f"model.initial_wkv.{i}" for i in range(2)}
    for name in set(before_weights) - changed:
        assert after_weights[name].dtype == before_weights[name].dtype, "unchanged tensors keep their bits"


def test_the_output_is_a_normal_model_folder(bundled: dict[str, Path], tmp_path: Path) -> None:
    data, output = counting_text(tmp_path / "data.txt"), tmp_path / "out"
    config = settings(bundled["5.2"], data, output, eval_data=[str(data)], eval_tokens=200)
    result = finetune(config, curve=True)
    assert result.steps == 3 and result.last_loss < result.first_loss
    assert result.tape_bytes > 0 and result.memory_bytes > 0 and result.tokens == 3 * 2 * 256
    assert {path.name for path in tmp_path.iterdir()} == {"data.txt", "out", "cache"}, (
        "no work folder is left"
    )
    assert {path.name for path in (output / "training").iterdir()} == {
        "log.jsonl",
        "summary.json",
        "loss.png",
    }
    config = rwkv_rev.RwkvRevConfig.from_pretrained(str(output))
    source = rwkv_rev.RwkvRevConfig.from_pretrained(str(bundled["5.2"]))
    assert config.use_cache == source.use_cache
    assert config.dtype == torch.float32
    record = json.loads((output / "conversion.json").read_text())
    assert record["source"] == "bundled:rwkv-5.2" and len(record["finetuned"]) == 1
    card = (output / "README.md").read_text()
    for text in ("fine-tuned", "data.txt", "256 tokens", "chunks of 64", "full (1,354,752", "held-out"):
        assert text in card
    public = card + json.dumps(record) + (output / "training" / "summary.json").read_text()
    assert str(tmp_path) not in public and str(bundled["5.2"]) not in public, "no path of this machine"
    again = finetune(settings(output, data, tmp_path / "twice", max_steps=1))
    assert again.first_loss < result.first_loss
    assert len(json.loads((tmp_path / "twice" / "conversion.json").read_text())["finetuned"]) == 2


@pytest.fixture(scope="module")
def tuned(shallow: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The output of a run of three steps by version and kind of tuning, made once."""

    @cache
    def get(version: str, tune: str) -> Path:
        folder = tmp_path_factory.mktemp("tuned")
        data = counting_text(folder / "data.txt")
        finetune(settings(shallow[version], data, folder / "out", tune=tune, lr=3e-3))
        return folder / "out"

    return get


@pytest.mark.parametrize(("version", "tune"), [("5.2", "full"), ("4", "lora")])
def test_a_finetuned_model_runs_elsewhere(
    shallow: dict[str, Path], tuned: Callable[[str, str], Path], version: str, tune: str
) -> None:
    """``verify`` hands its values to the rwkv package, transformers (RWKV-4) and the float64 scan."""
    output = tuned(version, tune)
    report = rwkv_rev.verify(output, tokens=40)
    assert report.passed, report.table()
    assert {row.oracle for row in report.rows} >= {"rwkv", "naive"} | (
        {"transformers"} if version == "4" else set()
    )
    original = rwkv_rev.verify(output, original=f"{shallow[version]}.pth", tokens=16)
    assert not original.passed, "the values are no longer the original's"


@pytest.mark.parametrize(("version", "tune"), [("5.2", "full"), ("5.2", "lora"), ("4", "full")])
def test_the_rwkv_package_loads_the_export(
    shallow: dict[str, Path], tuned: Callable[[str, str], Path], tmp_path: Path, version: str, tune: str
) -> None:
    """``export --to blinkdl``: the package reads the file itself and computes the fine-tuned model's logits."""
    output = tuned(version, tune)
    rwkv_rev.export(output, tmp_path / "out.pth", to="blinkdl")
    found = rwkv_rev.verify(output, original=str(tmp_path / "out.pth"), oracle="rwkv", tokens=40)
    assert found.passed and [row.oracle for row in found.rows] == ["rwkv"], found.table()
    rwkv_rev.export(shallow[version], tmp_path / "before.pth", to="blinkdl")
    before = rwkv_rev.verify(output, original=str(tmp_path / "before.pth"), oracle="rwkv", tokens=16)
    assert not before.rows[0].passed, "the package must have read what training changed"


@pytest.mark.parametrize(("steps", "warmup", "shares"), [(1, 0.03, [1.0]), (4, 3, [1 / 3, 2 / 3, 1.0, 1.0])])
def test_the_first_step_trains(
    shallow: dict[str, Path], tmp_path: Path, steps: int, warmup: float, shares: list[float]
) -> None:
    """Warmup begins with the first step's share: with a rate of 0 a run of one step would train nothing."""
    data = counting_text(tmp_path / "data.txt", 100)
    values = {
        "max_steps": steps,
        "warmup": warmup,
        "lr_schedule": "constant",
        "lr": 1e-3,
        "context_length": 128,
    }
    finetune(settings(shallow["4"], data, tmp_path / "out", **values))
    rates = [
        row["learning_rate"] for row in read_log(tmp_path / "out" / "training" / "log.jsonl") if "loss" in row
    ]
    assert rates == pytest.approx([1e-3 * share for share in shares])
    before, after = weights(shallow["4"]), weights(tmp_path / "out")
    assert any(not torch.equal(before[name].float(), after[name].float()) for name in before)


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_packed_rows_train_as_their_documents(shallow: dict[str, Path], tmp_path: Path, version: str) -> None:
    """One packed row is what all its documents are in one batch: the same losses, step by step."""
    data = tmp_path / "short.jsonl"
    texts = [f"{n} squared is {n * n}. " * (1 + n % 4) for n in range(6)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    found = []
    for pack, batch in ((True, 1), (False, len(texts))):
        output = tmp_path / f"out-{batch}"
        config = settings(
            shallow[version], data, output, pack=pack, batch_size=batch, context_length=1024, lr=1e-3
        )
        finetune(config)
        found.append(losses(output))
    assert found[0] == pytest.approx(found[1], rel=1e-4) and found[0][-1] < found[0][0]


def test_nothing_is_trained_after_the_last_step(
    shallow: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between its last checkpoint and its output, a run has nothing left to train when it is resumed."""
    data = counting_text(tmp_path / "data.txt", 200)
    values = {"max_steps": 4, "save_every": 2, "lr_schedule": "constant", "context_length": 128}
    finetune(settings(shallow["4"], data, tmp_path / "whole", **values))
    config = settings(shallow["4"], data, tmp_path / "cut", **values)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("rwkv_rev.training.finetune.save_finetuned", lambda *_: 1 / 0)
        finetune(config)
    assert [path.name for path in checkpoints(config.working_directory)][-1] == "checkpoint-4"
    config.resume = "auto"
    finetune(config)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    before, after = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_in_progress_is_not_emptied_by_force(shallow: dict[str, Path], tmp_path: Path) -> None:
    data = counting_text(tmp_path / "data.txt")
    config = settings(shallow["5.2"], data, tmp_path / "out", force=True, max_steps=1)
    kept = config.working_directory / "checkpoint-2" / "model.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_text("of the other run")
    with (
        FileLock(config.working_directory / ".lock"),
        pytest.raises(OutputError, match="is in use by another run"),
    ):
        finetune(config)
    assert kept.read_text() == "of the other run"
    finetune(config)
    assert (tmp_path / "out").is_dir() and not config.working_directory.exists()


def test_an_output_in_use_is_refused(shallow: dict[str, Path], tmp_path: Path) -> None:
    config = settings(shallow["5.2"], counting_text(tmp_path / "data.txt"), tmp_path / "out")
    config.working_directory.mkdir()
    with (
        FileLock(config.working_directory / ".lock"),
        pytest.raises(OutputError, match="is in use by another run"),
    ):
        finetune(config)
    assert not (tmp_path / "out").exists()


def test_export_to_transformers(tuned: Callable[[str, str], Path], tmp_path: Path) -> None:
    from transformers import RwkvForCausalLM

    output = tuned("4", "full")
    rwkv_rev.export(output, tmp_path / "hf", to="hf")
    theirs = RwkvForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, rescale_every=0).eval()
    ours = RwkvRevForCausalLM.from_pretrained(str(output), dtype=torch.float32).eval()
    ids = torch.tensor([list(b"12 squared is 144\n13 squared is ")])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_adapters_lie_beside_the_merged_weights(shallow: dict[str, Path], tmp_path: Path) -> None:
    data = counting_text(tmp_path / "data.txt")
    config = settings(
        shallow["5.2"],
        data,
        tmp_path / "out",
        tune="lora",
        lora_rank=4,
        lora_targets=["time_mix.key"],
        lr=1e-2,
    )
    finetune(config)
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 2
    before, after = weights(shallow["5.2"]), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.blocks.{i}.time_mix.key.weight" for i in range(2)}
    name = "model.blocks.1.time_mix.key"
    a = next(t for n, t in adapter.items() if f"{name}.lora_A" in n)
    b = next(t for n, t in adapter.items() if f"{name}.lora_B" in n)
    torch.testing.assert_close(after[f"{name}.weight"] - before[f"{name}.weight"].float(), 2.0 * b @ a)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param(
            {"tune": "lora", "lora_dropout": 0.2, "lora_rank": 4, "grad_accum": 2}, marks=pytest.mark.slow
        ),
        {"tune": "state", "carry_state": True},
    ],
    ids=["full", "lora-dropout-accumulated", "state-carried"],
)
def test_a_resumed_run_is_the_same_run(
    shallow: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Interrupted after its third step and resumed from the checkpoint of the second, into the second epoch."""
    data = tmp_path / "data.jsonl"
    text = counting_text(tmp_path / "text.txt", 20).read_text()
    pieces = [text[:190], text[190:225], text[225:330], text[330:]]
    data.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    common = {
        "context_length": 64,
        "chunk_length": 25,
        "max_steps": 5,
        "save_every": 2,
        "save_total": 1,
    } | changes
    whole = settings(shallow["5.2"], data, tmp_path / "whole", **common)
    finetune(whole)
    config = settings(shallow["5.2"], data, tmp_path / "cut", **common)

    def stop(self: Any, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(StopAtBadLoss, "on_log", stop)
        with pytest.raises(Interrupted):
            finetune(config)
    assert [path.name for path in checkpoints(config.working_directory)] == ["checkpoint-2"]
    with pytest.raises(RwkvRevError, match=r"holds an unfinished run \(checkpoint-2\): resume='auto'"):
        plan(config)
    config.resume = "auto"
    torch.manual_seed(99)
    finetune(config)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "cut")[name]), name


def test_refuses_a_checkpoint_of_another_run(shallow: dict[str, Path], tmp_path: Path) -> None:
    data = counting_text(tmp_path / "data.txt", 100)
    config = settings(shallow["5.2"], data, tmp_path / "out", save_every=1, max_steps=2, context_length=64)
    config.working_directory.mkdir()
    kept = tmp_path / "kept"
    finetune(config)
    config.output = str(tmp_path / "other")
    with pytest.MonkeyPatch.context() as patch:  # keep the work folder
        patch.setattr("rwkv_rev.training.finetune.save_finetuned", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finetune(config)
    config.working_directory.rename(kept)
    for changes, message in (
        (
            {"model": str(tmp_path / "out")},
            "cannot be resumed: the model was another one; set it back, or begin anew, without what is there: "
            "force=True, no resume$",
        ),
        ({"batch_size": 1}, "cannot be resumed: rows_per_step was 2 and is now 1"),
        ({"tune": "state"}, "cannot be resumed: tune was full and is now state"),
        (
            {"data": [str(counting_text(tmp_path / "d.txt", 90))]},
            "cannot be resumed: the text, the tokenizer or how",
        ),
        ({"lr": 0.5}, "cannot be resumed: lr was 0.0001 and is now 0.5"),
        ({"max_steps": 17}, r"cannot be resumed: steps was \d and is now 17"),
        ({"lr_schedule": "constant"}, "cannot be resumed: lr_schedule was cosine and is now constant"),
        ({"weight_decay": 0.1}, "cannot be resumed: weight_decay was 0.0 and is now 0.1"),
        ({"bptt": "truncated"}, "cannot be resumed: bptt was exact and is now truncated"),
        (
            {"lr": 0.6},
            "is now 0.6; set it back, or begin anew, without what is there: force=True, no resume$",
        ),
        ({"lr": 0.5, "force": True}, "is now 0.5; set it back, or"),
        (
            {"lr": 0.5, "max_steps": 17, "tune": "lora"},
            r"tune was full and is now lora, lr was 0.0001 and is now 0.5, steps was 2 and is now 17; set them back,",
        ),
        ({"resume": str(tmp_path / "nowhere")}, "is not a whole checkpoint"),
    ):
        values = {**config.to_dict(), "output": str(tmp_path / "next"), "resume": str(kept / "checkpoint-1")}
        with pytest.raises(RwkvRevError, match=message):
            finetune(type(config)(**(values | changes)))
        assert not (tmp_path / "next").exists()


def test_refuses_what_cannot_work(
    shallow: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rwkv_rev.training.callbacks.find_spec", lambda name: None)
    data, empty = counting_text(tmp_path / "data.txt"), tmp_path / "empty.txt"
    empty.write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    good = settings(shallow["5.2"], data, tmp_path / "out")
    for changes, message in (
        ({"data": [str(empty)]}, "holds no text at all"),
        ({"data": [str(tmp_path / "absent.txt")]}, "no such file or folder"),
        ({"model": str(tmp_path)}, "is not a converted model"),
        ({"output": str(tmp_path / "full")}, "already exists; pass force=True"),
        ({"output": str(shallow["5.2"]), "force": True}, "holds the model itself"),
        ({"chunk_length": 1 << 32, "context_length": 1 << 32, "batch_size": 1 << 20}, "GB are free: use"),
        ({"tune": "state", "model": str(shallow["4"])}, "tune = state needs RWKV-5"),
        ({"tune": "lora", "lora_targets": ["query"]}, "no linear map is called 'query'; there are gate, key"),
        ({"device": "tpu"}, "device = 'tpu' is not known"),
        ({"dtype": "float16"}, "float16 needs a GPU"),
        ({"report_to": "wandb"}, "report_to = wandb needs a package: pip install wandb"),
    ):
        with pytest.raises(RwkvRevError, match=message) as error:
            finetune(type(good)(**(good.to_dict() | changes)))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_stops_the_run(shallow: dict[str, Path], tmp_path: Path) -> None:
    data = counting_text(tmp_path / "data.txt", 100)
    with pytest.raises(RwkvRevError, match=r"the loss is (nan|inf) at step \d+: lower lr"):
        finetune(settings(shallow["5.2"], data, tmp_path / "out", lr=1e9, warmup=0, max_grad_norm=0.0))
    assert not (tmp_path / "out").exists()


def test_plan_tells_and_touches_nothing(shallow: dict[str, Path], tmp_path: Path) -> None:
    data = counting_text(tmp_path / "data.txt", 100)
    config = settings(shallow["5.2"], data, tmp_path / "out", context_length=100_000, max_steps=None)
    planned = plan(config).to_dict()
    assert not (tmp_path / "out").exists() and not config.working_directory.exists()
    assert planned["steps"] == 1 and planned["data"]["documents"] == 1
    assert planned["tokens_per_step"] == planned["data"]["tokens"] == data.stat().st_size
    assert any("longer than any document" in note for note in planned["data"]["notes"])
    assert planned["settings"]["lr"] == 1e-4 and planned["memory"]["device"] > 0
    json.dumps(planned)
