"""What transformers' Trainer divides a loss by, in its own training steps: the tokens that are predicted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import random_tokens, relative_error, tiny_model
from peft import PromptTuningConfig, get_peft_model
from test_label_smoothing import BATCHES, Around, Mine, adapted, by_hand, compiled
from torch import Tensor, nn
from trainer_cases import one_step
from transformers import Trainer, TrainingArguments

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
EPSILON = 0.1
IDS = random_tokens(23, batch=2)
STRATEGIES = ["full", "checkpoint", "reversible"]


class Summed(Trainer):
    """Has a loss of its own."""

    def compute_loss(
        self, model: Any, inputs: Any, *args: Any, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        inputs = dict(inputs)
        logits = model(**inputs | {"labels": None})["logits"]
        return of_labels(logits, inputs["labels"], num_items_in_batch)


def of_labels(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
    """A loss of somebody's own of all labels from each row's second on, padding's too."""
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs
    nats = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return nats / num_items_in_batch


def step(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    folder: Path,
    epsilon: float,
    kind: type[Trainer] = Trainer,
    **own: Any,
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step of a Trainer's, over all batches."""
    return one_step(
        model,
        batches,
        folder,
        kind=kind,
        more={"data_collator": lambda rows: rows[0], **own},
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(batches),
        remove_unused_columns=False,
        label_smoothing_factor=epsilon,
    )


def truth_of(
    model: nn.Module, batches: list[dict[str, Tensor]], targets: list[Tensor], epsilon: float
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the joined batch, by float64 autograd over the whole contexts."""
    log_p = torch.cat(
        [
            model(**{name: given for name, given in batch.items() if name not in ("labels", "shift_labels")})[
                "logits"
            ].log_softmax(-1)[target != -100]
            for batch, target in zip(batches, targets, strict=True)
        ]
    )
    predicted = torch.cat([target[target != -100] for target in targets])
    likelihood = log_p.gather(-1, predicted[:, None]).mean()
    loss = -(1 - epsilon) * likelihood - epsilon * log_p.mean()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    named = zip(trained, found, strict=True)
    return loss.item(), {name: gradient for name, gradient in named if gradient is not None}


def assert_step(found: tuple[float, dict[str, Tensor]], truth: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(truth[0], rel=1e-6)
    for name, gradient in truth[1].items():
        assert relative_error(found[1][name], gradient) <= 1e-6, name


def two_batches(kind: str) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """One of that kind, and one that is all tokens, with their targets; labels are the ids."""
    given, counts, starts = BATCHES[kind]
    ids = IDS[: len(counts)]
    whole = random_tokens(14, batch=1, seed=3)
    batches = [{"input_ids": ids, "labels": ids, **given}, {"input_ids": whole, "labels": whole}]
    every = torch.ones_like(whole, dtype=torch.bool)
    return batches, [by_hand(ids, counts, starts), by_hand(whole, every, ~every)]


@pytest.mark.parametrize("epsilon", [0.0, EPSILON])
@pytest.mark.parametrize(
    ("version", "strategy", "chunk"),
    [
        *(("5.2", strategy, chunk) for strategy in STRATEGIES for chunk in (8, 12)),
        *((version, "reversible", 8) for version in ("4", "6", "7")),
    ],
)
@pytest.mark.parametrize("kind", BATCHES)
def test_padding_holes_and_documents_do_not_count(
    kind: str, version: str, strategy: str, chunk: int, epsilon: float, tmp_path: Path
) -> None:
    model = tiny_model(version, dtype=torch.float64)
    batches, targets = two_batches(kind)
    model.set_bptt("full", chunk_length=1000)
    truth = truth_of(model, batches, targets, epsilon)
    model.set_bptt(strategy, chunk_length=chunk)
    assert_step(step(model, batches, tmp_path, epsilon), truth)


def subclass(model: nn.Module) -> nn.Module:
    model.__class__ = Mine
    return model


MODELS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "subclass": subclass,
    "peft": adapted,
    "compiled": compiled,
}


@pytest.mark.parametrize("epsilon", [0.0, EPSILON])
@pytest.mark.parametrize("around", MODELS)
def test_subclasses_and_adapted_models(around: str, epsilon: float, tmp_path: Path) -> None:
    base = tiny_model("5.2", dtype=torch.float64)
    model = MODELS[around](base)
    batches, targets = two_batches("padding and holes")
    with torch.compiler.set_stance("force_eager"):
        base.set_bptt("full", chunk_length=1000)
        truth = truth_of(model, batches, targets, epsilon)
        base.set_bptt("reversible", chunk_length=8)
        assert_step(step(model, batches, tmp_path, epsilon), truth)


@pytest.mark.parametrize("epsilon", [0.0, EPSILON])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_shifted_labels(strategy: str, epsilon: float, tmp_path: Path) -> None:
    """They are not shifted, and masked ones do not count."""
    model = tiny_model("5.2", dtype=torch.float64)
    batches, _ = two_batches("padding and holes")
    targets = []
    for seed, batch in enumerate(batches):
        batch["shift_labels"] = random_tokens(batch["labels"].shape[1], batch=len(batch["labels"]), seed=seed)
        mask = batch.get("attention_mask", torch.ones_like(batch["labels"]))
        targets.append(batch["shift_labels"].masked_fill(mask == 0, -100))
    truth = truth_of(model, batches, targets, epsilon)
    model.set_bptt(strategy, chunk_length=8)
    assert_step(step(model, batches, tmp_path, epsilon), truth)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_first_token_after_virtual_ones_counts(strategy: str, tmp_path: Path) -> None:
    base = tiny_model("5.2", dtype=torch.float64)
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).double()
    batches, _ = two_batches("padding and holes")
    targets = []
    for batch in batches:
        read = nn.functional.pad(batch["labels"], (3, 0), value=-100)
        mask = nn.functional.pad(
            batch.setdefault("attention_mask", torch.ones_like(batch["labels"])), (3, 0), value=1
        )
        targets.append(by_hand(read, mask.bool(), torch.zeros_like(mask, dtype=torch.bool)))
    assert int((targets[1] != -100).sum()) == 14
    truth = truth_of(model, batches, targets, 0.0)
    base.set_bptt(strategy, chunk_length=8)
    assert_step(step(model, batches, tmp_path, 0.0), truth)


class Told(Around):
    """Says that its loss is of next tokens."""

    loss_type = "ForCausalLM"


@pytest.mark.parametrize("epsilon", [0.0, EPSILON])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_module_around_says_what_its_loss_is(strategy: str, epsilon: float, tmp_path: Path) -> None:
    """Padding is behind, and has labels of -100. Where nothing is said, Trainer counts each row's first label, too."""
    base = tiny_model("5.2", dtype=torch.float64)
    ids, whole = random_tokens(8, batch=2), random_tokens(8, batch=1, seed=3)
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    batches = [
        {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask},
        {"input_ids": whole, "labels": whole},
    ]
    targets = [nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100) for batch in batches]
    truth = truth_of(base, batches, targets, epsilon)
    base.set_bptt(strategy, chunk_length=4)
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for around, ratio in ((Told, 1), (Around, (7 + 4 + 7) / (8 + 5 + 8))):
        loss, found = step(around(base), batches, tmp_path, epsilon)
        inner = {name.removeprefix("inner."): gradient for name, gradient in found.items()}
        assert_step((loss, inner), (truth[0] * ratio, {name: g * ratio for name, g in truth[1].items()}))
        base.load_state_dict(start)


@pytest.mark.parametrize("how", ["compute_loss_func", "a subclass"])
def test_losses_of_somebodys_own_get_trainers_count(how: str, tmp_path: Path) -> None:
    """They may predict padding: of labels that are not -100, all from each row's second on."""
    model = tiny_model("5.2", dtype=torch.float64)
    batches, _ = two_batches("padding and holes")
    targets = [nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100) for batch in batches]
    truth = truth_of(model, batches, targets, 0.0)
    model.set_bptt("reversible", chunk_length=8)
    own = {"compute_loss_func": of_labels} if how == "compute_loss_func" else {"kind": Summed}
    assert_step(step(model, batches, tmp_path, 0.0, **own), truth)


def test_other_models_are_counted_as_before(tmp_path: Path) -> None:
    """Also one that has a model of ours inside; and labels that no model takes are the model's matter."""

    class Other(nn.Module):
        loss_type = "ForCausalLM"

        def __init__(self) -> None:
            super().__init__()
            self.teacher = tiny_model("5.2")
            self.config = self.teacher.config

        def forward(self, input_ids: Tensor, **given: Any) -> Any: ...

    batches, _ = two_batches("padding and holes")
    ours = tiny_model("5.2")
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True)
    wrong = [{**batches[0], "labels": batches[0]["labels"][:, :9]}]
    for model, given, number in (
        (Other(), batches, 2 * 22 + 13),
        (ours, wrong, 2 * 8),
        (ours, [[IDS]], None),
    ):
        made = Trainer(model, arguments, train_dataset=[1])
        assert made._get_num_items_in_batch(given, "cpu") == number
