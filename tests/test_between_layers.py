"""Tensors that declared code keeps in one layer and reads in another: their gradient, or an error by name."""

from typing import Any

import pytest
import torch
from bptt_cases import checkpoint_blocks, random_tokens, relative_error, tiny_model
from torch import Tensor, nn

from rwkv_rev import RwkvRevForCausalLM, position_wise
from rwkv_rev.errors import StrategyError

LENGTH = 24
IDS = random_tokens(LENGTH)
STRATEGIES = ("checkpoint", "reversible")
AGREE = 1e-10
"""In float64."""


def first(values: Any) -> Tensor:
    """The residual of what a module is given or gives."""
    return values if isinstance(values, Tensor) else first(values[0])


def with_first(values: Any, tensor: Tensor) -> Any:
    return (
        tensor if isinstance(values, Tensor) else type(values)((with_first(values[0], tensor), *values[1:]))
    )


def skipping(
    source: str, reader: str, *, at: str = "input", version: str = "5.2", graph: bool = True
) -> RwkvRevForCausalLM:
    """A model of three layers; ``reader`` adds to its output what ``source`` was given, or gave, times a weight."""
    model = tiny_model(version, dtype=torch.float64, num_hidden_layers=3)
    gain = nn.Parameter(torch.linspace(0.1, 0.5, 16, dtype=torch.float64))
    model.model.register_parameter("gain", gain)
    kept: list[Tensor] = []

    def keep(module: nn.Module, given: Any, output: Any = None) -> None:
        value = first(given if output is None else output)
        kept[:] = [value if graph else value.detach()]

    def add(module: nn.Module, given: Any) -> Any:
        value = first(given)
        return with_first(given, value + (kept[0] * gain).view_as(value))

    module = model.get_submodule(source)
    if at == "input":
        module.register_forward_pre_hook(position_wise(keep))
    else:
        module.register_forward_hook(position_wise(keep))
    model.get_submodule(reader).register_forward_pre_hook(position_wise(add))
    return model


def outcome(
    model: RwkvRevForCausalLM, strategy: str, own: bool, chunk: int, embeds: Tensor | None = None
) -> dict[str, Tensor | None]:
    """Gradients of the model's own loss or of one on logits."""
    given = {"input_ids": IDS} if embeds is None else {"inputs_embeds": embeds}
    with model.set_bptt(strategy, chunk_length=chunk):
        if own:
            loss = model(**given, labels=IDS).loss
        else:
            loss = nn.functional.cross_entropy(model(**given).logits[0, :-1], IDS[0, 1:])
        loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    for name, truth in expected.items():
        gradient = found[name]
        assert (gradient is None) == (truth is None), name
        if (
            gradient is not None and truth is not None and truth.abs().max() > 1e-15
        ):  # else what rounding left
            assert relative_error(gradient, truth) < AGREE, name


