"""Plain linear attention: its cells by the laws, and a language model of it under every strategy."""

from typing import Any

import pytest
import torch
from bptt_cases import (
    assert_same_bits,
    checkpoint_blocks,
    differentiate,
    random_like,
    random_state,
    random_tokens,
    relative_errors,
)
from contract_laws import LAWS, Trial, chunks
from torch import nn

from rwkv_rev import RwkvRevConfig, RwkvRevForCausalLM
from rwkv_rev.architectures.linear_attention import EXPONENTS, LinearAttentionState
from rwkv_rev.cells.feed_forward import FeedForward
from rwkv_rev.cells.linear_attention import LinearAttention, Sums, contribution, linear_attention
from rwkv_rev.cells.stateless import NoState
from rwkv_rev.equivalence.reversal import check_reversal
from rwkv_rev.errors import ConfigError, ReversalMismatchError
from rwkv_rev.forecast import graph_bytes
from rwkv_rev.reversal.additive import FORMATS, Additive, capacity
from rwkv_rev.reversal.stepped import GridOverflowError
from rwkv_rev.wkv import use_kernel

WIDTH, HEADS, LENGTH, CHUNK = 16, 2, 150, 16


def filled(module: nn.Module, seed: int = 0) -> Any:
    """The same module with random values, of maps of order 1 / sqrt(inputs)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        scale = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.2
        parameter.data.copy_(scale * noise + (parameter.dim() == 1 and name.endswith("weight")))
    return module


def model_of(dtype: torch.dtype = torch.float64, **config: Any) -> RwkvRevForCausalLM:
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "head_size": WIDTH // HEADS}
    model = RwkvRevForCausalLM(
        RwkvRevConfig(
            rwkv_version="linear-attention",
            **(sizes | {"num_hidden_layers": 3, "intermediate_size": 24, "vocab_size": 32} | config),
        )
    )
    return filled(model).to(dtype).train()


def arguments(model: RwkvRevForCausalLM) -> dict[str, Any]:
    ids, mask = random_tokens(LENGTH, batch=2), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :19], mask[1, 40:77] = 0, 0
    state = random_state(model, 2)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "state": state,
        "final_state_gradient": random_like(state),
    }


# --- the cells ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("seed", [0, 3])
def test_laws(law: str, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = Sums(torch.randn(2, HEADS, WIDTH // HEADS, WIDTH // HEADS, generator=generator, dtype=dtype))
    cell = LinearAttention(HEADS, WIDTH // HEADS, format="int64", exponent=-40, group_norm_epsilon=1e-3)
    values = 1e-10 if dtype == torch.float64 else 2e-5
    LAWS[law](Trial(filled(cell).to(dtype), start, chunks(WIDTH, 2, seed, dtype=dtype), values=values))


@pytest.mark.parametrize("law", LAWS)
def test_laws_of_a_cell_without_a_state(law: str) -> None:
    LAWS[law](Trial(filled(FeedForward(WIDTH, 24)).double(), NoState(), chunks(WIDTH, 2, 1)))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_chunked_is_the_plain_loop(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, length, HEADS, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    memory = torch.randn(2, HEADS, 8, 8, generator=generator, dtype=torch.float64)
    found = linear_attention(q, k, v, memory)
    with use_kernel("naive"):
        expected = linear_attention(q, k, v, memory)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    assert torch.equal(contribution(k, v), found[1])


# --- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [False, True], ids=["", "checkpointed-blocks"])
def test_gradients_in_float64(again: bool) -> None:
    """Against autograd through the loop over tokens, in the graph of the whole context."""
    model = model_of()
    given = arguments(model)
    with use_kernel("naive"):
        truth = differentiate(model, "full", **given)
    if again:
        checkpoint_blocks(model)
    chunked = {name: differentiate(model, name, CHUNK, **given) for name in ("reversible", "checkpoint")}
    assert_same_bits(chunked["reversible"], chunked["checkpoint"])
    for name in ("reversible-lossy", "full"):
        chunked[name] = differentiate(model, name, CHUNK, **given)
    for found in chunked.values():
        errors = relative_errors(found.gradients, truth.gradients)
        assert max(errors.values()) < 1e-10, errors
        torch.testing.assert_close(found.loss, truth.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(found.state.memory, truth.state.memory, rtol=0, atol=1e-10)
    assert chunked["reversible-lossy"].report["drift"] == 0
    assert chunked["reversible-lossy"].report["predicted_bits_lost"] == 0


def test_gradients_in_float32() -> None:
    truth = differentiate(model_of(), "full", **arguments(model_of()))
    model = model_of(torch.float32)
    given = arguments(model_of())
    for name in ("state", "final_state_gradient"):
        given[name] = given[name].each(torch.Tensor.float)
    for strategy in ("reversible", "checkpoint", "full"):
        found = differentiate(model, strategy, CHUNK, **given)
        assert max(relative_errors(found.gradients, truth.gradients).values()) < 1e-5


def test_autocast() -> None:
    """Sums and their gradients stay float32; both exact strategies give the same bits, near those of ``full``."""
    model = model_of(torch.float32)
    given = {"input_ids": random_tokens(LENGTH, batch=2)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        full, *chunked = (
            differentiate(model, name, CHUNK, **given) for name in ("full", "reversible", "checkpoint")
        )
    assert_same_bits(*chunked)
    assert max(relative_errors(chunked[0].gradients, full.gradients).values()) < 0.05
    exact = differentiate(model_of(), "full", **given)
    ours, theirs = (
        sorted(relative_errors(found.gradients, exact.gradients).values()) for found in (chunked[0], full)
    )
    assert ours[len(ours) // 2] < 1.5 * theirs[len(theirs) // 2]


def test_truncated_is_another_gradient() -> None:
    model = model_of()
    full = differentiate(model, "full", **arguments(model))
    cut = differentiate(model, "truncated", CHUNK, **arguments(model))
    torch.testing.assert_close(cut.loss, full.loss, rtol=1e-9, atol=0)
    assert max(relative_errors(cut.gradients, full.gradients).values()) > 0.01


def test_the_state_is_tuned() -> None:
    model = model_of(torch.float32)
    model.add_initial_state()
    for number, memory in enumerate(model.model.initial_wkv):
        memory.data.fill_(0.1 * (number + 1))
    ids = random_tokens(64, batch=2)
    full, chunked = (differentiate(model, name, CHUNK, input_ids=ids) for name in ("full", "reversible"))
    names = [f"model.initial_wkv.{layer}" for layer in range(3)]
    assert all(float(full.gradients[name].norm()) > 0 for name in names)
    assert max(relative_errors(chunked.gradients, full.gradients).values()) < 1e-5


def test_nothing_of_the_memory_is_on_the_tape() -> None:
    """A layer's inner chunk puts its print, two numbers, and a fingerprint there: 16 and 8 bytes, laid out by 16."""
    model, ids = model_of(torch.float32), random_tokens(8 * CHUNK, batch=2)
    inner, layers = 8 - 2, 3
    reversible = differentiate(model, "reversible", CHUNK, input_ids=ids)
    assert reversible.report["tape_bytes"] == inner * layers * (16 + 16)
    checkpoint = differentiate(model, "checkpoint", CHUNK, input_ids=ids)
    memory = 2 * HEADS * (WIDTH // HEADS) ** 2 * 8
    assert checkpoint.report["tape_bytes"] == inner * layers * (16 + 16 + memory)


def test_states_come_back_and_go_on() -> None:
    model = model_of(torch.float32).eval()
    ids = random_tokens(64)[0]
    check = check_reversal(model, ids, chunk=CHUNK, drift_steps=(16,))
    assert check.passed and check.used_bits == check.shift_bytes == check.theory_bits == 0
    with torch.no_grad():
        whole, first = model(ids[None]), model(ids[None, :20])
        assert isinstance(first.state, LinearAttentionState) and first.state.memory.shape == (3, 1, 2, 8, 8)
        rest = model(ids[None, 20:], state=first.state)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole.logits, rtol=1e-4, atol=1e-5)
    beams = model.generate(ids[None, :8], max_new_tokens=6, num_beams=3, do_sample=False)
    assert beams.shape == (1, 14)


