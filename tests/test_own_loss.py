"""Losses of one's own on logits beside hooks that are not position-wise, and metrics of ``Trainer``."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import random_tokens, relative_error, tiny_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

from rwkv_rev import position_wise

IDS = random_tokens(27, batch=2)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def look_back(module: Any, given: Any, output: Any) -> Any:
    """Not position-wise: the mean over all positions."""
    return (output[0] + output[0].mean(1, keepdim=True), *output[1:])


@pytest.mark.parametrize("strategy", ["auto", "checkpoint", "reversible", "truncated"])
def test_the_gradient_of_a_loss_on_logits(strategy: str) -> None:
    """That of ``full`` in every strategy; hooks are heard over the whole context without a declaration."""
    model = tiny_model("5.2", dtype=torch.float64)
    model.blocks[0].register_forward_hook(look_back)
    parameters = list(model.parameters())
    with model.set_bptt("full"):
        expected = torch.autograd.grad(model(IDS, labels=IDS).loss, parameters)
    with model.set_bptt(strategy, chunk_length=8):
        found = torch.autograd.grad(cross_entropy(model(IDS).logits, IDS), parameters)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) <= 1e-9


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = random_tokens(27, seed=index)[0]
        return {"input_ids": ids, "labels": ids}


def arguments(folder: Path, **further: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        **further,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        num_train_epochs=1,
        optim="sgd",
        learning_rate=0.1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def test_compute_loss_func(tmp_path: Path) -> None:
    """Trainer then passes no labels: a loss on logits as above, one step of which is that of the model's own."""

    def own(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return cross_entropy(outputs.logits, labels)

    trained = []
    for function in (own, None):
        model = tiny_model("5.2", bptt="reversible", chunk_length=8)
        Trainer(model, arguments(tmp_path), train_dataset=Rows(), compute_loss_func=function).train()
        trained.append(model)
    assert not torch.equal(trained[0].head.weight, tiny_model("5.2").head.weight)
    for one, other in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        assert relative_error(one.detach(), other.detach()) <= 1e-5


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_metrics(tmp_path: Path, bf16: bool) -> None:
    """``compute_metrics`` gets the logits; who does not ask for them does not make them."""
    seen: list[Any] = []

    def metrics(result: Any) -> dict[str, float]:
        seen.append(result.predictions)
        return {}

    model = tiny_model("5.2", bptt="reversible", chunk_length=8)
    settings = arguments(tmp_path, bf16=bf16)
    rows: list[int] = []
    model.head.register_forward_hook(
        position_wise(lambda module, args, output: rows.append(output.numel() // output.shape[-1]))
    )
    scores = Trainer(model, settings, eval_dataset=Rows()).evaluate()
    assert max(rows) == 4 * 8, "a chunk of the batch at a time, and nothing for who does not ask"
    for tuples in (False, True):
        model.config.return_dict = not tuples
        with_metrics = Trainer(model, settings, eval_dataset=Rows(), compute_metrics=metrics).evaluate()
        assert with_metrics["eval_loss"] == scores["eval_loss"]
    model.config.return_dict = True
    assert (seen[0] == seen[1]).all()
    ids = torch.stack([row["input_ids"] for row in map(Rows().__getitem__, range(4))])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected = model.eval()(ids).logits.float()
    torch.testing.assert_close(torch.from_numpy(seen[0]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "none"])
def test_the_loss_is_the_first_item(gradients: bool) -> None:
    """``model(...)[0]``, as much code has it; the report has a name, and is no tensor to walk through."""
    ids, model = random_tokens(20), tiny_model("5.2")
    with torch.set_grad_enabled(gradients):
        found = model(ids, labels=ids)
        assert found[0] is found.loss
        assert len(found.to_tuple()) == len(found.keys()) == len(found.items())
        assert ("report" in set(found.keys())) == gradients and found["report"] is found.report
        assert found[:1] == (found.loss,)


KEYS = [None, [], ["logits"], ["state"], ["report"], ["logits", "past_key_values"]]


@pytest.mark.parametrize("length", [27, 8], ids=["chunks", "one chunk"])
@pytest.mark.parametrize("labels", [True, False], ids=["loss", "no loss"])
@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_predictions_whatever_is_ignored(
    tmp_path: Path, keys: list[str] | None, labels: bool, length: int
) -> None:
    """Trainer gathers and pads all that is not ignored, over batches of 3 and 1: logits, and states by row."""
    ids = random_tokens(length, batch=4)
    rows = [{"input_ids": row} | ({"labels": row} if labels else {}) for row in ids]
    model = tiny_model("5.2", bptt="reversible", chunk_length=8).eval()
    settings = arguments(tmp_path)
    settings.per_device_eval_batch_size = 3
    found = Trainer(model, settings).predict(rows, ignore_keys=keys).predictions
    with torch.no_grad():
        expected = model(ids)
    wanted = [] if "logits" in (keys or ()) else [expected.logits]
    if keys is not None and "state" not in keys:
        wanted += [tensor.transpose(0, 1) for tensor in expected.state.tensors()]
    flat = [torch.as_tensor(array) for array in torch.utils._pytree.tree_leaves(found)]
    assert len(flat) == len(wanted)
    for one, other in zip(flat, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_labels", [False, True])
def test_a_state_passes_through_what_converts_outputs(with_labels: bool) -> None:
    """accelerate makes outputs again, in float32: a text in two calls is still the text in one."""
    from accelerate.utils import convert_outputs_to_fp32

    model = tiny_model("5.2", bptt="reversible", chunk_length=8).eval()
    ids = random_tokens(20)
    wrapped = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    with torch.no_grad():
        first = wrapped(ids[:, :9], use_cache=False, labels=ids[:, :9] if with_labels else None)
        assert first.state is not None
        second = wrapped(ids[:, 9:], state=first.state).logits
        torch.testing.assert_close(second, wrapped(ids).logits[:, 9:], rtol=3e-2, atol=3e-2)
