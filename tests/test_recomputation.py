"""What autograd keeps of a block's chunk, and that what is made again has the same bits."""

import ast
import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bptt_cases import VERSIONS, differentiate, random_tokens, tiny_model
from test_imports import sources
from torch import Tensor, nn

from rwkv_rev.cells import recomputation
from rwkv_rev.cells.recomputation import not_kept


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recomputation, "DEVICES", ("cuda", "cpu"))


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


@pytest.mark.parametrize("strategy", ["full", "reversible", "checkpoint"])
def test_gradients_are_the_same_bits(version: str, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(version), random_tokens(27, 2)
    mask = torch.ones_like(ids)
    mask[0, :7], mask[1, 20:23] = 0, 0
    found = []
    for devices in (("cuda", "cpu"), ()):
        monkeypatch.setattr(recomputation, "DEVICES", devices)
        found.append(differentiate(model, strategy, 8, input_ids=ids, attention_mask=mask))
    assert torch.equal(found[0].loss, found[1].loss)
    assert found[0].gradients.keys() == found[1].gradients.keys()
    for name, gradient in found[0].gradients.items():
        assert torch.equal(gradient, found[1].gradients[name]), name


def kept(model: Any, ids: Tensor) -> int:
    """Bytes that are held after a forward pass with graph, by storage."""
    if not hasattr(torch._C._autograd.SavedTensor, "data"):
        pytest.skip("PyTorch 2.9 does not show what a graph keeps")
    seen: dict[int, int] = {}
    output = model.model(ids).last_hidden_state
    waiting, nodes = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        waiting += [next_node for next_node, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_raw_saved_"):
                raw = getattr(node, name)
                for saved in raw if isinstance(raw, tuple) else [raw]:
                    try:
                        data = saved.data
                    except (AttributeError, RuntimeError):
                        continue
                    tensor = data[0] if isinstance(data, tuple) else data
                    if isinstance(tensor, Tensor):
                        storage = tensor.untyped_storage()
                        seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def test_mixes_and_squares_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of what a token and layer keep: four mixes and two, and the square of the channel mix."""
    model, ids = tiny_model("5.2", hidden_size=32, intermediate_size=112), random_tokens(64)
    sizes = []
    for devices in (("cpu",), ()):
        monkeypatch.setattr(recomputation, "DEVICES", devices)
        sizes.append(kept(model, ids))
    fewer = (sizes[1] - sizes[0]) / (64 * 2 * 4)  # numbers per token and layer
    assert fewer >= 0.9 * (6 * 32 + 112)


@pytest.mark.parametrize("strategy", ["full", "reversible"])
def test_gradients_under_autocast_are_the_same_bits(
    version: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model(version), random_tokens(40, 2)
    found = []
    for devices in (("cuda", "cpu"), ()):
        monkeypatch.setattr(recomputation, "DEVICES", devices)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(differentiate(model, strategy, 8, input_ids=ids))
    for name, gradient in found[0].gradients.items():
        assert torch.equal(gradient, found[1].gradients[name]), name


@pytest.mark.parametrize(("version", "mixes", "width"), [("4", 5, 112), ("5.2", 6, 112), ("7", 7, 112)])
def test_what_autocast_makes_of_mixes_is_not_kept(
    version: str, mixes: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model(version, hidden_size=32, intermediate_size=width), random_tokens(64)
    sizes = []
    for devices in (("cpu",), ()):
        monkeypatch.setattr(recomputation, "DEVICES", devices)
        with torch.autocast("cpu", torch.bfloat16):
            sizes.append(kept(model, ids))
    fewer = (sizes[1] - sizes[0]) / (64 * 2 * 2)  # numbers in bfloat16 per token and layer
    assert fewer >= 0.9 * (mixes * 32 + width)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("change", ["scaled", "written to"])
def test_more_than_a_cast_is_kept(change: str) -> None:
    layer, x = nn.Linear(3, 3, bias=False), torch.randn(2, 3, requires_grad=True)

    def read(mixed: Tensor) -> Tensor:
        narrow = mixed.to(torch.bfloat16)
        narrow = narrow * 3 if change == "scaled" else narrow.mul_(3)
        with torch.autocast("cpu", torch.bfloat16):
            return layer(narrow).float().square().sum()

    mixed = x * 2
    with not_kept([mixed], lambda: [x * 2]):
        found = read(mixed)
    expected = torch.autograd.grad(read(x * 2), [x, layer.weight])
    for one, other in zip(torch.autograd.grad(found, [x, layer.weight]), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("everywhere")
def test_an_inplace_change_is_noticed() -> None:
    """As without: the hooks must do what PyTorch leaves to them."""
    layer, x = nn.Linear(3, 3, bias=False), torch.randn(2, 3, requires_grad=True)
    mixed = x * 2
    with not_kept([mixed], lambda: [x * 2]):
        out = layer(mixed)
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.usefixtures("everywhere")
def test_a_graph_that_is_kept_gives_the_same_again() -> None:
    layer, x = nn.Linear(3, 3, bias=False), torch.randn(2, 3, requires_grad=True)
    calls: list[int] = []

    def make() -> list[Tensor]:
        calls.append(1)
        return [x * 2]

    mixed = x * 2
    with not_kept([mixed], make):
        out = layer(mixed).square().sum()
    first = torch.autograd.grad(out, layer.weight, retain_graph=True)[0]
    second = torch.autograd.grad(out, layer.weight)[0]
    assert torch.equal(first, second) and len(calls) == 2


@pytest.mark.usefixtures("everywhere")
def test_hooks_of_others_stay_the_only_ones() -> None:
    """Offloading and activation checkpointing say themselves what is kept."""
    layer, x = nn.Linear(3, 3, bias=False), torch.randn(2, 3, requires_grad=True)
    packed: list[Tensor] = []
    mixed = x * 2
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: packed.append(tensor) or tensor, lambda t: t),
        not_kept([mixed], lambda: [x * 2]),
    ):
        layer(mixed)
    assert any(tensor.data_ptr() == mixed.data_ptr() for tensor in packed)


@pytest.mark.usefixtures("everywhere")
def test_what_was_written_to_is_kept() -> None:
    """A module may work on its input in place: then the product has read something else than what is made again."""
    layer, x = nn.Linear(3, 3, bias=False), torch.randn(2, 3, requires_grad=True)
    mixed = x * 2
    with not_kept([mixed], lambda: [x * 2]):
        out = layer(mixed.sin_())
    (found,) = torch.autograd.grad(out.sum(), layer.weight)
    (expected,) = torch.autograd.grad(layer((x * 2).sin()).sum(), layer.weight)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("broken", [False, True], ids=["no gradient", "broken off"])
def test_a_graph_that_nobody_differentiates_is_freed(version: str, broken: bool, everywhere: None) -> None:
    """A function that keeps its own result as it is would keep it for ever."""

    def results() -> int:
        gc.collect()
        return sum(isinstance(one, Tensor) and one.grad_fn is not None for one in gc.get_objects())

    def stop(*given: Any) -> None:
        raise KeyboardInterrupt

    model, ids, before = tiny_model(version).train(), random_tokens(40, 2), results()
    handle = model.model.blocks[-1].channel_mix.register_forward_hook(stop) if broken else None
    with model.set_bptt("full"), contextlib.suppress(KeyboardInterrupt):
        model(ids, labels=ids)
    if handle is not None:
        handle.remove()
    assert results() == before


def test_functions_look_at_what_they_saved_once() -> None:
    """Activation checkpointing gives saved tensors once (kernels of a GPU, too, which cannot run everywhere)."""
    looked = 0
    for path in sources().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                looks = [
                    n for n in ast.walk(node) if isinstance(n, ast.Attribute) and n.attr == "saved_tensors"
                ]
                looked += bool(looks)
                assert len(looks) <= 1, (path.name, node.name, node.lineno)
    assert looked > 10
