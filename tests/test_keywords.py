"""Keywords of trainers and collators: targets that are shifted already, unknown ones, copies without parameters."""

import inspect
from typing import Any

import pytest
import torch
from accelerate import big_modeling
from bptt_cases import VERSIONS, assert_agree, differentiate, random_tokens, tiny_model
from torch import Tensor

from rwkv_rev import RwkvRevForCausalLM, RwkvRevModel
from rwkv_rev.errors import StrategyError
from rwkv_rev.keywords import WITH_A_HEAD

TOKENS = random_tokens(27, batch=3)
MASK = torch.ones_like(TOKENS)
MASK[0, :5] = 0  # left padding
MASK[1, 20:] = 0  # right padding
MASK[2, 9:12] = 0  # a hole
STRATEGIES = ("full", "checkpoint", "reversible", "truncated")


def shifted(labels: Tensor) -> Tensor:
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


# --- shift_labels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_shifted_labels_are_the_labels_shifted(strategy: str) -> None:
    model = tiny_model("5.2")
    expected = differentiate(model, strategy, 8, input_ids=TOKENS, labels=TOKENS)
    found = differentiate(model, strategy, 8, input_ids=TOKENS, labels=None, shift_labels=shifted(TOKENS))
    assert_agree(found, expected, 0)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("strategy", STRATEGIES[:3])
def test_targets_given_directly(strategy: str, version: str) -> None:
    """Each position predicts what is given for it, a masked one nothing; labels beside them do not count."""
    model = tiny_model(version, dtype=torch.float64)
    targets = random_tokens(27, batch=3, seed=5)
    targets[1, 3] = -100
    logits = model(TOKENS, attention_mask=MASK).logits
    kept = targets.masked_fill(MASK == 0, -100)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), kept.flatten())
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    given = {"input_ids": TOKENS, "attention_mask": MASK, "shift_labels": targets}
    for labels in (None, TOKENS):
        found = differentiate(model, strategy, 8, labels=labels, **given)
        assert found.loss.item() == pytest.approx(loss.item(), rel=1e-9)
        for name, gradient in expected.items():
            torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-6, atol=1e-8)
    assert given["shift_labels"] is targets and targets[0, 0] != -100  # what was given is as it was


def test_one_tensor_for_both_is_taken_as_shifted() -> None:
    model = tiny_model("4")
    both = model(TOKENS, labels=TOKENS, shift_labels=TOKENS).loss
    assert both == model(TOKENS, shift_labels=TOKENS).loss != model(TOKENS, labels=TOKENS).loss


def test_shifted_labels_are_counted_and_divided() -> None:
    model = tiny_model("4")
    targets = shifted(TOKENS)
    mean = model(TOKENS, shift_labels=targets).loss
    count = int((targets != -100).sum())
    torch.testing.assert_close(
        model(TOKENS, shift_labels=targets, num_items_in_batch=2 * count).loss, mean / 2
    )
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS, shift_labels=targets).loss, mean)


@pytest.mark.parametrize("shape", [(3, 26), (2, 27), (27,), (3, 27, 1)], ids=str)
def test_shifted_labels_of_another_shape(shape: tuple[int, ...]) -> None:
    wrong = torch.zeros(shape, dtype=torch.long)
    with pytest.raises(ValueError, match=r"shift_labels have shape .*, the input \[3, 27\]"):
        tiny_model("4")(TOKENS, labels=TOKENS, shift_labels=wrong)


# --- unknown ones -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["attention_maks", "reduction", "token_type_ids", "states", "ignore_index"])
@pytest.mark.parametrize("labels", [False, True], ids=["logits", "loss"])
def test_unknown_keywords_are_refused(name: str, labels: bool) -> None:
    model, tokens = tiny_model("5.2"), random_tokens(8)
    with pytest.raises(TypeError, match=f"{name!r}, which would be without effect"):
        model(tokens, labels=tokens if labels else None, **{name: 3})
    with pytest.raises(TypeError, match=name):
        model.model(tokens, **{name: 3})
    model(tokens, labels=tokens if labels else None, **{name: None})


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("attention_maks", "did you mean attention_mask?"),
        ("label", "did you mean labels?"),
        ("input_embeds", "did you mean inputs_embeds?"),
        ("xyzzy", "it takes input_ids, attention_mask, "),
    ],
)
def test_an_unknown_keyword_is_told_what_would_work(typo: str, meant: str) -> None:
    model = tiny_model("5.2")
    with pytest.raises(TypeError) as error:
        model(TOKENS, **{typo: MASK})
    assert typo in str(error.value) and meant in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(TypeError, match="attention_mask"):
        model.model(TOKENS, attention_maks=MASK)


@pytest.mark.parametrize("name", WITH_A_HEAD)
def test_what_only_the_model_with_a_head_takes(name: str) -> None:
    model = tiny_model("5.2")
    with pytest.raises(
        TypeError, match=f"{name!r}.*the model with an output layer takes it, RwkvRevForCausalLM"
    ):
        model.model(TOKENS, **{name: TOKENS})


