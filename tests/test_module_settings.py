"""What modules go by beside the numbers in their weights, and losses between whose two sweeps that changes."""

import gc
import re
import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bptt_cases import random_tokens, relative_error, tiny_model
from torch import Tensor, nn
from torch.nn.utils import prune

from rwkv_rev import RwkvRevForCausalLM, position_wise
from rwkv_rev.errors import StrategyError
from rwkv_rev.module_settings import first_change, notes_of, settings

# peft still uses names that transformers renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = random_tokens(27, batch=2)
CHUNK = 8


class Gate(nn.Module):
    """Code of somebody's own with settings of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.inside = nn.Sequential(nn.Dropout(0.0), nn.ReLU())
        self.register_buffer("mask", torch.ones(16))
        self.factor = torch.tensor(2.0)
        self.options = {"scales": [1.0, 2.0], "names": {"a"}}
        self.function: Any = partial(torch.add, alpha=2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)


CHANGES: dict[str, tuple[Callable[[Gate], Any], str]] = {
    "dropout": (lambda g: setattr(g.inside[0], "p", 0.5), "inside.0.p"),
    "mode": (lambda g: g.inside.eval(), "inside.training"),
    "activation": (lambda g: g.inside.__setitem__(1, nn.GELU()), "the module inside.1"),
    "module less": (lambda g: g.inside.pop(1), "the module inside.1"),
    "module more": (lambda g: g.inside.append(nn.ReLU()), "the module inside.2"),
    "class": (lambda g: setattr(g.inside[1], "__class__", nn.Tanh), "the module inside.1"),
    "list": (lambda g: g.options["scales"].append(1.0), "options['scales']"),
    "set": (lambda g: g.options["names"].add("b"), "options['names']"),
    "dictionary": (lambda g: g.options.pop("names"), "options"),
    "kind of number": (lambda g: g.options["scales"].__setitem__(0, 1), "options['scales'][0]"),
    "partial": (lambda g: setattr(g, "function", partial(torch.add, alpha=3.0)), "function[2]['alpha']"),
    "attribute more": (lambda g: setattr(g, "further", True), "further"),
    "attribute less": (lambda g: delattr(g, "function"), "function"),
    "buffer": (lambda g: setattr(g, "mask", torch.zeros(16)), "mask"),
    "strides": (lambda g: setattr(g.linear.weight, "data", g.linear.weight.data.t()), "linear.weight"),
    "dtype": (lambda g: g.linear.double(), "linear.weight"),
    "frozen": (lambda g: g.linear.bias.requires_grad_(False), "linear.bias"),
    "parameter less": (lambda g: setattr(g.linear, "bias", None), "linear.bias"),
    "hook": (lambda g: g.linear.register_forward_hook(lambda *_: None), "linear.forward_hooks"),
    "forward": (lambda g: setattr(g, "forward", lambda x: x), "forward"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_named(change: str) -> None:
    gate = Gate()
    before = settings(gate)
    assert first_change(before, settings(gate)) is None
    make, words = CHANGES[change]
    make(gate)
    assert first_change(before, settings(gate)) == words


def test_numbers_of_tensors_are_looked_at_where_that_is_asked_for() -> None:
    gate = Gate()
    before, numbers = settings(gate), settings(gate, versions=True)
    with torch.no_grad():
        gate.linear.weight.mul_(2)
        gate.mask.mul_(2)
    assert first_change(numbers, settings(gate, versions=True)) is None  # whose numbers others watch
    gate.factor.mul_(2)
    assert first_change(before, settings(gate)) is None
    assert first_change(numbers, settings(gate, versions=True)) == "factor"


def test_what_calls_note_down_is_told_from_what_is_beside_it() -> None:
    """``change`` once by the calls and once by somebody: only what the calls had changed may be another."""
    gate = Gate()
    gate.options |= {"calls": 0, "seen": [1]}
    before = settings(gate, versions=True)
    gate.options["calls"] += 1
    gate.options["seen"].append(2)
    gate.factor = torch.tensor(3.0)
    noted = settings(gate, versions=True)
    notes = notes_of(before, noted)
    assert notes == {
        ("", "options['calls']"),
        ("", "options['seen']"),
        ("", "options['seen'][1]"),
        ("", "factor"),
    }
    gate.options["calls"] += 1
    gate.options["seen"] = [5]
    gate.factor.mul_(2)
    assert first_change(noted, settings(gate, versions=True)) == "factor"
    assert first_change(noted, settings(gate, versions=True), notes) is None
    gate.options["scales"][1] = 3.0
    assert first_change(noted, settings(gate, versions=True), notes) == "options['scales'][1]"


def test_hooks_and_modes_are_no_notes() -> None:
    gate = Gate()
    before = settings(gate)
    gate.linear.register_forward_hook(lambda *_: None)
    gate.inside[1] = nn.GELU()
    gate.mask = torch.zeros(16)
    gate.linear.eval()
    assert not notes_of(before, settings(gate))


def test_hooks_on_the_model_itself_count_only_if_they_are_on_all_modules() -> None:
    gate = Gate()
    before = settings(gate)
    gate.register_forward_hook(lambda *_: None)
    assert first_change(before, settings(gate)) is None
    hook = nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
    try:
        assert first_change(before, settings(gate)) == "global_forward_pre_hooks"
    finally:
        hook.remove()


def test_nothing_is_kept_alive() -> None:
    gate = Gate()
    kept, before = weakref.ref(gate), settings(gate, versions=True)
    del gate
    gc.collect()
    assert kept() is None
    assert first_change(before, settings(Gate(), versions=True)) is not None


# --- a loss of one's own: between its forward pass and its gradient ---------------------------------------------------


def objective(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)[..., 3].square().mean()


def by_loss(
    model: Any, strategy: str, between: Callable[[Any], Any], chunk: int = CHUNK
) -> dict[str, Tensor | None]:
    """Gradients by the parameters that were trained when the context was read."""
    base = model if isinstance(model, RwkvRevForCausalLM) else model.base_model.model
    model.zero_grad()
    with base.set_bptt(strategy, chunk_length=chunk):
        loss = objective(model(input_ids=IDS).logits)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    between(model)
    loss.backward()
    return {name: p.grad for name, p in trained.items()}


def adapted(**settings: Any) -> Any:
    """LoRA as it begins: what it adds is zero, whatever its settings are, and outputs tell nothing."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["key", "output"], **settings)
    model = peft.get_peft_model(tiny_model("5.2", dtype=torch.float64), config)
    model.add_adapter("b", config)
    return model.double().train()


