"""Label smoothing in transformers' Trainer predicts the next token, whatever is around the model."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from bptt_cases import random_tokens, relative_error, tiny_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from rwkv_rev import RwkvRevForCausalLM
from rwkv_rev.base_model import RwkvRevPreTrainedModel
from rwkv_rev.errors import ConfigError, StrategyError
from rwkv_rev.outputs import RwkvRevCausalLMOutput

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
EPSILON = 0.1
IDS = random_tokens(23, batch=2)
LABELS = IDS.clone()
LABELS[0, 3:6] = -100


class Mine(RwkvRevForCausalLM):
    """Has a name that transformers does not know."""


class Around(nn.Module):
    """A module of somebody's own that hands on what the model gives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner, self.config = model, model.config

    def forward(self, **given: Any) -> Any:
        return self.inner(**given)


def subclass(model: nn.Module) -> nn.Module:
    model.__class__ = Mine
    return model


def parametrized(model: nn.Module) -> nn.Module:
    model.register_parameter("extra", nn.Parameter(torch.zeros(1), requires_grad=False))
    parametrize.register_parametrization(model, "extra", nn.Identity())
    return model


def sharded(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def adapted(model: nn.Module) -> nn.Module:
    wrapped = get_peft_model(model, LoraConfig(target_modules=["key", "value"], init_lora_weights=False))
    return wrapped.double()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


AROUND: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda model: model,
    "subclass": subclass,
    "parametrized": parametrized,
    "DDP": DistributedDataParallel,
    "fully_shard": sharded,
    "peft": adapted,
    "peft of a subclass": lambda model: adapted(subclass(model)),
    "a module": Around,
    "compiled": compiled,
    "compiled peft": lambda model: compiled(adapted(model)),
}


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """``torch.compile`` puts its module around the model, and compiles nothing, which takes seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def one_rank() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def trainer(model: nn.Module, folder: Path, **settings: Any) -> Trainer:
    settings = {"label_smoothing_factor": EPSILON, "report_to": [], "use_cpu": True} | settings
    settings |= {"disable_tqdm": True, "save_strategy": "no"}
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in zip(IDS, LABELS, strict=True)]
    return Trainer(model, TrainingArguments(folder, **settings), train_dataset=rows)


def smoothed(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of logits [B, T, V] at targets [B, T], written out."""
    log_p = logits.double().log_softmax(-1)[targets != -100]
    likelihood = log_p.gather(-1, targets[targets != -100][:, None]).mean()
    return -(1 - EPSILON) * likelihood - EPSILON * log_p.mean()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """By the parameters of the innermost model; of shards the whole."""
    loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {name: getattr(gradient, "full_tensor", gradient.clone)() for name, gradient in named.items()}
    model.zero_grad()  # not between the forward and the backward pass, where FSDP2 has other parameters there
    return whole


def assert_next_token(
    made: Trainer, model: nn.Module, base: nn.Module, strategy: str, targets: Tensor, **batch: Tensor
) -> None:
    """Trainer's loss and gradient of ``model`` are those that float64 autograd gives of the whole context."""
    base.set_bptt("full", chunk_length=1000)
    given = model(input_ids=IDS)
    expected = smoothed(given["logits"] if isinstance(given, dict) else given[0], targets)
    truth = gradients(base, expected)
    base.set_bptt(strategy, chunk_length=8)
    loss = made.compute_loss(model, {"input_ids": IDS, "labels": LABELS, **batch})
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # one sum of Trainer's is in float32
    found = gradients(base, loss)
    assert found.keys() == truth.keys() and found
    for name, gradient in truth.items():
        assert relative_error(found[name], gradient) <= 1e-6, name


NEXT = torch.cat([LABELS[:, 1:], torch.full((2, 1), -100)], 1)
"""What each position predicts."""


@pytest.mark.parametrize("strategy", ["full", "checkpoint", "reversible"])
@pytest.mark.parametrize("around", AROUND)
def test_the_next_token_is_predicted(
    around: str, strategy: str, tmp_path: Path, one_rank: None, uncompiled: None
) -> None:
    base = tiny_model("5.2", dtype=torch.float64)
    model = AROUND[around](base)
    assert_next_token(trainer(base, tmp_path), model, base, strategy, NEXT)


