"""What TensorBoard gets beside the numbers: bits per byte by position as an image, and samples as text.

Through the writer of transformers' own callback, which is there with ``report_to = tensorboard`` in the first process.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from rwkv_rev.training.evaluate import Evaluation
from rwkv_rev.training.plots import bucket_image, has_matplotlib


def show(
    callbacks: Iterable[TrainerCallback],
    args: TrainingArguments,
    state: TrainerState,
    evaluation: Evaluation | None,
    samples: Sequence[dict[str, Any]],
) -> None:
    """Write one evaluation, where anybody looks.

    Args:
        callbacks, args, state: of the trainer.
        evaluation: of the held-out text, if any; drawn where matplotlib is there.
        samples: ``prompt`` and ``text`` of each.
    """
    if not state.is_world_process_zero or (writer := _writer(callbacks, args, state)) is None:
        return
    step = state.global_step
    if evaluation is not None and has_matplotlib():
        names = [bucket.name for bucket in evaluation.buckets]
        curve = [bucket.bits_per_byte for bucket in evaluation.buckets]
        image = bucket_image(
            names, {"held-out": curve}, f"Bits per byte by position, step {step}", "bits per byte"
        )
        writer.add_image("eval/bits_per_byte_by_position", image, step, dataformats="HWC")
    for number, row in enumerate(samples, 1):
        writer.add_text(f"sample/{number}", _as_code(row["prompt"] + row["text"]), step)
    writer.flush()


def _writer(callbacks: Iterable[TrainerCallback], args: TrainingArguments, state: TrainerState) -> Any:
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            if callback.tb_writer is None:  # closed at the end of training, before a last evaluation
                callback.on_log(args, state, TrainerControl(), logs={})
            return callback.tb_writer
    return None


def _as_code(text: str) -> str:
    """Markdown that shows a text as it is."""
    return "\n".join(f"    {line}" for line in text.split("\n"))