def scaled(model: Any) -> None:
    model.base_model.model.model.blocks[1].time_mix.key.scaling["default"] *= 3


def set_scale(model: Any) -> None:
    model.base_model.model.model.blocks[0].channel_mix.key.set_scale("default", 3.0)


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
@pytest.mark.parametrize("strategy", ["reversible", "checkpoint"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda model: model.merge_adapter(), "blocks.0.time_mix.key.merged_adapters"),
        (lambda model: model.set_adapter("b"), "blocks.0.time_mix.key.active_adapter"),
        (lambda model: model.delete_adapter("default"), "blocks.0.time_mix.key"),
        (lambda model: model.base_model.disable_adapter_layers(), "blocks.0.time_mix.key.disable_adapters"),
        (lambda model: model.unload(), "blocks.0.time_mix.key"),
        (scaled, "blocks.1.time_mix.key.scaling"),
        (set_scale, "blocks.0.channel_mix.key.scaling"),
    ],
    ids=["merged", "other adapter", "deleted", "disabled", "unloaded", "scaling", "set_scale"],
)
def test_adapters_changed_in_between_are_refused(change: Any, named: str, strategy: str) -> None:
    with pytest.raises(StrategyError, match=r"was changed between .*: take the gradient first") as error:
        by_loss(adapted(), strategy, change)
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: (model.set_adapter("b"), model.set_adapter("default")),
        lambda model: (model.merge_adapter(), model.unmerge_adapter()),
        lambda model: (
            model.base_model.disable_adapter_layers(),
            model.base_model.enable_adapter_layers(),
        ),
        lambda model: (model.eval(), objective(model(input_ids=IDS).logits)),
        lambda model: model.base_model.model.model.blocks[1].eval(),
        lambda model: [setattr(model.base_model.model.model, "gradient_checkpointing", on) for on in (1, 0)],
    ],
    ids=["other adapter", "merged", "disabled", "eval", "a block in eval", "checkpointing"],
)
def test_what_is_put_back_is_no_change(change: Any) -> None:
    """By hand, and training or evaluation by the second sweep itself: dropout draws what it drew."""
    model = adapted(lora_dropout=0.5)
    found = []
    for between in (lambda model: None, change):
        model.train()
        torch.manual_seed(3)
        found.append(by_loss(model, "reversible", between))
    training = [module.training for module in model.modules()]
    assert training == [module.training for module in (change(model.train()), model)[1].modules()]
    assert any(gradient is not None and gradient.any() for gradient in found[0].values())
    for name, gradient in found[0].items():
        assert (gradient is None and found[1][name] is None) or relative_error(
            found[1][name], gradient
        ) < 1e-12