def test_batches_are_walked_through() -> None:
    """Evaluation loops take an output apart, pad and gather its tensors, and make one of its kind again."""
    model = model_of(torch.float32).eval()
    ids = random_tokens(9, batch=2)
    with torch.no_grad():
        output = model(ids, labels=ids)
        (memory,) = dict(output.items())["state"]
        again = type(output)({name: _doubled(value) for name, value in output.items()})
    assert memory.shape[:2] == (2, 3)
    assert isinstance(again.state, LinearAttentionState)
    assert torch.equal(again.state.memory, 2 * output.state.memory)


def _doubled(value: Any) -> Any:
    return type(value)(_doubled(part) for part in value) if isinstance(value, list | tuple) else 2 * value


def test_another_models_state_is_refused() -> None:
    model, other = (
        model_of(torch.float32),
        RwkvRevForCausalLM(
            RwkvRevConfig(
                **{"hidden_size": WIDTH, "num_attention_heads": 2, "head_size": 8, "vocab_size": 32},
                **{"num_hidden_layers": 3, "intermediate_size": 24},
            )
        ),
    )
    ids = random_tokens(5)
    state = other(ids).state
    words = "is a RwkvRevState; this model's states are of the kind LinearAttentionState"
    for given in ({"state": state}, {"labels": ids, "state": state}, {"past_key_values": state}):
        with pytest.raises(ValueError, match=words):
            model(ids, **given)


