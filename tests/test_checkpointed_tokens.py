"""Activation checkpointing of cells that are stepped token by token: one layer's graph is there at a time."""

import pytest
import torch
from bptt_cases import assert_same_bits, checkpoint_blocks, differentiate, random_tokens, tiny_model
from test_token_models import arguments, model_of

import rwkv_rev
from rwkv_rev import RwkvRevForCausalLM

NAMES = ("coupled", "reversible-lstm", "coupled-4", "coupled-5.2")
CHUNK = 8


def model(name: str) -> RwkvRevForCausalLM:
    if name in ("coupled-4", "coupled-5.2"):
        return rwkv_rev.rewrite(tiny_model(name.removeprefix("coupled-")), token_shift="coupled").train()
    return model_of(name, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_no_bit_depends_on_it(name: str) -> None:
    of = model(name)
    given = arguments(of)
    kept = differentiate(of, "reversible", CHUNK, **given)
    checkpoint_blocks(of)
    assert_same_bits(kept, differentiate(of, "reversible", CHUNK, **given))


def saved_bytes(of: RwkvRevForCausalLM, ids: torch.Tensor) -> int:
    """Bytes that the graph of a chunk keeps when all its layers have run forwards."""
    found: list[int] = []
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hook = of.model.ln_out.register_forward_hook(
        rwkv_rev.position_wise(lambda *_: found.append(sum(kept.values())))
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        differentiate(of, "reversible", CHUNK, input_ids=ids)
    hook.remove()
    return found[0]


def test_the_graph_of_a_layer_goes_before_the_next_one_comes() -> None:
    of = model_of("reversible-lstm", torch.float32, num_hidden_layers=6)
    ids = random_tokens(2 * CHUNK)
    kept = saved_bytes(of, ids)
    checkpoint_blocks(of)
    assert saved_bytes(of, ids) < kept / 3
