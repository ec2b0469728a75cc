"""Subclasses of our cells, and methods replaced on them: exact, or refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bptt_cases import assert_agree, differentiate, random_tokens, tiny_model
from torch import Tensor

from rwkv_rev import RwkvRevForCausalLM, position_wise
from rwkv_rev.cells.as_written import is_as_written
from rwkv_rev.cells.channel_mix import ChannelMix
from rwkv_rev.cells.overridden import overridden_alone
from rwkv_rev.cells.shifted_cell import ShiftedCell
from rwkv_rev.cells.time_mix_rwkv5 import TimeMixRwkv5
from rwkv_rev.errors import StrategyError

CHUNKS = (4, 6)  # of ten tokens: three, two
IDS = random_tokens(10, 2)
AGREE = 1e-10
VERSIONS = ("4", "5.2", "6", "7")


def model_of(version: str = "5.2") -> RwkvRevForCausalLM:
    return tiny_model(version, dtype=torch.float64)


def subclassed(model: RwkvRevForCausalLM, cell: str, **methods: Any) -> RwkvRevForCausalLM:
    """Cells of a class that overrides methods, each a function of the overridden one, the cell and what is given."""
    for block in model.blocks:
        layer = getattr(block, cell)
        base = type(layer)
        own = {name: _method(getattr(base, name), method) for name, method in methods.items()}
        norms = {"norms_of_tokens": base.norms_of_tokens}
        layer.__class__ = type("Mine", (base,), {**own, **norms})
    return model


def replaced(model: RwkvRevForCausalLM, cell: str, **methods: Any) -> RwkvRevForCausalLM:
    """The same of methods that are replaced on each cell, and declared."""
    for block in model.blocks:
        layer = getattr(block, cell)
        for name, method in methods.items():
            base = getattr(type(layer), name)
            setattr(layer, name, position_wise(lambda *given, b=base, m=method, c=layer: m(b, c, *given)))
    return model


def _method(base: Callable[..., Any], method: Callable[..., Any]) -> Any:
    return lambda self, *given, **named: method(base, self, *given, **named)


WAYS = [subclassed, replaced]


def assert_exact(model: RwkvRevForCausalLM) -> None:
    """Loss and gradient of every strategy, with labels and of a loss on logits, and without gradients."""
    full = differentiate(model, "full", input_ids=IDS)
    own = _of_logits(model, "full", 10)
    for strategy in ("checkpoint", "reversible"):
        for chunk in CHUNKS:
            assert_agree(differentiate(model, strategy, chunk, input_ids=IDS), full, AGREE)
            for value, expected in zip(_of_logits(model, strategy, chunk), own, strict=True):
                torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
            with model.set_bptt(strategy, chunk_length=chunk), torch.no_grad():
                torch.testing.assert_close(model(IDS, labels=IDS).loss, full.loss, rtol=1e-9, atol=0)


def _of_logits(model: RwkvRevForCausalLM, strategy: str, chunk: int) -> list[Tensor]:
    with model.set_bptt(strategy, chunk_length=chunk):
        loss = model(IDS).logits.square().mean()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return [loss.detach(), *(gradient for gradient in found if gradient is not None)]


# --- what a method hands to another is written to only where nobody else has it --------------------------------------


def weight_as_gate(project: Any, cell: Any, *mixed: Tensor) -> Any:
    """A learned gate of each channel in the place of one computed of the token."""
    found = project(cell, *mixed)
    if hasattr(found, "gate"):
        share = cell.mix_gate if hasattr(cell, "mix_gate") else cell.mix_before_gate
        return found._replace(gate=share.expand_as(found.gate))
    share = next(cell.parameters())
    return found._replace(receptance=share.expand_as(found.receptance))


def kept(project: Any, cell: Any, *mixed: Tensor) -> Any:
    found = project(cell, *mixed)
    cell.__dict__["seen"] = found
    return found


def gate_twice(output_of: Any, cell: Any, projection: Any, read: Tensor) -> Tensor:
    """Reads what the method of ours has read before."""
    out = output_of(cell, projection, read)
    gate = projection.gate if hasattr(projection, "gate") else projection.receptance
    return out * torch.tanh(gate.flatten(2))


PLACES = [
    *((version, "time_mix") for version in VERSIONS),
    *((version, "channel_mix") for version in VERSIONS[:3]),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("version", "cell"), PLACES)
def test_a_weight_as_a_gate_stays_as_it_is(version: str, cell: str, way: Any) -> None:
    model = way(model_of(version), cell, project=weight_as_gate)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    expected = model(IDS).logits.detach()
    with torch.no_grad():
        for length in (1, 10):
            found = model(IDS[:, :length]).logits
            torch.testing.assert_close(found, expected[:, :length], rtol=1e-9, atol=1e-12)
    model.generate(IDS[:, :2], max_new_tokens=3, do_sample=False)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert_exact(model)


@pytest.mark.parametrize("way", WAYS)
def test_one_tensor_for_the_gate_and_what_it_gates(way: Any) -> None:
    def swish(project: Any, cell: Any, *mixed: Tensor) -> Any:
        found = project(cell, *mixed)
        return found._replace(receptance=found.value)

    assert_exact(way(model_of(), "channel_mix", project=swish))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("version", "cell"), PLACES)
def test_an_output_of_reads_the_gate_again(version: str, cell: str, way: Any) -> None:
    assert_exact(way(model_of(version), cell, output_of=gate_twice))


@pytest.mark.parametrize(("version", "cell"), PLACES)
def test_what_a_project_keeps_stays_as_it_is(version: str, cell: str) -> None:
    model = subclassed(model_of(version), cell, project=kept)
    seen = [getattr(block, cell) for block in model.blocks]
    model(IDS)
    expected = [layer.seen for layer in seen]
    with torch.no_grad():
        model(IDS)
    for layer, fields in zip(seen, expected, strict=True):
        for now, then in zip(layer.seen, fields, strict=True):
            if isinstance(now, Tensor):
                torch.testing.assert_close(now, then, rtol=1e-9, atol=1e-12)


def test_a_function_on_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    cell = model.blocks[0].channel_mix
    assert is_as_written(cell)
    project = ChannelMix.project
    monkeypatch.setattr(ChannelMix, "project", lambda *given: weight_as_gate(project, *given))
    assert not is_as_written(cell)
    expected = model(IDS).logits.detach()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-9, atol=1e-12)


def test_cells_of_ours_are_as_written() -> None:
    for version in VERSIONS:
        for block in model_of(version).blocks:
            assert all(map(is_as_written, block.cells))

    class Named(TimeMixRwkv5):
        """Adds nothing that ours call."""

        def told(self) -> str:
            return "mine"

    cell = model_of().blocks[0].time_mix
    cell.__class__ = Named
    assert is_as_written(cell)
    cell.project = lambda *given: None
    assert not is_as_written(cell)


# --- what makes a chunk's contribution to the memory ------------------------------------------------------------------


def assert_refused(model: RwkvRevForCausalLM, words: str) -> None:
    """With labels; a loss of one's own, and one without gradients, are those of the whole context."""
    expected = differentiate(model, "full", input_ids=IDS).loss
    own = _of_logits(model, "full", 10)
    for strategy in ("checkpoint", "reversible"):
        for chunk in CHUNKS:
            with pytest.raises(StrategyError, match=words) as error:
                differentiate(model, strategy, chunk, input_ids=IDS)
            assert "\n" not in str(error.value)
        for value, whole in zip(_of_logits(model, strategy, 4), own, strict=True):
            torch.testing.assert_close(value, whole, rtol=1e-9, atol=1e-12)
        with model.set_bptt(strategy, chunk_length=4), torch.no_grad():
            torch.testing.assert_close(model(IDS, labels=IDS).loss, expected, rtol=1e-9, atol=0)


