"""What changes between the forward pass of a loss of somebody's own and its gradient: seen by name, or no change."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bptt_cases import random_tokens, relative_error, tiny_model
from torch import Tensor, nn

from rwkv_rev import RwkvRevForCausalLM, position_wise
from rwkv_rev.base_model import RwkvRevModel
from rwkv_rev.cells.time_mix_rwkv5 import TimeMixRwkv5
from rwkv_rev.errors import StrategyError
from rwkv_rev.module_settings import first_change, settings

# peft still uses names that transformers renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = random_tokens(27, batch=2)
CHUNK = 8


def made() -> RwkvRevForCausalLM:
    return tiny_model("5.2", dtype=torch.float64)


def gradients(
    model: nn.Module, strategy: str, between: Callable[[], Any] = lambda: None, **inputs: Any
) -> dict[str, Tensor]:
    """Of a loss on logits."""
    inputs = inputs or {"input_ids": IDS}
    base = next(module for module in model.modules() if isinstance(module, RwkvRevForCausalLM))
    with base.set_bptt(strategy, chunk_length=CHUNK):
        loss = model(**inputs).logits.square().mean()
    between()
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def detaching(function: Callable[..., Any]) -> Any:
    return functools.wraps(function)(lambda *given, **named: function(*given, **named).detach())


def test_a_method_of_a_model_replaced_in_between() -> None:
    model = made()
    with pytest.raises(StrategyError, match="embed was changed between"):
        gradients(model, "reversible", lambda: setattr(model.model, "embed", detaching(model.model.embed)))


@pytest.mark.parametrize(("layer", "name"), [(RwkvRevModel, "embed"), (TimeMixRwkv5, "project")])
def test_a_function_of_a_class_replaced_in_between(
    layer: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = position_wise(functools.wraps(getattr(layer, name))(lambda *given: None))
    with pytest.raises(StrategyError, match="was changed between"):
        gradients(made(), "reversible", lambda: monkeypatch.setattr(layer, name, declared))


@pytest.mark.parametrize("of", ["lora_A", "weight"])
def test_weights_that_change_without_a_new_version(of: str) -> None:
    """As a fused optimizer's step does; ``lora_A`` beside a ``lora_B`` of zeros changes no output."""
    model: nn.Module = made()
    if of == "lora_A":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["key"]))
    name, parameter = next((n, p) for n, p in model.named_parameters() if of in n and p.requires_grad)

    def step() -> None:
        parameter.grad = torch.ones_like(parameter)
        version = parameter._version
        torch.optim.AdamW([parameter], lr=0.1, fused=True).step()
        if parameter._version != version:
            pytest.skip("this PyTorch counts what fused optimizers change")

    with pytest.raises(StrategyError, match=r"was changed between") as error:
        gradients(model, "reversible", step)
    assert str(error.value).split(" ")[0] in name


def test_a_class_default_that_becomes_an_attribute_is_no_change() -> None:
    class Switched(nn.Module):
        off = False

    module = Switched()
    before = settings(module)
    module.off = False
    assert first_change(before, settings(module)) is None
    module.off = True
    assert first_change(before, settings(module)) == "off"
    module.off = 0  # type: ignore[assignment]  # another type is another value
    assert first_change(before, settings(module)) == "off"


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_adapters_that_were_switched_off_for_a_reference() -> None:
    """DPO's two models in one: at the first time, LN tuning puts the class's default on each layer."""
    peft = pytest.importorskip("peft")
    found = []
    for strategy in ("full", "reversible"):
        model = peft.get_peft_model(made(), peft.LNTuningConfig(target_modules=["ln1"]))

        def reference(model: Any = model) -> None:
            with torch.no_grad(), model.disable_adapter():
                model(input_ids=IDS)

        found.append(gradients(model, strategy, reference))
    assert found[0]
    for name, gradient in found[0].items():
        assert relative_error(found[1][name], gradient) < 1e-10


