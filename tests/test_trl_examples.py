"""The examples with trl's trainers: short runs, and the page's figures, which are those of ``results.json``."""

import ctypes
import gc
import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("trl", minversion="1.16")
FOLDER = Path(__file__).parent.parent / "examples" / "trl"
NAMES = ("sft", "dpo", "grpo")

# trl still uses names that transformers 5 renamed, and opens its cards without closing them
pytestmark = [
    pytest.mark.usefixtures("numbered_datasets"),
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.* is deprecated:FutureWarning"),
]


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The scripts import one another, as they do where they are started."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = (*NAMES, "memory", "shared")
    yield {name: import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name)


SHORT = {
    "sft": ["--context-length", "96", "--conversations", "12", "--chunk-length", "40"],
    "dpo": ["--prompt-length", "40", "--answer-length", "24", "--chunk-length", "40"],
    "grpo": ["--prompt-length", "40", "--answer-length", "8", "--chunk-length", "20"],
}


@pytest.mark.parametrize("name", NAMES)
def test_a_short_run(
    name: str,
    examples: dict[str, ModuleType],
    shallow: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(examples[name], "HELD_OUT", 2)
    if name != "sft":
        passages = examples["shared"].passages
        monkeypatch.setattr(
            examples[name], "passages", lambda count, length: passages(min(count, 10), length)
        )
    out = tmp_path / "found.json"
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what tests before this one freed would be taken again
    common = ["--model", str(shallow["7"]), "--device", "cpu", "--steps", "2", "--json", str(out)]
    found = examples[name].main([*common, *SHORT[name]])
    assert found["before"] != found["after"] and found["steps"] == 2
    assert json.loads(out.read_text()) == {name: found}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own accounts")
@pytest.mark.parametrize("name", NAMES)
def test_memory_of_a_step(
    name: str,
    examples: dict[str, ModuleType],
    shallow: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The graph of 600 tokens, where the step before had 192, is more than what freed blocks give."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what tests before this one freed would be taken again
    common = ["--model", str(shallow["7"]), "--device", "cpu", "--strategy", "full", "--chunk-length", "64"]
    examples["memory"].main([*common, "--point", name, "600"])
    assert int(capsys.readouterr().out.splitlines()[-1]) > 2**20


def test_the_page_has_the_figures_that_were_measured(examples: dict[str, ModuleType]) -> None:
    results = json.loads((FOLDER / "results.json").read_text("utf-8"))
    page = (FOLDER / "README.md").read_text("utf-8")
    assert examples["memory"].table(results["memory, cpu"]["points"]) in page
    for row in (
        f"| SFT | held-out loss (nats per token) | {results['sft']['before']['held_out_loss']:.2f} | "
        f"{results['sft']['after']['held_out_loss']:.4f} |",
        f"| | right answers, held out | {results['sft']['before']['right_answers']:.0%} | "
        f"{results['sft']['after']['right_answers']:.0%} |",
        f"| DPO | held-out loss | {results['dpo']['before']['held_out_loss']:.3f} | "
        f"{results['dpo']['after']['held_out_loss']:.3f} |",
        f"| | preferred more than by the reference, held out | {results['dpo']['before']['preferred']:.0%} | "
        f"{results['dpo']['after']['preferred']:.0%} |",
        f"| GRPO | reward, held-out prompts | {results['grpo']['before']['held_out_reward']:.2f} | "
        f"{results['grpo']['after']['held_out_reward']:.2f} |",
    ):
        assert row in page
