"""What TensorBoard gets at each evaluation: an image of bits per byte by position, and the samples."""

import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
from finetune_cases import counting_text, finetune, settings

from rwkv_rev.training.callbacks import refuse_missing_reporter
from rwkv_rev.training.config import FinetuneConfig
from rwkv_rev.training.plots import bucket_image

PROMPT = "7 squared\nis"


class Writer:
    """Stands in for tensorboard's, and keeps what is written until it is flushed."""

    made: ClassVar[list["Writer"]] = []

    def __init__(self, log_dir: str) -> None:
        self.log_dir, self.written, self._waiting = log_dir, [], []
        self.made.append(self)

    def add_image(self, tag: str, image: Any, step: int, dataformats: str) -> None:
        assert dataformats == "HWC" and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        self._waiting.append((tag, step, image))

    def add_text(self, tag: str, text: str, step: int | None = None) -> None:
        self._waiting.append((tag, step, text))

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self._waiting.append((tag, step, value))

    def flush(self) -> None:
        self.written += self._waiting
        self._waiting = []

    def close(self) -> None:
        self.flush()


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[Writer]:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: True)
    monkeypatch.setattr("rwkv_rev.training.callbacks.find_spec", lambda name: True)
    monkeypatch.setattr(Writer, "made", [])
    return Writer.made


@pytest.fixture
def config(shallow: dict[str, Path], tmp_path: Path) -> Callable[..., FinetuneConfig]:
    data = counting_text(tmp_path / "data.txt", 200)

    def make(**changes: Any) -> FinetuneConfig:
        values: dict[str, Any] = {"context_length": 64, "chunk_length": 32, "max_steps": 2}
        return settings(shallow["4"], data, tmp_path / "out", **(values | changes))

    return make


def written(writers: list[Writer], tag: str) -> dict[int, Any]:
    return {step: value for writer in writers for name, step, value in writer.written if name == tag}


@pytest.mark.parametrize("every", [0, 1])
def test_images_and_texts(
    config: Callable[..., FinetuneConfig], writers: list[Writer], tmp_path: Path, every: int
) -> None:
    """At each evaluation, also at the one after training, when transformers has closed its writer."""
    changes: dict[str, Any] = {"eval_every": every, "sample_prompt": [PROMPT], "sample_tokens": 4}
    held_out = {"eval_data": [str(tmp_path / "data.txt")], "eval_tokens": 128}
    finetune(config(report_to="tensorboard", **changes, **held_out))
    steps = [0, 1, 2] if every else [0, 2]
    images = written(writers, "eval/bits_per_byte_by_position")
    assert [*images] == steps == [*written(writers, "eval/loss")] == [*written(writers, "sample/1")]
    assert not np.array_equal(images[0], images[2]), "drawn anew"
    text = written(writers, "sample/1")[2]
    assert text.startswith("    7 squared\n    is") and all(
        line.startswith("    ") for line in text.split("\n")
    )
    writers.clear()
    finetune(replace(config(report_to="tensorboard", **changes), force=True))
    assert [*written(writers, "sample/1")] == steps and not written(writers, "eval/bits_per_byte_by_position")


def test_nobody_looks(config: Callable[..., FinetuneConfig], writers: list[Writer], tmp_path: Path) -> None:
    finetune(config(eval_data=[str(tmp_path / "data.txt")], eval_tokens=64))
    assert not writers


def test_without_matplotlib(
    config: Callable[..., FinetuneConfig],
    writers: list[Writer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rwkv_rev.training.tensorboard.has_matplotlib", lambda: False)
    finetune(config(report_to="tensorboard", eval_data=[str(tmp_path / "data.txt")], eval_tokens=64))
    assert [*written(writers, "eval/loss")] == [0, 2]
    assert not written(writers, "eval/bits_per_byte_by_position")


def test_the_image_is_the_plot(tmp_path: Path) -> None:
    from matplotlib.image import imread

    from rwkv_rev.training.plots import plot_buckets

    given: tuple[Any, ...] = (["0-1k", "1k-4k"], {"held-out": [2.0, 1.5]})
    plot_buckets(*given, tmp_path / "plot.png", "a title", "bits per byte")
    there = (imread(tmp_path / "plot.png")[..., :3] * 255).round()
    assert np.array_equal(bucket_image(*given, "a title", "bits per byte"), there)
    assert not np.array_equal(
        bucket_image(given[0], {"held-out": [1.5, 2.0]}, "a title", "bits per byte"), there
    )


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard")
def test_events_that_tensorboard_reads(config: Callable[..., FinetuneConfig], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    refuse_missing_reporter("tensorboard")
    data = [str(tmp_path / "data.txt")]
    finetune(
        config(report_to="tensorboard", eval_data=data, eval_tokens=64, eval_every=1, sample_prompt=[PROMPT])
    )
    (folder,) = {path.parent for path in (tmp_path / "out" / "training" / "runs").rglob("events.*")}
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0}).Reload()
    images = events.Images("eval/bits_per_byte_by_position")
    assert [image.step for image in images] == [0, 1, 2] and images[0].width > images[0].height > 100
    texts = events.Tensors("sample/1/text_summary")
    assert [text.step for text in texts] == [0, 1, 2]
    assert texts[0].tensor_proto.string_val[0].startswith(b"    7 squared\n    is")