def test_what_the_model_with_a_head_takes_beside_the_base_model() -> None:
    """``shift_labels`` is no parameter of its ``forward`` by name; ``use_cache`` has no effect on the base model."""
    takes, base = (set(inspect.signature(m.forward).parameters) for m in (RwkvRevForCausalLM, RwkvRevModel))
    assert {*WITH_A_HEAD, "use_cache"} == (takes - base) | {"shift_labels"}


def test_attentions_are_refused() -> None:
    model, tokens = tiny_model("5.2"), random_tokens(8)
    with pytest.raises(ValueError, match="no attention"):
        model(tokens, output_attentions=True)
    model(tokens, output_attentions=False)


@pytest.mark.parametrize("mask", [[[0.0, -1e9, 0.0, 0.0]], [[1, 1, 2, 2]]], ids=["added", "documents"])
def test_masks_of_another_kind_are_refused(mask: list[list[float]]) -> None:
    model, tokens = tiny_model("5.2"), random_tokens(4)
    for labels in (None, tokens):
        with pytest.raises(ValueError, match="other values than 1"):
            model(tokens, attention_mask=torch.tensor(mask), labels=labels)
    kept = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    assert torch.equal(
        model(tokens, attention_mask=kept).logits, model(tokens, attention_mask=kept.bool()).logits
    )


def test_an_objective_by_the_final_state_needs_labels() -> None:
    model, tokens = tiny_model("5.2"), random_tokens(4)
    with pytest.raises(ValueError, match="give labels"):
        model(tokens, final_state_gradient=model.initial_state(1))


def test_positions_that_count_the_tokens_are_none() -> None:
    model = tiny_model("5.2").eval()
    expected = model(TOKENS, attention_mask=MASK, labels=TOKENS).loss
    counted = (MASK.cumsum(1) - 1).clamp(min=0)
    for positions in (counted[:2], torch.arange(27)[None], torch.arange(5, 32)):
        rows = slice(0, 2) if len(positions) == 2 else slice(None)
        found = model(
            TOKENS[rows], attention_mask=MASK[rows], labels=TOKENS[rows], position_ids=positions
        ).loss
        assert found == (
            expected if len(positions) != 2 else model(TOKENS[:2], MASK[:2], labels=TOKENS[:2]).loss
        )


def test_accelerate_refuses_to_cut_the_context_over_devices() -> None:
    model = tiny_model("5.2")
    assert model.config.layer_types == ["linear_attention"] * 2
    assert "layer_types" not in model.config.to_dict()
    model.config.layer_types = model.config.layer_types  # as tools do that copy a configuration
    with pytest.raises(ValueError, match="each of the 2 layers"):
        model.config.layer_types = ["full_attention"] * 2
    for name in (
        "_attach_context_parallel_hooks",
        "_refuse_recurrent_layers_under_sequence_parallelism",
    ):
        refuse = getattr(big_modeling, name, None)
        if refuse is None or "linear_attention" not in inspect.getsource(refuse):
            pytest.skip(f"this accelerate has no {name} that looks at layers")
        with pytest.raises(ValueError, match="linear_attention"):
            refuse(model)


# --- copies without parameters ----------------------------------------------------------------------------------


def test_data_parallel_is_refused() -> None:
    replica = tiny_model("4")._replicate_for_data_parallel()
    with pytest.raises(StrategyError, match="one process per GPU"):
        replica(TOKENS, labels=TOKENS)


# --- a loss function of somebody's own --------------------------------------------------------------------------------


class WithALoss(RwkvRevForCausalLM):
    def loss_function(self, *given: Any, **named: Any) -> Tensor:
        raise AssertionError


class SetsALoss(RwkvRevForCausalLM):
    @property
    def loss_function(self) -> Any:
        return super().loss_function


@pytest.mark.parametrize("strategy", ["auto", *STRATEGIES])
@pytest.mark.parametrize("way", ["on the model", "a method", "a property"])
def test_a_loss_function_is_refused(way: str, strategy: str) -> None:
    model = tiny_model("4")
    if way == "on the model":
        model.loss_function = lambda *given, **named: torch.zeros(())
    else:
        model.__class__ = WithALoss if way == "a method" else SetsALoss
    for inside in (torch.enable_grad(), torch.no_grad()):
        with inside, pytest.raises(StrategyError, match=r"model\.loss_function .* logits, .* loss_weights"):
            differentiate(model, strategy, 8, input_ids=TOKENS)
    assert model(TOKENS).logits.shape == (3, 27, 32)


def test_the_loss_function_of_transformers() -> None:
    model = tiny_model("4")
    expected = differentiate(model, "reversible", 8, input_ids=TOKENS)
    model.loss_function = model.loss_function  # its own
    assert_agree(differentiate(model, "reversible", 8, input_ids=TOKENS), expected, 0)
