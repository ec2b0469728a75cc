"""The loss as a drop-in: plain loops, accumulation, Trainer, accelerate, dropout, LoRA, activation checkpointing."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from bptt_cases import (
    AS_CLOSE,
    VERSIONS,
    assert_agree,
    assert_same_bits,
    checkpoint_blocks,
    differentiate,
    grouped_errors,
    random_tokens,
    relative_error,
    tiny_model,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from trainer_cases import one_step
from transformers import Trainer, TrainingArguments

from rwkv_rev import RwkvRevForCausalLM

LENGTH, CHUNK = 19, 8

# peft and transformers' own trainer still use the names that transformers 5 renamed
pytestmark = pytest.mark.filterwarnings(
    "ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated:FutureWarning"
)


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_parameters_close(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        assert relative_error(found[name], parameter) <= tolerance, name


# --- plain loops ------------------------------------------------------------------------------------------------


def trained(
    strategy: str, version: str = "5.2", *, accumulate: int = 1, clip: float | None = None
) -> dict[str, Any]:
    """A few steps of plain PyTorch training on four rows, in ``accumulate`` pieces a step."""
    model, tokens = tiny_model(version), random_tokens(LENGTH, batch=4)
    model.set_bptt(strategy, chunk_length=CHUNK)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        total = 0.0
        for rows in tokens.chunk(accumulate):
            loss = model(rows, labels=rows).loss / accumulate
            loss.backward()
            total += loss.item()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(total)
    return {"losses": losses, "parameters": parameters_of(model)}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_plain_loop(version: str) -> None:
    """Two AdamW steps end where ``full``'s end; the exact tapes' end at the same bits."""
    full, checkpoint, reversible = (trained(name, version) for name in ("full", "checkpoint", "reversible"))
    assert reversible["losses"] == checkpoint["losses"]
    for name, parameter in checkpoint["parameters"].items():
        assert torch.equal(reversible["parameters"][name], parameter)
    assert reversible["losses"] == pytest.approx(full["losses"], rel=1e-4)
    assert full["losses"][-1] < full["losses"][0]


def test_clipped_gradients() -> None:
    assert trained("reversible", clip=0.1)["losses"] == pytest.approx(
        trained("full", clip=0.1)["losses"], rel=1e-4
    )


@pytest.mark.parametrize("pieces", [2, 4])
def test_gradient_accumulation(pieces: int) -> None:
    """Losses that are backpropagated one after another add up in ``.grad`` to the joined batch's."""
    model, tokens = tiny_model("5.2"), random_tokens(LENGTH, batch=4)
    whole = differentiate(model, "reversible", CHUNK, input_ids=tokens)
    model.zero_grad()
    model.set_bptt("reversible", chunk_length=CHUNK)
    for rows in tokens.chunk(pieces):
        (model(rows, labels=rows).loss / pieces).backward()
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, whole.gradients[name]) <= 1e-5, name


def test_two_losses_before_one_backward() -> None:
    """Several losses may wait for their backward pass together."""
    model, tokens = tiny_model("5.2"), random_tokens(LENGTH, batch=4)
    whole = differentiate(model, "reversible", CHUNK, input_ids=tokens)
    model.zero_grad()
    model.set_bptt("reversible", chunk_length=CHUNK)
    torch.stack([model(rows, labels=rows).loss for rows in tokens.chunk(4)]).mean().backward()
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, whole.gradients[name]) <= 1e-5, name


@pytest.mark.parametrize("strategy", ["full", "checkpoint", "reversible", "truncated"])
def test_hooks_see_whole_gradients(strategy: str) -> None:
    """A hook is called once per backward pass, with the gradient of the whole context; what it returns counts."""
    model, tokens = tiny_model("5.2"), random_tokens(LENGTH)
    expected = differentiate(model, strategy, CHUNK, input_ids=tokens).gradients
    weights = {"head.weight": model.head.weight, "model.ln0.weight": model.model.ln0.weight}
    seen: list[Tensor] = []

    def halve(gradient: Tensor) -> Tensor:
        seen.append(gradient.clone())
        return gradient / 2

    handles = [weight.register_hook(halve) for weight in weights.values()]
    counts: list[Tensor] = []
    model.head.weight.register_post_accumulate_grad_hook(counts.append)
    found = differentiate(model, strategy, CHUNK, input_ids=tokens).gradients
    assert len(seen) == 2 and len(counts) == 1
    for name in weights:
        assert any(torch.equal(gradient, expected[name]) for gradient in seen)
        assert torch.equal(found[name], expected[name] / 2)
    for handle in handles:
        handle.remove()
    assert torch.equal(
        differentiate(model, strategy, CHUNK, input_ids=tokens).gradients["head.weight"],
        expected["head.weight"],
    )


