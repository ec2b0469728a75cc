"""trl's losses over a long context: the gradient of ``full``, in about the memory of the model's own loss."""

import pydoc_data.topics
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer

from rwkv_rev import RwkvRevForCausalLM, position_wise

datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)

LENGTH, CHUNK = 8192, 512
TRL_VOCABULARY = 32768
"""Width of a buffer of trl's, of which it writes as much as the model has tokens: the rest is no memory."""
TOPICS = pydoc_data.topics.topics
TEXT = "".join(TOPICS[name] for name in sorted(TOPICS) if TOPICS[name].isascii())


@position_wise
class Peak(TorchDispatchMode):
    """Bytes of tensors that were made inside and are still there: now, and most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in _tensors((*args, *(kwargs or {}).values()))}
        for leaf in _tensors((result,)):
            storage = leaf.untyped_storage()
            if storage.data_ptr() in given or storage in self._seen or leaf.shape[-1:] == (TRL_VOCABULARY,):
                continue
            self._seen.add(storage)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._gone, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _gone(self, size: int) -> None:
        self.now -= size


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Those among them, and in lists and tuples of theirs. (PyTorch's ``tree_leaves`` takes as long as the models.)"""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def peak(model: RwkvRevForCausalLM, loss: Callable[[], Tensor]) -> tuple[int, list[Tensor]]:
    """Most bytes at once while the loss and its gradient are computed, and the gradient."""
    model.zero_grad()
    with Peak() as counted:
        loss().backward()
    return counted.most, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def trainer(kind: str, model: RwkvRevForCausalLM, folder: Path, output: Path) -> Any:
    common = {
        "output_dir": str(output),
        "per_device_train_batch_size": 1,
        "max_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "bf16": False,
        "max_length": LENGTH,
    }
    half = LENGTH // 2
    if kind == "sft":
        row, makers = {"text": TEXT[: LENGTH + 100]}, (trl.SFTTrainer, trl.SFTConfig)
    else:
        row = {
            "prompt": TEXT[:half],
            "chosen": TEXT[half : LENGTH + 50],
            "rejected": TEXT[LENGTH : LENGTH + half + 50],
        }
        makers = (trl.DPOTrainer, trl.DPOConfig)
    return makers[0](
        model=model,
        args=makers[1](**common),
        train_dataset=datasets.Dataset.from_list([row]),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )


@pytest.mark.parametrize(("kind", "rows"), [("sft", 1), ("dpo", 2)])
def test_gradient_and_memory(kind: str, rows: int, bundled: dict[str, Path], tmp_path: Path) -> None:
    model = RwkvRevForCausalLM.from_pretrained(
        bundled["5.2"], dtype=torch.float32, num_hidden_layers=3
    ).train()
    made = trainer(kind, model, bundled["5.2"], tmp_path)
    batch = next(iter(made.get_train_dataloader()))
    assert batch["input_ids"].shape == (rows, LENGTH)
    ids = batch["input_ids"]
    with model.set_bptt("reversible", chunk_length=CHUNK):
        own, _ = peak(model, lambda: model(ids, labels=ids).loss)
        memory, found = peak(model, lambda: made.compute_loss(model, dict(batch)))
    with model.set_bptt("full"):
        whole, expected = peak(model, lambda: made.compute_loss(model, dict(batch)))
    assert memory <= 1.25 * own and whole > 5 * memory
    one, other = (torch.cat([g.flatten() for g in gradients]).double() for gradients in (found, expected))
    assert float((one - other).norm() / other.norm()) <= 1e-5