@pytest.mark.parametrize("version", ["4", "6", "7"])
def test_other_versions(version: str, tmp_path: Path) -> None:
    model = subclass(tiny_model(version, dtype=torch.float64))
    assert_next_token(trainer(model, tmp_path), model, model, "reversible", NEXT)


@pytest.mark.parametrize("around", ["nothing", "subclass", "compiled"])
def test_evaluation_and_tuples(around: str, tmp_path: Path, uncompiled: None) -> None:
    base = tiny_model("5.2")
    model = AROUND[around](base)
    made = trainer(base, tmp_path)
    base.set_bptt("reversible", chunk_length=8)
    expected = smoothed(base(IDS).logits.detach(), NEXT).item()
    for return_dict in (True, False):
        base.config.return_dict = return_dict
        batch = {"input_ids": IDS, "labels": LABELS}
        assert made.compute_loss(model, dict(batch)).item() == pytest.approx(expected, rel=1e-5)
        found, _, _ = made.prediction_step(model.eval(), batch, prediction_loss_only=True)
        assert found.item() == pytest.approx(expected, rel=1e-5)
        model.train()


def test_a_step_under_torch_compile(tmp_path: Path, uncompiled: None) -> None:
    model = tiny_model("5.2", bptt="reversible", chunk_length=8)
    expected = smoothed(model(IDS).logits.detach(), NEXT).item()
    settings = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 1, "logging_steps": 1}
    made = trainer(model, tmp_path, per_device_train_batch_size=2, **settings)
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


class Handing(Around):
    """Hands on the logits alone, in one of the forms that Trainer takes."""

    def __init__(self, model: nn.Module, form: Callable[[Tensor], Any]) -> None:
        super().__init__(model)
        self.form = form

    def forward(self, **given: Any) -> Any:
        return self.form(super().forward(**given)["logits"])


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda logits: (logits,),
    "dict": lambda logits: {"logits": logits.clone()},  # other logits, as of a temperature
    "CausalLMOutput": lambda logits: CausalLMOutput(logits=logits),
}


