"""What a run decides before its first step: the chunk length, where none was set."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_cases import counting_text, finetune, losses, settings

from rwkv_rev import chunk_length
from rwkv_rev.bptt_settings import CHUNK_LENGTH
from rwkv_rev.chunk_length import LENGTHS, ON_CPU, USABLE
from rwkv_rev.training import finetune as module
from rwkv_rev.training.checkpoints import RUN_NAME
from rwkv_rev.training.config import FinetuneConfig, build_config
from rwkv_rev.training.finetune import plan
from rwkv_rev.training.rows import RowDataset

Cli = Callable[..., tuple[int, str, str]]
MUCH, LITTLE = 1 << 50, 1


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the free memory of a device that is the CPU and is treated like a GPU."""
    monkeypatch.setattr(chunk_length, "FORECAST_ON", ("cpu",))

    def be(number: int) -> None:
        monkeypatch.setattr(chunk_length, "free_bytes", lambda device: number)

    be(MUCH)
    return be


@pytest.fixture
def config(shallow: dict[str, Path], tmp_path: Path) -> FinetuneConfig:
    data = counting_text(tmp_path / "data.txt", 200)
    return settings(
        *(shallow["5.2"], data, tmp_path / "out"), chunk_length="auto", context_length=520, batch_size=1
    )


def changed(config: FinetuneConfig, **changes: Any) -> FinetuneConfig:
    return FinetuneConfig(**(config.to_dict() | changes))


def test_by_the_memory_that_is_free(config: FinetuneConfig, free: Callable[[int], None]) -> None:
    most = plan(config)
    assert most.config.chunk_length == LENGTHS[-1] and config.chunk_length == "auto"
    assert most.memory.gradient.strategy == "full"
    numbers = [plan(changed(config, chunk_length=tokens)) for tokens in (256, 512)]
    assert numbers[0].length_is == "as set" and numbers[0].memory.tokens_at_once == 256
    for enough, tokens in zip((numbers[0], numbers[1]), (256, 512), strict=True):
        free(int(enough.memory.reserved / USABLE) + 1)
        found = plan(config)
        assert found.config.chunk_length == tokens and found.memory.reserved == enough.memory.reserved
        assert f"forecast of {enough.memory.reserved / 1e9:.1f} GB is within 85 %" in found.length_is
        assert plan(changed(config, grad_accum=2)).config.chunk_length <= tokens


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"bptt": "truncated"}, "the gradient of truncated depends on it"),
        ({"bptt": "full"}, "full cuts nothing"),
    ],
)
def test_where_memory_does_not_decide(
    config: FinetuneConfig, free: Any, changes: dict[str, Any], why: str
) -> None:
    found = plan(changed(config, **changes))
    assert found.config.chunk_length == CHUNK_LENGTH and why in found.length_is
    if changes.get("bptt") == "truncated":
        assert found.identity["chunk_length"] == CHUNK_LENGTH


def test_additions_are_forecast(config: FinetuneConfig, free: Callable[[int], None]) -> None:
    """The longest that fits, beside LoRA too; what additions keep per token is their inputs and outputs."""
    config = changed(config, tune="lora", lora_rank=4)
    assert plan(config).config.chunk_length == LENGTHS[-1]
    alone = plan(changed(config, chunk_length=256)).memory.reserved
    free(int(alone / USABLE) + 1)
    assert plan(config).config.chunk_length == LENGTHS[0]  # whose forecast of the model alone would just fit
    assert "may not fit" in plan(config).length_is


def test_pieces_of_packed_rows_are_forecast(
    config: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a state in the graph, and a border puts the state on the tape whole."""
    data = tmp_path / "short.jsonl"
    data.write_text('{"text": "a document of some forty bytes, no more"}\n' * 60)
    config = changed(config, data=[str(data)], pack=True, context_length=600, chunk_length=128)
    memory = plan(config).memory
    monkeypatch.setattr(RowDataset, "most_pieces", lambda self, count: 1)
    alone = plan(config).memory
    state = 4 * 128 * 64 * 2
    assert memory.gradient.graph - alone.gradient.graph == 2.5 * 4 * state  # 5 pieces reach into some
    assert memory.gradient.tape > 2 * alone.gradient.tape


def test_a_dry_run_says_so(cli: Cli, config: FinetuneConfig) -> None:
    common = ("finetune", config.model, "--data", *config.data, "--output", "dry", "--device", "cpu")
    code, out, err = cli(*common, "--dry-run")
    assert code == 0, err
    assert re.search(rf"chunk length +{ON_CPU:,} \(chosen as within 6 % of the fastest", out)
    code, out, _ = cli(*common, "--dry-run", "--json", "--chunk-length", "auto")
    values = json.loads(out)
    assert values["settings"]["chunk_length"] == ON_CPU and "fastest" in values["chunk_length_is"]
    code, _, err = cli(*common, "--chunk-length", "all")
    assert code == 2 and "is not a number of tokens such as 4096, 16k or 1m, or auto" in err


def test_numbers_and_auto_are_settings(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("chunk_length: auto\n")
    assert build_config(file=tmp_path / "run.yaml").chunk_length == "auto"
    assert build_config(file=tmp_path / "run.yaml", pairs=["chunk_length=2k"]).chunk_length == 2048
    assert FinetuneConfig().chunk_length == "auto"


def test_a_resumed_run_goes_on_with_what_it_began_with(
    config: FinetuneConfig, free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    free(LITTLE)
    config = changed(config, max_steps=4, save_every=2)
    whole = changed(config, output=f"{config.output}-whole")
    assert finetune(whole).tape_bytes > 0
    summary = json.loads((Path(whole.output) / "training" / "summary.json").read_text())
    assert summary["plan"]["settings"]["chunk_length"] == LENGTHS[0]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("rwkv_rev.training.finetune.save_finetuned", lambda *_: 1 / 0)
        finetune(changed(config, save_total=5))
    checkpoints = sorted(config.working_directory.glob("checkpoint-*"))
    assert json.loads((checkpoints[0] / RUN_NAME).read_text())["config"]["chunk_length"] == LENGTHS[0]
    free(MUCH)
    resumed = changed(config, resume=str(checkpoints[0]))
    assert plan(resumed).length_is == f"what {checkpoints[0].name} was trained with"
    told: list[str] = []
    finetune(resumed, notify=told.append)
    assert any(line.startswith("chunks of 256 tokens: what checkpoint-2") for line in told)
    assert losses(Path(config.output)) == losses(Path(whole.output))
    # a number that is set is taken
    assert plan(changed(whole, output="other", chunk_length=128)).config.chunk_length == 128
    # and a run that is finished is known, whatever is free now
    assert plan(changed(config, resume="auto")).made is not None


def test_processes_take_the_shortest(
    config: FinetuneConfig, free: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What all agree on is what the run trains with and records."""
    asked: list[int] = []
    monkeypatch.setattr(module, "shortest_of_all", lambda tokens, device: asked.append(tokens) or 300)
    told: list[str] = []
    finetune(changed(config, max_steps=1), notify=told.append)
    assert asked == [LENGTHS[-1]]
    summary = json.loads((Path(config.output) / "training" / "summary.json").read_text())
    assert summary["plan"]["settings"]["chunk_length"] == 300
    assert "chunks of 300 tokens: the shortest of all processes" in told