def test_adapters_by_row_are_refused() -> None:
    """peft takes the hooks that tell layers of them off when the call has ended; the way out that is named works."""
    model, rows = adapted().eval(), ["default", "b"]  # peft gives rows adapters in evaluation alone
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A.b." in name:
                parameter.mul_(2)
    base = model.base_model.model
    parameters = [p.requires_grad_() for name, p in model.named_parameters() if "lora_B" in name]
    with base.set_bptt("reversible", chunk_length=CHUNK):
        loss = objective(model(input_ids=IDS, adapter_names=rows).logits)
        with pytest.raises(StrategyError, match=r"pre_hooks was changed between .*: use bptt='full'"):
            loss.backward()
    with base.set_bptt("full"):
        found = torch.autograd.grad(objective(model(input_ids=IDS, adapter_names=rows).logits), parameters)
    assert all(gradient.any() for gradient in found)


def with_layers(version: str = "5.2", dtype: torch.dtype = torch.float64) -> RwkvRevForCausalLM:
    """A model with PyTorch's own layers in it, which need no declaration; what they add is zero."""
    model = tiny_model(version, dtype=dtype)
    for block in model.blocks:
        norm = block.ln2
        block.ln2 = nn.Sequential(norm, nn.Sequential(nn.Dropout(0.0), nn.Identity()))
    return model


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda block: setattr(block.ln2[1][0], "p", 0.5), r"blocks\.1\.ln2\.1\.0\.p"),
        (lambda block: block.ln2[1].__setitem__(1, nn.Tanh()), r"the module blocks\.1\.ln2\.1\.1"),
        (lambda block: block.ln2[1].append(nn.Dropout(0.3)), r"the module blocks\.1\.ln2\.1\.2"),
        (
            lambda block: block.time_mix.key.register_forward_hook(position_wise(lambda *_: None)),
            r"blocks\.1\.time_mix\.key\.forward_hooks",
        ),
        (
            lambda block: setattr(block.time_mix.key.weight, "data", block.time_mix.key.weight.data.t()),
            r"blocks\.1\.time_mix\.key\.weight",
        ),
    ],
    ids=["dropout", "activation", "one more", "hook", "strides"],
)
def test_layers_changed_in_between_are_refused(change: Any, named: str) -> None:
    with pytest.raises(StrategyError, match=f"^{named} was changed between"):
        by_loss(with_layers(), "reversible", lambda model: change(model.blocks[1]))


@position_wise
class Counting(nn.Linear):
    """Notes down, as one does to look at a model; nothing of that is in the result."""

    def __init__(self, former: Any) -> None:
        super().__init__(*former.weight.T.shape, bias=False, dtype=former.weight.dtype)
        self.load_state_dict(former.state_dict())
        self.calls, self.seen, self.sums = 0, [], {"all": 0.0}

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        self.calls += 1
        self.seen.append(output.shape)
        self.sums["all"] += float(output.detach().sum())
        self.last = output.detach()
        return output


def counting(model: RwkvRevForCausalLM) -> None:
    for block in model.blocks:
        block.channel_mix.key = Counting(block.channel_mix.key)


def noting_hook(model: RwkvRevForCausalLM) -> None:
    @position_wise
    def note(module: Any, given: Any, output: Any) -> None:
        module.calls = getattr(module, "calls", 0) + 1
        module.last = output[0].detach()

    for block in model.blocks:
        block.time_mix.register_forward_hook(note)


def pruned(model: RwkvRevForCausalLM) -> None:
    for block in model.blocks:
        prune.l1_unstructured(block.channel_mix.key, "weight", amount=0.3)


@pytest.fixture(params=[counting, noting_hook, pruned, "weight_norm"])
def noting(request: pytest.FixtureRequest) -> RwkvRevForCausalLM:
    model = tiny_model("5.2", dtype=torch.float64)
    if request.param == "weight_norm":
        with pytest.warns(FutureWarning, match="weight_norm"):
            nn.utils.weight_norm(model.blocks[1].time_mix.key)
    else:
        request.param(model)
    return model


def preferred(model: RwkvRevForCausalLM, *more: Any) -> Tensor:
    """As DPO: of two texts, each read before either gradient."""
    first, second = (objective(model(ids, *more).logits) for ids in (IDS, IDS.flip(1)))
    return nn.functional.softplus(first - 2 * second)


def evaluated(model: RwkvRevForCausalLM) -> Tensor:
    loss = objective(model(IDS).logits)
    with torch.no_grad():
        model.eval()
        objective(model(IDS[:, :11]).logits)
        model.train()
    return loss


@pytest.mark.parametrize("loss", [preferred, evaluated])
def test_notes_are_no_change(noting: RwkvRevForCausalLM, loss: Any) -> None:
    found = []
    for strategy in ("full", "reversible", "checkpoint"):
        noting.zero_grad()
        with noting.set_bptt(strategy, chunk_length=CHUNK):
            loss(noting).backward()
        found.append({name: p.grad for name, p in noting.named_parameters()})
    for other in found[1:]:
        for name, truth in found[0].items():
            assert truth is not None and relative_error(other[name], truth) <= 1e-10, name