@pytest.mark.parametrize(("chunks", "version"), [(1, "6"), (2, "4"), (3, "5.2"), (4, "7")])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_layers_input_is_refused_by_name(strategy: str, own: bool, chunks: int, version: str) -> None:
    model = skipping("model.blocks.0", "model.blocks.2", version=version)
    if chunks == 1 and not own:  # a context of one chunk has one graph
        expected = outcome(skipping("model.blocks.0", "model.blocks.2", version=version), "full", own, LENGTH)
        assert_same(outcome(model, strategy, own, LENGTH), expected)
        return
    with pytest.raises(
        StrategyError, match=r"layer 2 reads a tensor .* what layer 0 is handed .*from block to"
    ):
        outcome(model, strategy, own, LENGTH // chunks)


@pytest.mark.parametrize(
    ("source", "at", "reader", "named"),
    [
        ("model.blocks.1", "output", "model.blocks.2.ln1", "layer 2 .* layer 1"),
        ("model.blocks.0.ln2", "input", "model.blocks.2.channel_mix", "layer 2 .* layer 0"),
        ("model.blocks.0.time_mix.key", "output", "model.blocks.1", "layer 1 .* layer 0"),
        ("model.blocks.2", "input", "model.ln_out", "the final norm .* layer 2"),
    ],
)
@pytest.mark.parametrize("own", [True, False])
def test_every_place_is_refused_by_name(source: str, at: str, reader: str, named: str, own: bool) -> None:
    model = skipping(source, reader, at=at)
    with pytest.raises(StrategyError, match=named.replace(".*", r"reads a tensor that was made of what")):
        outcome(model, "reversible", own, 8)


@pytest.mark.parametrize("strategy", [*STRATEGIES, "reversible-lossy"])
@pytest.mark.parametrize(
    ("source", "named"), [("model.blocks.1", "layer 1"), ("model.ln_out", "the final norm")]
)
def test_what_the_head_reads_is_refused_by_name(source: str, named: str, strategy: str) -> None:
    with pytest.raises(StrategyError, match=f"the head reads .* {named} .* a loss of your own on the logits"):
        outcome(skipping(source, "head"), strategy, True, LENGTH)
    outcome(skipping(source, "head"), "full", False, LENGTH)


@pytest.mark.parametrize("own", [True, False])
def test_embeddings_that_are_handed_over_are_refused_by_name(own: bool) -> None:
    embeds = torch.randn(1, LENGTH, 16, dtype=torch.float64, requires_grad=True)
    for reader, named in (("model.blocks.1", "layer 1"), ("model.ln_out", "the final norm")):
        with pytest.raises(StrategyError, match=f"{named} reads .* what the embedding is handed"):
            outcome(skipping("model.ln0", reader), "reversible", own, 8, embeds)


@pytest.mark.parametrize("own", [True, False])
def test_blocks_that_are_computed_again_are_no_way_around(own: bool) -> None:
    model = skipping("model.blocks.0.ln1", "model.blocks.2.channel_mix")
    checkpoint_blocks(model)
    with pytest.raises(StrategyError, match="layer 2 reads a tensor that was made of what layer 0"):
        outcome(model, "reversible", own, 8)


@pytest.mark.parametrize(
    ("source", "reader", "graph"),
    [
        ("model.blocks.1", "model.blocks.1.channel_mix", True),
        ("model.blocks.0", "model.blocks.2", False),
        ("model.blocks.1", "model.ln_out", False),
    ],
)
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_needs_no_way_back_is_exact(
    strategy: str, own: bool, source: str, reader: str, graph: bool
) -> None:
    """Within one layer, and without a graph."""
    expected = outcome(skipping(source, reader, graph=graph), "full", own, LENGTH)
    assert_same(outcome(skipping(source, reader, graph=graph), strategy, own, 8), expected)


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_handed_on_from_block_to_block_it_is_exact(strategy: str, own: bool, version: str) -> None:
    """What the error advises."""

    def made() -> RwkvRevForCausalLM:
        model = tiny_model(version, dtype=torch.float64, num_hidden_layers=3)

        @position_wise
        def keep(module: nn.Module, given: Any, output: Any) -> Any:
            stream = output[0] if isinstance(output[0], tuple) else (output[0],)
            return ((*stream, first(given)), *output[1:])

        @position_wise
        def add(module: nn.Module, given: Any, output: Any) -> Any:
            x, *beside, kept = output[0]
            return ((x + 0.3 * kept, *beside), *output[1:])

        model.model.blocks[0].register_forward_hook(keep)
        model.model.blocks[2].register_forward_hook(add)
        return model

    expected = outcome(made(), "full", own, LENGTH)
    assert_same(outcome(made(), strategy, own, 8), expected)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_several_layers_share_is_refused_by_name(strategy: str, own: bool) -> None:
    """A tensor of weights alone, which is made in one layer for all: the text speaks of layers, not of chunks."""
    model = tiny_model("5.2", dtype=torch.float64, num_hidden_layers=3)
    model.model.gain = nn.Parameter(torch.ones(16, dtype=torch.float64))
    kept: list[Tensor] = []

    @position_wise
    def make(module: nn.Module, given: Any) -> None:
        kept[:] = [model.model.gain.tanh()]

    @position_wise
    def scale(module: nn.Module, given: Any, output: Any) -> Any:
        return with_first(output, first(output) * kept[0])

    model.model.blocks[0].register_forward_pre_hook(make)
    for block in model.model.blocks:
        block.register_forward_hook(scale)
    with pytest.raises(StrategyError, match=r"made of \S*gain is used in several layers, .* of another"):
        outcome(model, strategy, own, 8)


@pytest.mark.parametrize("own", [True, False])
def test_what_layers_read_of_the_embedding_is_refused_by_name(own: bool) -> None:
    with pytest.raises(StrategyError, match=r"made of \S*embeddings\.weight is used in several layers"):
        outcome(skipping("model.embeddings", "model.blocks.1", at="output"), "reversible", own, 8)