def test_ids_and_masks_may_be_overwritten() -> None:
    """With a token whose embedding is the same one, too, which no output tells."""
    model = made()
    with torch.no_grad():
        model.model.embeddings.weight[1] = model.model.embeddings.weight[2]
    full = gradients(model, "full")
    for fill in (1, 2, 3):
        ids, mask = IDS.clone(), torch.ones_like(IDS)

        def overwrite(ids: Tensor = ids, mask: Tensor = mask, fill: int = fill) -> None:
            ids[ids == 3 - fill] = fill
            ids[:, 5:9] = fill
            mask.zero_()

        found = gradients(model, "reversible", overwrite, input_ids=ids, attention_mask=mask)
        for name, gradient in full.items():
            assert relative_error(found[name], gradient) < 1e-10


def _packed(name: str) -> dict[str, Tensor]:
    """A row of three documents and padding, with borders by one name; all of it a buffer."""
    mask = torch.ones(1, 27, dtype=torch.bool)
    mask[0, [0, 6, 25, 26]] = False
    starts = torch.tensor([0, 4, 12, 27])
    lengths = starts.diff()
    borders = torch.zeros(1, 27, dtype=torch.bool)
    borders[0, starts[1:-1]] = True
    told = {
        "nothing": {},
        "borders": {"borders": borders},
        "cu_seq_lens_q": {"cu_seq_lens_q": starts},
        "seq_idx": {"seq_idx": torch.arange(3).repeat_interleave(lengths)[None]},
        "position_ids": {"position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()])[None]},
    }
    return {"input_ids": IDS[:1].clone(), "attention_mask": mask, **told[name]}


@pytest.mark.parametrize("name", ["nothing", "borders", "cu_seq_lens_q", "seq_idx", "position_ids"])
@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_masks_and_borders_may_be_overwritten(version: str, name: str) -> None:
    """By the next batch, which has a mask and borders of its own."""
    model = tiny_model(version, dtype=torch.float64)
    full = gradients(model, "full", **_packed(name))
    for strategy, after in (("checkpoint", None), ("reversible", None), ("reversible", 1)):
        given = _packed(name)

        def overwrite(given: dict[str, Tensor] = given, after: int | None = after) -> None:
            for tensor in given.values():
                tensor.copy_(tensor.flip(-1) if after is None else torch.full_like(tensor, after))

        found = gradients(model, strategy, overwrite, **given)
        for key, gradient in full.items():
            assert relative_error(found[key], gradient) < 1e-10


@pytest.mark.parametrize("strategy", ["full", "checkpoint", "reversible"])
def test_labels_and_weights_may_be_overwritten(strategy: str) -> None:
    """Between the model's own loss and ``backward``."""
    model, generator = made(), torch.Generator().manual_seed(2)
    found = []
    for overwritten in (False, True):
        given = {
            "attention_mask": torch.ones(2, 27, dtype=torch.bool),
            "shift_labels": IDS.clone(),
            "loss_weights": torch.rand(2, 27, generator=generator.manual_seed(2), dtype=torch.float64),
            "num_items_in_batch": torch.tensor(40.0, dtype=torch.float64),
        }
        with model.set_bptt(strategy, chunk_length=CHUNK):
            loss = model(IDS, **given).loss
        if overwritten:
            for tensor in given.values():
                tensor.zero_()
        model.zero_grad()
        loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient)


def test_embeddings_and_states_that_are_overwritten_are_named() -> None:
    model = made()
    embeds = model.model.embeddings(IDS).detach()
    with pytest.raises(StrategyError, match=r"^inputs_embeds was changed between .* hand over a copy$"):
        gradients(model, "reversible", lambda: embeds.mul_(2), inputs_embeds=embeds)
    state = model.initial_state(2)
    with pytest.raises(StrategyError, match=r"^the state was changed between .* hand over a copy$"):
        gradients(
            model, "reversible", lambda: [t.add_(1) for t in state.tensors()], input_ids=IDS, state=state
        )