# --- trainers ---------------------------------------------------------------------------------------------------


FIELDS = TrainingArguments.__dataclass_fields__
RECOMPUTE = {
    "activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing": True
}


class Rows(Dataset):
    """Rows of random tokens; each has some labels of -100, so that rows weigh differently."""

    def __init__(self, count: int) -> None:
        self.tokens = random_tokens(LENGTH, batch=count)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        labels = self.tokens[index].clone()
        labels[: 2 * index] = -100
        return {"input_ids": self.tokens[index], "labels": labels}


def train(
    strategy: str, folder: Path, *, batch: int = 2, accumulate: int = 2, **options: Any
) -> tuple[Any, Any]:
    model = tiny_model("5.2", bptt=strategy, chunk_length=CHUNK)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        learning_rate=1e-2,
        max_grad_norm=1.0,
        optim="sgd",
        num_train_epochs=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(8), eval_dataset=Rows(3))
    trainer.train()
    return trainer, parameters_of(model)


@pytest.fixture(scope="module")
def by_trainer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Tensor]]:
    """``reversible``, as several tests look at it; not to be changed."""
    return train("reversible", tmp_path_factory.mktemp("trainer"))


def test_transformers_trainer(tmp_path: Path, by_trainer: tuple[Any, dict[str, Tensor]]) -> None:
    """``reversible`` trains like ``full``; accumulation is exact, since ``num_items_in_batch`` is honoured."""
    trainer, reversible = by_trainer
    _, full = train("full", tmp_path)
    _, joined = train("reversible", tmp_path, batch=4, accumulate=1)
    assert_parameters_close(reversible, full)
    assert_parameters_close(reversible, joined)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    start = tiny_model("5.2")
    assert not torch.equal(reversible["head.weight"], start.head.weight)


class Mine(RwkvRevForCausalLM):
    """Has a name that says nothing of its loss."""


@pytest.mark.parametrize("adapted", [False, True], ids=["alone", "peft"])
@pytest.mark.parametrize("strategy", ["full", "checkpoint", "reversible"])
@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_trainer_of_a_subclass(version: str, strategy: str, adapted: bool, tmp_path: Path) -> None:
    """The sum is divided by the number of tokens that are predicted: of a row, by all but the first."""
    tokens = random_tokens(LENGTH, batch=4)
    origin = tiny_model(version, dtype=torch.float64)
    base = Mine(origin.config).double().train()
    base.load_state_dict(origin.state_dict())
    model = base
    if adapted:
        model = get_peft_model(base, LoraConfig(target_modules=["key"], init_lora_weights=False)).double()
    logits = model(input_ids=tokens).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    truth = dict(zip(trained, torch.autograd.grad(expected, list(trained.values())), strict=True))
    base.set_bptt(strategy, chunk_length=CHUNK)
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    loss, gradients = one_step(model, rows, tmp_path, **batches)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient in truth.items():
        assert relative_error(gradients[name], gradient) <= 1e-6, name
    assert "loss_type" not in base.config.to_diff_dict()


@pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is deprecated")
def test_trainer_with_torch_compile(tmp_path: Path, by_trainer: tuple[Any, dict[str, Tensor]]) -> None:
    """The loss of a compiled model is computed as that of any other, to the bit."""
    _, plain = by_trainer
    _, compiled = train("reversible", tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    assert plain.keys() == compiled.keys()
    for name, parameter in plain.items():
        assert torch.equal(compiled[name], parameter), name


def test_trainer_evaluates(by_trainer: tuple[Any, dict[str, Tensor]]) -> None:
    """Evaluation streams: the loss is that of a plain forward pass, in any strategy."""
    trainer, _ = by_trainer
    found = trainer.evaluate()["eval_loss"]
    model = trainer.model.eval()
    rows = [Rows(3)[index] for index in range(3)]
    with torch.no_grad(), model.set_bptt("full", chunk_length=1000):
        losses = [model(row["input_ids"][None], labels=row["labels"][None]).loss.item() for row in rows]
    assert min(losses) <= found <= max(losses)


@pytest.mark.parametrize("options", [{"bf16": True}, RECOMPUTE], ids=["bf16", "checkpointing"])
def test_trainer_options(tmp_path: Path, options: dict[str, Any]) -> None:
    """Mixed precision and activation checkpointing as the trainer switches them on."""
    _, reversible = train("reversible", tmp_path, **options)
    _, checkpoint = train("checkpoint", tmp_path, **options)
    for name, parameter in checkpoint.items():
        assert torch.equal(reversible[name], parameter), name


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str) -> None:
    """Accelerate's prepare, accumulate, backward and clipping; parameters as without it."""
    model = tiny_model("5.2", bptt="reversible", chunk_length=CHUNK)
    plain = tiny_model("5.2", bptt="reversible", chunk_length=CHUNK)
    AcceleratorState._reset_state(True)  # the Trainer's, made by a test before
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    loader = DataLoader(Rows(8), batch_size=2)
    wrapped, optimizer, prepared = accelerator.prepare(model, optimizer, loader)
    for batch in prepared:
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    expected = torch.optim.SGD(plain.parameters(), lr=1e-2)
    for index, batch in enumerate(loader):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = plain(**batch).loss
        (loss / 2).backward()
        if index % 2 == 1:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            expected.step()
            expected.zero_grad()
    assert_parameters_close(parameters_of(model), parameters_of(plain), 1e-6)