@pytest.mark.parametrize("strategy", ["reversible", "checkpoint"])
def test_a_memory_that_is_full_is_named(strategy: str) -> None:
    """16 bits on a grid of 2^-8 hold sums below 128, which are soon reached."""
    model, ids = model_of(torch.float32, memory_bits=16, memory_exponent=-8), random_tokens(256, batch=2)
    model.model.blocks[1].attention.value.weight.data *= 8
    with pytest.raises(
        GridOverflowError,
        match=r"the memory of layer 1, linear attention: the sum of row .* int16 holds 15 bits",
    ):
        differentiate(model, strategy, CHUNK, input_ids=ids)


NUMBERS = {"int": "integer", "float": "float"}


def settings_of(format: str) -> dict[str, Any]:
    return {"memory_bits": int(format[-2:]), "memory_numbers": NUMBERS[format[:-2]]}


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_comes_back_to_the_bit(format: str) -> None:
    """The same gradient from both exact strategies, as near to the unrounded one as the grid is fine."""
    model = model_of(torch.float32, **settings_of(format))
    exponent = model.config.memory_exponent
    assert exponent == EXPONENTS[format]
    ids = random_tokens(LENGTH, batch=2)
    full, *chunked = (
        differentiate(model, s, CHUNK, input_ids=ids) for s in ("full", "reversible", "checkpoint")
    )
    assert_same_bits(*chunked)
    errors = relative_errors(chunked[0].gradients, full.gradients)
    assert max(errors.values()) < 1e-5 + 4 * 2.0**exponent, errors
    assert check_reversal(model.eval(), ids[0], chunk=CHUNK, drift_steps=(16,)).passed


@pytest.mark.parametrize("format", FORMATS)
def test_float64_gradients_are_as_near_as_the_grid_is_fine(format: str) -> None:
    """A few units of it, in an odd number of tokens and small chunks: figures in docs/cells.md."""
    model, ids = model_of(**settings_of(format)), random_tokens(67, batch=2)
    full, chunked = (differentiate(model, s, 3, input_ids=ids) for s in ("full", "reversible"))
    unit = 2.0 ** EXPONENTS[format]
    assert unit / 50 < max(relative_errors(chunked.gradients, full.gradients).values()) < 16 * unit