@pytest.mark.parametrize("strategy", ["full", "checkpoint", "reversible"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("around", ["nothing", "compiled", "DDP", "peft"])
def test_what_a_module_around_hands_on(
    around: str, form: str, strategy: str, tmp_path: Path, one_rank: None, uncompiled: None
) -> None:
    base = tiny_model("5.2", dtype=torch.float64)
    model = (
        Handing(adapted(base), FORMS[form])
        if around == "peft"
        else AROUND[around](Handing(base, FORMS[form]))
    )
    assert_next_token(trainer(base, tmp_path), model, base, strategy, NEXT)
    with torch.no_grad():
        expected = smoothed(base(IDS).logits, NEXT).item()
        found = trainer(base, tmp_path).compute_loss(model.eval(), {"input_ids": IDS, "labels": LABELS})
    assert found.item() == pytest.approx(expected, rel=1e-6)


class OfHidden(nn.Module):
    """Logits that a layer of its own makes of the hidden states of a model, with a head or without."""

    def __init__(self, model: RwkvRevPreTrainedModel, size: int, form: str) -> None:
        super().__init__()
        self.lm, self.config, self.form = model, model.config, FORMS[form]
        self.tags = nn.Linear(model.config.hidden_size, size).double()

    def forward(self, input_ids: Tensor) -> Any:
        return self.form(self.tags(self.lm.base_model(input_ids).last_hidden_state))


@pytest.mark.parametrize("strategy", ["full", "reversible"])
@pytest.mark.parametrize("form", FORMS)
def test_tags_are_not_shifted(form: str, strategy: str, tmp_path: Path) -> None:
    """Also where the whole model was called in an earlier batch."""
    base = tiny_model("5.2", dtype=torch.float64)
    model, tags = OfHidden(base, 5, form), random_tokens(23, batch=2).remainder(5)
    made = trainer(base, tmp_path)
    made.compute_loss(base, {"input_ids": IDS, "labels": LABELS})
    base.set_bptt(strategy, chunk_length=8)
    expected = smoothed(model.tags(base.model(IDS).last_hidden_state), tags)
    truth = gradients(model, expected)
    loss = made.compute_loss(model, {"input_ids": IDS, "labels": tags})
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient in gradients(model, loss).items():
        assert relative_error(gradient, truth[name]) <= 1e-6, name


@pytest.mark.parametrize("form", FORMS)
def test_logits_of_no_known_token_are_refused(form: str, tmp_path: Path) -> None:
    """A head of the vocabulary on hidden states may predict the next token, or the one that was read."""
    base = tiny_model("5.2", dtype=torch.float64)
    model = OfHidden(base, 32, form)
    with pytest.raises(ConfigError, match=r"call the whole model in it, or .* compute_loss_func"):
        trainer(base, tmp_path).compute_loss(model, {"input_ids": IDS, "labels": LABELS})


def places(*each: tuple[int, int]) -> Tensor:
    """[2, 23] bool, true there."""
    found = torch.zeros(2, 23, dtype=torch.bool)
    for row, place in each:
        found[row, place] = True
    return found


MASK = ~places(*((0, t) for t in range(4)), (0, 11), (1, 7), (1, 8), *((1, t) for t in range(18, 23)))
STARTS = places((0, 9), (1, 5), (1, 15))
BATCHES: dict[str, tuple[dict[str, Tensor], Tensor, Tensor]] = {
    # what a batch holds, which tokens count, and where documents begin
    "padding and holes": ({"attention_mask": MASK.long()}, MASK, places()),
    "position_ids": (
        {"position_ids": torch.tensor([[*range(9), *range(14)], [*range(5), *range(10), *range(8)]])},
        ~places(),
        STARTS,
    ),
    "seq_idx": ({"seq_idx": STARTS.cumsum(1)}, ~places(), STARTS),
    "borders": ({"borders": STARTS}, ~places(), STARTS),
    "a border in a hole": (
        {"attention_mask": MASK, "borders": places((0, 11), (1, 12))},
        MASK,
        places((0, 12), (1, 12)),
    ),
    "cu_seq_lens": (
        {name: torch.tensor([0, 9, 23]) for name in ("cu_seq_lens_q", "cu_seq_lens_k")},
        ~places()[:1],
        STARTS[:1],
    ),
}


def by_hand(labels: Tensor, counts: Tensor, starts: Tensor) -> Tensor:
    """What each position predicts: the label of the next token that counts, if it goes on with the same document."""
    targets = torch.full_like(labels, -100)
    for row, label in enumerate(labels.tolist()):
        there = counts[row].nonzero().flatten().tolist()
        for place, following in pairwise(there):
            if not starts[row, following]:
                targets[row, place] = label[following]
    return targets


@pytest.mark.parametrize(
    ("version", "strategy", "chunk"),
    [
        *(("5.2", strategy, chunk) for strategy in ("full", "checkpoint", "reversible") for chunk in (8, 12)),
        *((version, "reversible", 8) for version in ("4", "6", "7")),
    ],
)
@pytest.mark.parametrize("kind", BATCHES)
def test_targets_are_those_of_the_models_own_loss(
    kind: str, version: str, strategy: str, chunk: int, tmp_path: Path
) -> None:
    """Labels that are the ids: neither padding, nor holes, nor first tokens of documents are predicted."""
    given, counts, starts = BATCHES[kind]
    base = tiny_model(version, dtype=torch.float64)
    batch = {"input_ids": IDS[: len(counts)], **given}
    targets = by_hand(batch["input_ids"], counts, starts)
    assert 20 < int((targets != -100).sum()) < 44
    base.set_bptt("full", chunk_length=1000)
    expected = smoothed(base(**batch).logits, targets)
    truth = gradients(base, expected)
    base.set_bptt(strategy, chunk_length=chunk)
    made, labels = trainer(base, tmp_path), batch["input_ids"].clone()
    loss = made.compute_loss(base, batch | {"labels": labels})
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    found = gradients(base, loss)
    for name, gradient in truth.items():
        assert relative_error(found[name], gradient) <= 1e-6, name
    around = made.compute_loss(Handing(base, FORMS["dict"]), batch | {"labels": labels})
    assert around.item() == pytest.approx(expected.item(), rel=1e-6)
    made.label_smoother.epsilon = 0.0  # the model's own loss
    own = base(**batch, labels=labels).loss.item()
    assert made.compute_loss(base, batch | {"labels": labels}).item() == pytest.approx(own, rel=1e-6)
    masked = made.compute_loss(base, batch | {"shift_labels": labels}).item()
    assert masked == pytest.approx(base(**batch, shift_labels=labels).loss.item(), rel=1e-6)


@pytest.mark.parametrize("labelled", [True, False], ids=["beside labels", "alone"])
@pytest.mark.parametrize("strategy", ["full", "checkpoint", "reversible"])
def test_shifted_labels_are_not_shifted_again(strategy: str, labelled: bool, tmp_path: Path) -> None:
    """``shift_labels`` say what each position predicts, and are no matter of what labels there are."""
    model = tiny_model("5.2", dtype=torch.float64)
    made, targets = trainer(model, tmp_path), random_tokens(23, batch=2, seed=5)
    targets[1, 2:4] = -100
    batch = {"shift_labels": targets}
    assert_next_token(made, model, model, strategy, targets, **batch)
    given = {"input_ids": IDS, **batch} | ({"labels": LABELS} if labelled else {})
    expected = smoothed(model(IDS).logits.detach(), targets).item()
    assert made.compute_loss(model.eval(), given).item() == pytest.approx(expected, rel=1e-6)
    assert "shift_labels" in given


def test_shifted_labels_on_accelerates_ranks_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without a gradient, where logits of a part of a context are made."""
    model = tiny_model("5.2").eval()
    made = trainer(model, tmp_path)
    config = type("Config", (), {"cp_size": 2})
    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", config)
    monkeypatch.setattr(made.accelerator, "unwrap_model", lambda model: model)
    with pytest.raises(StrategyError, match="cp_size = 2"), torch.no_grad():
        made.compute_loss(model, {"input_ids": IDS, "shift_labels": NEXT})


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("strategy", ["full", "reversible"])
def test_virtual_tokens_are_refused(strategy: str, return_dict: bool, tmp_path: Path) -> None:
    """They have logits and no labels."""
    base = tiny_model("5.2", bptt=strategy, chunk_length=8, return_dict=return_dict)
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    made = trainer(base, tmp_path)
    for mode in (True, False):
        with pytest.raises(ConfigError, match=r"\[2, 28, 32\] and labels \[2, 23\].*factor=0"):
            made.compute_loss(model.train(mode), {"input_ids": IDS, "labels": LABELS})


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    """Another model, outputs of another kind, a loss function of somebody's own, and what a trainer shifts itself."""

    class Other(nn.Module):
        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            return {"logits": nn.functional.one_hot(input_ids, 32).double()}

    class Both(Other):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = tiny_model("5.2")

    here = smoothed(nn.functional.one_hot(IDS, 32), LABELS).item()
    made = trainer(tiny_model("5.2"), tmp_path)
    smoother = made.label_smoother
    for model in (Other(), Both()):
        assert made.compute_loss(model, {"input_ids": IDS, "labels": LABELS}).item() == pytest.approx(here)
    assert made.label_smoother is smoother
    assert smoother({"logits": nn.functional.one_hot(IDS, 32).double()}, LABELS).item() == pytest.approx(here)
    made.compute_loss_func = lambda outputs, labels, num_items_in_batch: (outputs, labels)
    outputs, labels = made.compute_loss(made.model, {"input_ids": IDS, "labels": LABELS})
    assert isinstance(outputs, RwkvRevCausalLMOutput) and labels is LABELS