def larger_contribution(compute: Any, cell: Any, *given: Any) -> Any:
    read, contribution = compute(cell, *given)
    if isinstance(contribution, tuple):
        return read, contribution._replace(update=1.5 * contribution.update)
    return read, 1.5 * contribution


@pytest.mark.parametrize("kind", ["overridden", "declared", "replaced"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_compute_of_its_own_beside_a_memory(version: str, kind: str) -> None:
    way = replaced if kind == "replaced" else subclassed
    model = way(model_of(version), "time_mix", compute=larger_contribution)
    if kind == "declared":
        for block in model.blocks:
            position_wise(type(block.time_mix))
    assert_refused(model, r"(overridden|replaced) compute of .*blocks\.0.* project, output_of or handed_up")


def test_a_compute_on_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = TimeMixRwkv5.compute
    ours = position_wise(lambda *given: larger_contribution(compute, *given))
    monkeypatch.setattr(TimeMixRwkv5, "compute", ours)
    assert_refused(model_of(), r"replaced compute of the class TimeMixRwkv5")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_compute_of_its_own_without_a_memory(version: str, way: Any) -> None:
    def larger(compute: Any, cell: Any, *given: Any) -> Any:
        read, contribution = compute(cell, *given)
        return 1.5 * read, contribution

    assert_exact(way(model_of(version), "channel_mix", compute=larger))


def test_whose_memory_it_is() -> None:
    memories = ("update", "advance_memory", "retreat_memory")

    def of(base: type, *names: str) -> type:
        return type("Mine", (base,), {name: lambda self: None for name in names})

    assert overridden_alone(of(TimeMixRwkv5, "compute")) == "compute"
    assert overridden_alone(of(TimeMixRwkv5, *memories, "compute")) is None
    assert overridden_alone(of(TimeMixRwkv5, "step", "advance", "replay", "retreat", "compute")) is None
    assert overridden_alone(of(of(TimeMixRwkv5, *memories, "compute"), "compute")) == "compute"
    assert overridden_alone(of(of(TimeMixRwkv5, *memories), "update")) == "update"
    own = of(ShiftedCell, *memories, "compute", "project", "mixes")
    assert overridden_alone(own) is None
    assert overridden_alone(of(own, "compute")) == "compute"
    assert overridden_alone(of(own, *memories, "compute")) is None
    assert overridden_alone(of(own, "project", "output_of")) is None


# --- decays, by which chunks are planned ------------------------------------------------------------------------------


def dropped(log_decay: Any, cell: Any) -> Tensor:
    return torch.nn.functional.dropout(log_decay(cell), 0.3, cell.training)


def hardly_drawn(log_decay: Any, cell: Any) -> Tensor:
    found = log_decay(cell)
    return torch.where(torch.rand(()) < 1e-9, 2 * found, found)


def counted(log_decay: Any, cell: Any) -> Tensor:
    cell.__dict__["calls"] = cell.__dict__.get("calls", 0) + 1
    return log_decay(cell) * (1 + 0.1 * cell.calls)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("changing", [dropped, hardly_drawn, counted])
@pytest.mark.parametrize("version", ["5.1", "5.2"])
def test_a_decay_that_is_another_at_each_look(version: str, changing: Any, way: Any) -> None:
    model = way(model_of(version), "time_mix", log_decay=changing)
    differentiate(model, "full", input_ids=IDS)
    for strategy in ("checkpoint", "reversible"):
        for chunk in CHUNKS:
            with model.set_bptt(strategy, chunk_length=chunk):
                for given in ({"labels": IDS}, {}):
                    with pytest.raises(
                        StrategyError, match=r"log_decay.* of layer 0 gives other .* each look"
                    ):
                        model(IDS, **given)


@pytest.mark.parametrize("way", WAYS)
def test_a_decay_that_is_drawn_in_training_alone(way: Any) -> None:
    model = way(model_of(), "time_mix", log_decay=dropped)
    assert_exact(model.eval())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("version", VERSIONS[1:])
def test_a_project_that_gives_decays_of_its_own(version: str, way: Any) -> None:
    def slower(project: Any, cell: Any, *mixed: Tensor) -> Any:
        found = project(cell, *mixed)
        return found._replace(log_decay=0.5 * found.log_decay)

    model = way(model_of(version), "time_mix", project=slower)
    if version in ("6", "7"):  # of each token: nothing is planned
        assert_exact(model)
        return
    for strategy in ("checkpoint", "reversible"):
        with pytest.raises(
            StrategyError, match=r"of layer 0 gives other decays than its log_decay.*override"
        ):
            differentiate(model, strategy, CHUNKS[0], input_ids=IDS)


@pytest.mark.parametrize(
    ("version", "cell", "name"), [("4", "time_mix", "log_decay"), ("7", "channel_mix", "mixes")]
)
@pytest.mark.parametrize("strategy", ["checkpoint", "reversible"])
def test_what_no_plan_reads_is_drawn_again(strategy: str, version: str, cell: str, name: str) -> None:
    def drawn(method: Any, layer: Any) -> Any:
        found = method(layer)
        noise = 1 + 0.2 * torch.rand(16, dtype=torch.float64)
        return [each * noise for each in found] if isinstance(found, list) else found * noise

    model = subclassed(model_of(version), cell, **{name: drawn})

    def loss() -> Tensor:
        torch.manual_seed(3)
        with model.set_bptt(strategy, chunk_length=4):
            return model(IDS, labels=IDS).loss

    loss().backward()
    layer = getattr(model.blocks[0], cell)
    weight = layer.time_decay if version == "4" else layer.mix_before_key
    step = 1e-5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=weight.dtype)
    expected = (weight.grad * step).sum()
    before = weight.detach().clone()
    values = [loss().detach() for weight.data in (before + step, before - step)]  # which draws as in training
    torch.testing.assert_close((values[0] - values[1]) / 2, expected, rtol=1e-4, atol=0)


def test_ranks_do_not_draw_the_decays_of_others() -> None:
    cell = subclassed(model_of("4"), "time_mix", log_decay=dropped).blocks[0].time_mix
    with pytest.raises(StrategyError, match="at each look"):
        cell._over_ranks(None, None, None)