def test_sixteen_bits_of_float_there_are_none() -> None:
    with pytest.raises(ValueError, match="memory_numbers = 'float' needs memory_bits = 32 or 64, not 16"):
        model_of(memory_bits=16, memory_numbers="float")


@pytest.mark.parametrize("format", FORMATS)
def test_grids_that_cannot_be_meant(format: str) -> None:
    least = 1 - FORMATS[format][1]
    for exponent in (least, 0):
        LinearAttention(1, 2, format=format, exponent=exponent, group_norm_epsilon=1e-3)
    for exponent in (-1000, least - 1, 1, 20, 1000):
        with pytest.raises(
            ConfigError, match=f"^exponent = {exponent} must be from {least} to 0 for {format}"
        ):
            LinearAttention(1, 2, format=format, exponent=exponent, group_norm_epsilon=1e-3)
    with pytest.raises(ConfigError, match="the format 'int8' of a state does not exist"):
        LinearAttention(1, 2, format="int8", exponent=0, group_norm_epsilon=1e-3)


def test_the_format_is_that_of_the_sweeps() -> None:
    """On whose grid this memory does not fit; in one graph, read or generated it is a plain sum (docs/cells.md)."""
    model, ids = model_of(torch.float32, memory_bits=16, memory_exponent=-14), random_tokens(64, batch=2)
    for strategy in ("reversible", "checkpoint"):
        with pytest.raises(GridOverflowError):
            differentiate(model, strategy, CHUNK, input_ids=ids)
    plain = model_of(torch.float32)
    for strategy in ("full", "truncated"):
        assert_same_bits(*(differentiate(m, strategy, CHUNK, input_ids=ids) for m in (model, plain)))
    assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("format", FORMATS)
def test_capacity_of_the_cell(format: str) -> None:
    """Updates of half of the bits: as many as :func:`capacity` says are held, and the next one is refused."""
    bits, (_, whole) = FORMATS[format][1] // 2, FORMATS[format]
    cell = LinearAttention(1, 1, format=format, exponent=0, group_norm_epsilon=1e-3).double()
    held, largest, tokens = capacity(format, bits), 2.0**bits - 1, 50
    for linear in (cell.query, cell.key, cell.value):
        torch.nn.init.ones_(linear.weight)
    # token by token near the end; what was before is one number
    before = largest * (held - tokens)
    state = cell.exact(Sums(torch.full((1, 1, 1, 1), before, dtype=torch.float64)))
    token = torch.full((1, 1, 1), largest**0.5, dtype=torch.float64)
    for _ in range(tokens):
        state = cell.advance(state, token, output=False).state
    assert int(state.memories[0].units) <= (1 << whole) - 1
    with pytest.raises(GridOverflowError, match=f"{format} holds {whole} bits"):
        cell.advance(state, token, output=False)


def test_another_arithmetic_on_the_way_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Additive.retreat

    def dishonest(self: Additive, change: torch.Tensor) -> Additive:
        return Additive(honest(self, change).units + 1, self.exponent)

    monkeypatch.setattr(Additive, "retreat", dishonest)
    model = model_of(torch.float32)
    with pytest.raises(ReversalMismatchError):
        differentiate(model, "reversible", CHUNK, input_ids=random_tokens(LENGTH))


@pytest.mark.parametrize("length", [128, 300])
def test_the_forecast_counts_what_the_graph_keeps(length: int) -> None:
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "head_size": 32, "intermediate_size": 512}
    model = model_of(torch.float32, **sizes, num_hidden_layers=2)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.model(random_tokens(length)).last_hidden_state
    found = sum(storage.nbytes() for storage in kept.values())
    assert hidden.requires_grad
    assert abs(graph_bytes(model.config, 1, length) / found - 1) < 0.05
