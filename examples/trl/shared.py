"""What the examples share: options, a converted model, a trainer's settings, and the peak of memory."""

import argparse
import json
import pydoc_data.topics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import rwkv_rev
from rwkv_rev.benchmark.memory import AnonymousPeak
from rwkv_rev.device import choose_device

STRATEGIES = ("reversible", "full")
END_OF_TURN = "\n\n"


def options(about: str, steps: int, chunk_length: int = 256) -> argparse.ArgumentParser:
    """Those of every example."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--model", default="bundled:rwkv-7", help="a converted folder, or what convert takes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--strategy", choices=STRATEGIES, default="reversible")
    parser.add_argument("--chunk-length", type=int, default=chunk_length, metavar="C", help="tokens")
    parser.add_argument("--steps", type=int, default=steps, help="of the optimizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the figures go, under the example's name")
    return parser


@contextmanager
def loaded(chosen: argparse.Namespace) -> Iterator[tuple[Any, Any]]:
    """A model in float32 and its tokenizer; trl loads the folder again for a reference."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(chosen.model)
        if not folder.is_dir():
            folder = Path(made) / "model"
            rwkv_rev.convert(chosen.model, folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.set_bptt(chosen.strategy, chunk_length=chosen.chunk_length)
        yield model.to(choose_device(chosen.device)), AutoTokenizer.from_pretrained(folder)


def settings(model: Any, output: str, **own: Any) -> dict[str, Any]:
    """Of a trainer; nothing is saved or reported."""
    return {
        "output_dir": output,
        "use_cpu": model.device.type == "cpu",
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "disable_tqdm": True,
        **own,
    }


def passages(count: int, length: int, skip: int = 0) -> list[str]:
    """Stretches of a text that comes with Python, of ``length`` bytes; ``skip`` leaves out those of others."""
    text = text_of_python()
    starts = range(skip * length, (skip + count) * length, length)
    if starts[-1] + length > len(text):
        raise ValueError(f"the text has {len(text):,} bytes, not {starts[-1] + length:,}")
    return [text[start : start + length] for start in starts]


def text_of_python() -> str:
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore").decode("ascii")


class StepMemory(TrainerCallback):
    """Most memory that a step takes: on CUDA all that the allocator gave out, on a CPU what came on top."""

    def __init__(self) -> None:
        self.peak = 0

    def on_step_begin(self, *_: Any, model: Any, **__: Any) -> None:
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            self._watched = AnonymousPeak()
            self._watched.__enter__()

    def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
        if model.device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        else:
            self._watched.__exit__()
            self.peak = max(self.peak, self._watched.peak - self._watched.before)


def write(chosen: argparse.Namespace, name: str, found: dict[str, Any]) -> None:
    """Print the figures, with the most memory that a GPU gave out, and put them beside those of the other examples."""
    if choose_device(chosen.device).type == "cuda" and (peak := torch.cuda.max_memory_allocated()):
        found["max_memory_allocated"] = peak
    print(json.dumps(found, indent=1))
    if chosen.json is not None:
        all_of_them = json.loads(chosen.json.read_text("utf-8")) if chosen.json.is_file() else {}
        all_of_them[name] = found
        chosen.json.write_text(json.dumps(all_of_them, indent=1) + "\n", encoding="utf-8")