# --- dropout and LoRA -------------------------------------------------------------------------------------------


def with_dropout(model: RwkvRevForCausalLM, probability: float = 0.3) -> RwkvRevForCausalLM:
    """Dropout on the input of a few maps, and on the embeddings."""
    for block in model.blocks:
        block.time_mix.value = nn.Sequential(nn.Dropout(probability), block.time_mix.value)
        block.channel_mix.value = nn.Sequential(nn.Dropout(probability), block.channel_mix.value)
    model.model.embeddings = nn.Sequential(model.model.embeddings, nn.Dropout(probability))
    return model


def with_lora(model: RwkvRevForCausalLM, dropout: float = 0.3) -> nn.Module:
    """LoRA on a frozen base, with weights that are not the zeros they start from."""
    torch.manual_seed(7)
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["receptance", "key", "value", "output"]
    )
    wrapped = get_peft_model(model, config).train()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return wrapped


def run(
    wrapped: nn.Module, model: RwkvRevForCausalLM, strategy: str, seed: int = 11, **inputs: Any
) -> dict[str, Any]:
    """Loss, gradients, and the number that a user draws next, after ``torch.manual_seed(seed)``."""
    wrapped.zero_grad()
    torch.manual_seed(seed)
    with model.set_bptt(strategy, chunk_length=CHUNK):
        loss = wrapped(**inputs).loss
    following = torch.rand(4)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.grad is not None}
    return {"loss": loss.item(), "gradients": gradients, "following": following}


def assert_same_run(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["loss"] == expected["loss"]
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        assert torch.equal(found["gradients"][name], gradient), name


@cache
def dropped_out(version: str, strategy: str, recompute: bool, seed: int = 11) -> dict[str, Any]:
    """A run of a random model with dropout."""
    model, tokens = with_dropout(tiny_model(version)), random_tokens(LENGTH, batch=2)
    if recompute:
        checkpoint_blocks(model)
    return run(model, model, strategy, seed, input_ids=tokens, labels=tokens)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("version", VERSIONS)
def test_dropout_replays(version: str, recompute: bool) -> None:
    """Both sweeps draw the same masks: equal bits, also with blocks computed a third time."""
    checkpoint, reversible = (
        dropped_out(version, strategy, recompute) for strategy in ("checkpoint", "reversible")
    )
    assert_same_run(reversible, checkpoint)
    other = dropped_out(version, "reversible", False, seed=12)
    assert other["loss"] != reversible["loss"], "dropout does draw"


@pytest.mark.parametrize("version", VERSIONS)
def test_recomputed_blocks_change_no_bit_of_dropout(version: str) -> None:
    """Activation checkpointing draws the masks that would be drawn without it."""
    runs = [dropped_out(version, "reversible", recompute) for recompute in (False, True)]
    assert_same_run(runs[1], runs[0])
    assert torch.equal(runs[0]["following"], runs[1]["following"])


def test_dropout_gives_the_gradient_of_its_masks() -> None:
    """Finite differences at fixed masks: the replayed masks are those of the loss that is reported."""
    model, tokens = with_dropout(tiny_model("5.2", dtype=torch.float64)), random_tokens(LENGTH)
    found = run(model, model, "reversible", input_ids=tokens, labels=tokens)
    weight = model.blocks[0].time_mix.key.weight
    gradient = found["gradients"]["model.blocks.0.time_mix.key.weight"]
    # the steepest: the states' fixed point is noise in a difference of losses
    direction = gradient.sign()
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(direction, alpha=sign * 1e-5)
        losses.append(run(model, model, "reversible", input_ids=tokens, labels=tokens)["loss"])
        with torch.no_grad():
            weight.sub_(direction, alpha=sign * 1e-5)
    slope = float((gradient * direction).sum())
    assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(slope, rel=1e-4)


def test_dropout_in_evaluation_draws_nothing() -> None:
    model, tokens = with_dropout(tiny_model("5.2")).eval(), random_tokens(LENGTH)
    before = torch.get_rng_state()
    found = differentiate(model, "reversible", CHUNK, input_ids=tokens)
    assert torch.equal(torch.get_rng_state(), before)
    assert_agree(found, differentiate(model, "full", input_ids=tokens))


@pytest.mark.parametrize("strategy", ["checkpoint", "reversible"])
def test_the_generator_goes_on_after_the_loss(strategy: str) -> None:
    """What is drawn next does not repeat a mask: it follows the last token's, as after a plain forward pass."""
    model, tokens = with_dropout(tiny_model("5.2")), random_tokens(LENGTH)
    torch.manual_seed(11)
    with torch.no_grad(), model.set_bptt("full", chunk_length=CHUNK):
        model(tokens, labels=tokens)
    expected = torch.rand(4)
    assert torch.equal(run(model, model, strategy, input_ids=tokens, labels=tokens)["following"], expected)
    # without dropout nothing is drawn at all
    plain = tiny_model("5.2")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    differentiate(plain, strategy, CHUNK, input_ids=tokens)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("version", "recompute"),
    [*((version, False) for version in VERSIONS), *((version, True) for version in ("4", "5.2", "7"))],
)
def test_lora_with_dropout(version: str, recompute: bool) -> None:
    """peft LoRA on a frozen base: ``reversible`` equals ``checkpoint`` to the bit; the base gets no gradient."""
    tokens = random_tokens(LENGTH, batch=2)
    runs = []
    for strategy in ("checkpoint", "reversible"):
        model = tiny_model(version)
        wrapped = with_lora(model)
        if recompute:
            checkpoint_blocks(model)
        runs.append(run(wrapped, model, strategy, input_ids=tokens, labels=tokens))
    assert_same_run(runs[1], runs[0])
    assert runs[0]["gradients"] and all("lora_" in name for name in runs[0]["gradients"])
    assert all(gradient.any() for gradient in runs[0]["gradients"].values())