def test_a_setting_beside_notes_is_a_change() -> None:
    model = tiny_model("5.2", dtype=torch.float64)
    counting(model)
    model.blocks[1].channel_mix.key.sums["scale"] = 1.0
    change = "blocks.1.channel_mix.key.sums['scale'] was changed between"
    with pytest.raises(StrategyError, match=re.escape(change)):
        by_loss(model, "reversible", lambda m: m.blocks[1].channel_mix.key.sums.update(scale=2.0))


def test_what_is_filled_at_the_first_call_is_no_note() -> None:
    """Whoever changes it then changes a setting."""

    @position_wise
    class Lazy(nn.Module):
        factor: float | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.factor is None:
                self.factor = 1.0
            return x * self.factor

    model = tiny_model("5.2", dtype=torch.float64)
    model.blocks[0].ln1 = nn.Sequential(model.blocks[0].ln1, Lazy())
    assert by_loss(model, "reversible", lambda model: None)["model.ln0.weight"] is not None
    with pytest.raises(StrategyError, match=r"^blocks\.0\.ln1\.1\.factor was changed between"):
        by_loss(model, "reversible", lambda m: setattr(m.blocks[0].ln1[1], "factor", 2.0))


def test_notes_that_change_at_some_calls_alone_are_refused_with_a_way_out() -> None:
    @position_wise
    def widest(module: Any, given: Any, output: Any) -> None:
        module.widest = max(getattr(module, "widest", 0), len(output[0]))

    model = tiny_model("5.2", dtype=torch.float64)
    model.blocks[1].time_mix.register_forward_hook(widest)
    with pytest.raises(StrategyError, match=r"blocks\.1\.time_mix\.widest was .* object of its own"):
        by_loss(model, "reversible", lambda m: m(IDS.repeat(2, 1)))
    beside = SimpleNamespace(widest=0)
    model.blocks[1].time_mix.widest = beside
    model.blocks[1].time_mix._forward_hooks.clear()
    hook = position_wise(lambda module, given, output: setattr(beside, "widest", len(output[0])))
    model.blocks[1].time_mix.register_forward_hook(hook)
    by_loss(model, "reversible", lambda m: m(IDS.repeat(2, 1)))
    assert beside.widest == 2


def test_hooks_on_the_model_may_be_taken_off_in_between() -> None:
    """They saw the whole context, and are called in neither sweep."""
    model = tiny_model("5.2", dtype=torch.float64)
    expected = by_loss(model, "full", lambda model: None)
    seen: list[Any] = []
    hook = model.model.register_forward_hook(lambda module, given, output: seen.append(output))
    found = by_loss(model, "reversible", lambda model: hook.remove())
    assert len(seen) == 1
    for name, truth in expected.items():
        assert relative_error(found[name], truth) <= 1e-10


def test_a_hook_on_all_modules_is_a_change() -> None:
    """One that changes gradients alone, so that outputs tell nothing."""
    hooks = []

    def reverse(module: Any, given: Any, output: Any) -> Any:
        return output.detach() if isinstance(module, nn.LayerNorm) else None

    def change(model: Any) -> None:
        hooks.append(nn.modules.module.register_module_forward_hook(position_wise(reverse)))

    try:
        with pytest.raises(StrategyError, match=r"^global_forward_hooks was changed between"):
            by_loss(tiny_model("5.2", dtype=torch.float64), "reversible", change)
    finally:
        hooks[0].remove()


def test_another_forward_of_a_class_is_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    former = nn.Linear.forward

    def change(model: Any) -> None:
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: former(self, x.detach()))

    with pytest.raises(StrategyError, match=r"^the module blocks\.0\.time_mix\.\w+ was changed between"):
        by_loss(tiny_model("5.2", dtype=torch.float64), "reversible", change)


def test_buffers_of_one_call_are_put_back() -> None:
    """``functional_call`` gives others for one call; code of somebody's own reads them."""

    @position_wise
    class Masked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(16, 16, bias=False)
            self.register_buffer("mask", torch.ones(16))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.mask)

    model = tiny_model("5.2", dtype=torch.float64)
    model.blocks[0].time_mix.output = Masked().double()
    given = {"model.blocks.0.time_mix.output.mask": torch.linspace(0, 2, 16, dtype=torch.float64)}
    found = []
    for strategy in ("full", "reversible"):
        with model.set_bptt(strategy, chunk_length=CHUNK):
            loss = objective(torch.func.functional_call(model, given, (IDS,)).logits)
        found.append(torch.autograd.grad(loss, list(model.parameters())))
        assert bool((model.blocks[0].time_mix.output.mask == 1).all())
    for one, other in zip(*found, strict=True):
        assert relative_error(other, one) < 1e-10
