"""A tensor that the lowest layer makes and every layer above reads, as RWKV-7's ``v_first``, through all strategies.

The cell is RWKV-5's with ``v <- v + sigma(gate) (v_first - v)`` above layer 0. Its models are small enough for float64
autograd through the graph of the whole context, which is ``full``.
"""

from functools import cache
from typing import Any

import pytest
import torch
from bptt_cases import (
    Outcome,
    assert_same_bits,
    checkpoint_blocks,
    differentiate,
    random_like,
    random_state,
    random_tokens,
    relative_errors,
    tiny_model,
)
from torch import Tensor, nn

from rwkv_rev import RwkvRevForCausalLM, position_wise
from rwkv_rev.cells.time_mix_rwkv5 import TimeMixRwkv5, TimeProjection
from rwkv_rev.equivalence.reversal import check_reversal

LENGTH, CHUNK = 27, 8


@position_wise
class FirstValue(TimeMixRwkv5):
    """``v_first`` [B, C, D] flows beside the residual; ``cut`` lets no gradient through it."""

    reads_beside = True
    norms_of_tokens = ("ln_x",)  # said by the very class
    cut = False

    def project(self, *mixed: Tensor) -> TimeProjection:
        *mixed, first = mixed if self.layer else (*mixed, None)
        projection = super().project(*mixed)
        if first is None:
            return projection
        first = (first.detach() if self.cut else first).view_as(projection.value)
        gate = torch.sigmoid(self.gate_of_first).view(self.num_heads, self.head_size)
        return projection._replace(value=torch.lerp(projection.value, first, gate))

    def handed_up(self, projection: TimeProjection) -> tuple[Tensor, ...]:
        return () if self.layer else (projection.value.flatten(2),)


def model_of(dtype: torch.dtype = torch.float64, layers: int = 3, cut: bool = False) -> RwkvRevForCausalLM:
    model = tiny_model("5.2", dtype=dtype, num_hidden_layers=layers, head_size=8)
    generator = torch.Generator().manual_seed(5)
    for block in model.blocks:
        block.time_mix.__class__ = FirstValue
        block.time_mix.cut = cut
        gate = torch.randn(16, generator=generator, dtype=torch.float64)
        block.time_mix.gate_of_first = nn.Parameter(gate.to(dtype)) if block.time_mix.layer else None
    return model


def arguments(model: RwkvRevForCausalLM, masked: bool = True) -> dict[str, Any]:
    ids, mask = random_tokens(LENGTH, batch=2), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :9], mask[1, 14:19] = 0, 0
    state = random_state(model, 2)
    given = {"input_ids": ids, "state": state, "final_state_gradient": random_like(state)}
    return given | ({"attention_mask": mask} if masked else {})


@cache
def as_one_graph(masked: bool) -> Outcome:
    model = model_of()
    return differentiate(model, "full", **arguments(model, masked))


@pytest.mark.parametrize("again", [False, True], ids=["", "checkpointed-blocks"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_gradients_are_those_of_one_graph(masked: bool, again: bool) -> None:
    model, full = model_of(), as_one_graph(masked)
    given = arguments(model, masked)
    if again:
        checkpoint_blocks(model)
    chunked = {name: differentiate(model, name, CHUNK, **given) for name in ("reversible", "checkpoint")}
    assert_same_bits(chunked["reversible"], chunked["checkpoint"])
    for found in chunked.values():
        errors = relative_errors(found.gradients, full.gradients)
        assert max(errors.values()) < 1e-10, errors
        torch.testing.assert_close(found.loss, full.loss, rtol=1e-12, atol=0)


def test_the_gradient_comes_down_from_every_layer() -> None:
    """Without it, layer 0 would learn something else: what the other tests compare is not the same by chance."""
    whole, cut = (
        differentiate(model, "reversible", CHUNK, **arguments(model)).gradients
        for model in (model_of(), model_of(cut=True))
    )
    errors = relative_errors(cut, whole)
    assert errors["model.blocks.0.time_mix.value.weight"] > 0.05
    assert errors["model.blocks.2.time_mix.gate_of_first"] < 1e-12


@pytest.mark.parametrize("strategy", ["reversible-lossy", "truncated"])
def test_approximate_strategies(strategy: str) -> None:
    model = model_of()
    for block in model.blocks:
        block.time_mix.time_decay.data -= 3.0  # slow enough for plain division
    full = differentiate(model, "full", **arguments(model))
    # a context of one chunk cuts nothing
    found = differentiate(model, strategy, LENGTH, **arguments(model))
    assert max(relative_errors(found.gradients, full.gradients).values()) < 1e-10
    found = differentiate(model, strategy, CHUNK, **arguments(model))
    torch.testing.assert_close(found.loss, full.loss, rtol=1e-10, atol=0)


def test_a_loss_of_ones_own() -> None:
    model = model_of()
    given = arguments(model)
    further, inputs = given.pop("final_state_gradient"), {**given, "use_cache": False}
    gradients = []
    for strategy in ("full", "reversible"):
        with model.set_bptt(strategy, chunk_length=CHUNK):
            output = model(**inputs)
            loss = output.logits.log_softmax(-1).square().mean() + output.state.inner(further)
            gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    assert all((one is None) == (other is None) for one, other in zip(*gradients, strict=True))
    names = [name for name, _ in model.named_parameters()]
    full, chunked = (dict(zip(names, found, strict=True)) for found in gradients)
    assert max(relative_errors(chunked, full).values()) < 1e-10


def test_states_come_back_and_go_on() -> None:
    model = model_of(torch.float32).eval()
    ids = random_tokens(40)[0]
    assert check_reversal(model, ids, chunk=CHUNK, drift_steps=(16,)).passed
    whole = model(ids[None])
    pieces = [model(ids[None, :20])]
    pieces.append(model(ids[None, 20:], state=pieces[0].state, output_hidden_states=True))
    torch.testing.assert_close(torch.cat([piece.logits for piece in pieces], 1), whole.logits)
    assert [len(piece.hidden_states or ()) for piece in pieces] == [0, 4]
    assert all(stream.shape == (1, 20, 16) for stream in pieces[1].hidden_states)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recordings_are_the_same() -> None:
    """Chunks run by recordings of their launches, as in the third step of a kind."""
    model = model_of(torch.float32).cuda()
    ids = random_tokens(16 * CHUNK, batch=2).cuda()
    found = [differentiate(model, "reversible", CHUNK, input_ids=ids) for _ in range(4)]
    for other in found[1:]:
        assert max(relative_errors(other.gradients, found[0].gradients).values()) < 1e-6