@pytest.mark.parametrize("version", VERSIONS)
def test_lora_without_dropout_equals_full(version: str) -> None:
    model, tokens = tiny_model(version), random_tokens(LENGTH, batch=2)
    wrapped = with_lora(model, dropout=0.0)
    full = run(wrapped, model, "full", input_ids=tokens, labels=tokens)
    reversible = run(wrapped, model, "reversible", input_ids=tokens, labels=tokens)
    exact = tiny_model(version, dtype=torch.float64)
    doubled = with_lora(exact, dropout=0.0)
    doubled.load_state_dict(wrapped.state_dict())
    truth = run(doubled, exact, "full", input_ids=tokens, labels=tokens)["gradients"]
    errors = [grouped_errors(found["gradients"], truth)["all"] for found in (reversible, full)]
    assert errors[0] <= AS_CLOSE * errors[1]
    assert errors[1] < 1e-4


def test_lora_in_the_trainer_with_checkpointed_blocks(tmp_path: Path) -> None:
    """All of it together, as people fine-tune: Trainer, LoRA with dropout, bf16, recomputed blocks."""
    finals = []
    for strategy in ("checkpoint", "reversible"):
        model = tiny_model("5.2", bptt=strategy, chunk_length=CHUNK)
        wrapped = with_lora(model)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=2,
            learning_rate=1e-2,
            bf16=True,
            **RECOMPUTE,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=5,
        )
        Trainer(model=wrapped, args=arguments, train_dataset=Rows(8)).train()
        finals.append(parameters_of(wrapped))
    for name, parameter in finals[0].items():
        assert torch.equal(finals[1][name], parameter), name


# --- activation checkpointing inside the chunk ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "strategy"),
    [
        *((version, "reversible") for version in VERSIONS),
        *((version, ("full", "checkpoint")[i % 2]) for i, version in enumerate(VERSIONS)),
    ],
)
def test_recomputed_blocks(version: str, strategy: str) -> None:
    """``gradient_checkpointing_enable`` changes no bit."""
    model, tokens = tiny_model(version), random_tokens(LENGTH, batch=2)
    mask = torch.ones_like(tokens)
    mask[0, :13] = 0
    kept = differentiate(model, strategy, CHUNK, input_ids=tokens, attention_mask=mask)
    checkpoint_blocks(model)
    recomputed = differentiate(model, strategy, CHUNK, input_ids=tokens, attention_mask=mask)
    assert_same_bits(recomputed, kept)


def test_recomputed_blocks_keep_less() -> None:
    """The graph of a chunk holds fewer bytes when blocks are recomputed."""

    def saved_bytes(recompute: bool) -> int:
        model, tokens = tiny_model("5.2", num_hidden_layers=4), random_tokens(64)
        if recompute:
            checkpoint_blocks(model)
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            differentiate(model, "reversible", 32, input_ids=tokens)
        return sum(kept.values())

    assert saved_bytes(True) < saved_bytes(False)
