"""Documents packed into rows against the same documents alone: loss, gradients, final states, on every way in."""

import functools
import math
import sys
import types
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import (
    VERSIONS,
    Outcome,
    assert_same_bits,
    checkpoint_blocks,
    differentiate,
    english,
    grouped_errors,
    load,
    random_like,
    random_state,
    random_tokens,
    relative_error,
    tiny_model,
)
from pairwise import every_two
from test_linear_attention import filled
from torch import Tensor
from transformers import DataCollatorWithFlattening

import rwkv_rev.cells
from rwkv_rev import RwkvRevConfig, RwkvRevForCausalLM
from rwkv_rev.architectures.registry import architecture
from rwkv_rev.cells import borders
from rwkv_rev.cells.borders import Borders, ends_of_spans
from rwkv_rev.cells.token_shift import mix
from rwkv_rev.errors import StrategyError
from rwkv_rev.state import ModelState
from rwkv_rev.wkv import use_kernel

OTHERS = ("coupled", "reversible-gru", "reversible-lstm", "linear-attention", "coupled-4", "coupled-5.2")
LENGTHS = {
    "mixed": [
        9,
        1,
        1,
        17,
        3,
        11,
    ],  # one-token documents; several borders within a chunk of 12, a document over three
    "at-edges": [16, 8, 8, 6],  # borders where chunks begin
    "long": [32, 10],  # a document over many chunks
    "singles": [1] * 6 + [3],
    "longer": [13, 1, 1, 22, 7, 16],
}
TOKENS = sum(LENGTHS["mixed"])
PREDICTED = TOKENS - len(LENGTHS["mixed"])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
ROUNDED = 1e-10
"""In float64, of cells whose state is rounded to a grid at each token, or that is the format's own."""
STRATEGIES = ("full", "checkpoint", "reversible", "truncated")


def model_of(name: str, dtype: torch.dtype = torch.float64, *, tuned: bool = False) -> RwkvRevForCausalLM:
    if name in VERSIONS:
        model = tiny_model(name, dtype=dtype)
    else:
        sizes = {"hidden_size": 12, "num_hidden_layers": 2, "vocab_size": 32, **architecture(name).sizes(12)}
        model = filled(RwkvRevForCausalLM(RwkvRevConfig(rwkv_version=name, **sizes))).to(dtype).train()
    if tuned and architecture(name).tunes_state:
        model.add_initial_state()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.model.initial_wkv:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.to(dtype)
    return model


def borders_of(*rows: Sequence[int]) -> Tensor:
    """[B, T], with documents of these lengths in each row."""
    at = torch.zeros(len(rows), sum(rows[0]), dtype=torch.bool)
    for row, lengths in enumerate(rows):
        at[row, [0, *torch.tensor(lengths).cumsum(0).tolist()[:-1]]] = True
    return at


def alone(
    model: RwkvRevForCausalLM, strategy: str, chunk: int | None, documents: list[Tensor], divisor: int
) -> tuple[Outcome, list[ModelState]]:
    """Sums over documents [1, n] that are each read by themselves, and their final states."""
    model.zero_grad()
    total, states = torch.zeros(()), []
    with model.set_bptt(strategy, chunk_length=chunk):
        for document in documents:
            output = model(document, labels=document, num_items_in_batch=divisor)
            if output.loss.requires_grad and document.shape[1] > 1:
                output.loss.backward()
                total = total + output.loss.detach()
            states.append(output.state)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Outcome(total, states[-1], gradients, {}), states


def assert_near(found: Outcome, expected: Outcome, tolerance: float) -> None:
    assert relative_error(found.loss, expected.loss) <= tolerance
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert relative_error(found.gradients[name], gradient) <= tolerance, name


def assert_states(found: ModelState, expected: ModelState, tolerance: float) -> None:
    for one, other in zip(found.tensors(), expected.tensors(), strict=True):
        assert relative_error(one, other) <= tolerance


def tolerance_of(name: str, strategy: str, dtype: torch.dtype = torch.float64) -> float:
    on_grid = strategy in ("checkpoint", "reversible") and name in OTHERS
    return max(TOLERANCE[dtype], ROUNDED if on_grid else 0)


def cut(ids: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    return list(ids.split(list(lengths), dim=1))


# --- every generation, cell and strategy --------------------------------------------------------------------------


@functools.cache
def documents_alone(
    name: str, layout: str, dtype: torch.dtype = torch.float64, seed: int = 1
) -> tuple[Outcome, list[ModelState]]:
    """What ``full`` makes of the documents of a layout."""
    lengths = LENGTHS[layout]
    ids = random_tokens(sum(lengths), seed=seed)
    return alone(model_of(name, dtype), "full", None, cut(ids, lengths), sum(lengths) - len(lengths))


@pytest.mark.parametrize(
    ("strategy", "name", "layout"),
    [
        *((strategy, name, "mixed") for strategy in ("full", "reversible") for name in (*VERSIONS, *OTHERS)),
        *((strategy, name, "mixed") for strategy in ("checkpoint", "truncated") for name in VERSIONS),
        *(
            (STRATEGIES[(i + j) % len(STRATEGIES)], name, layout)
            for i, name in enumerate(("4", "5.2", "6", "7"))
            for j, layout in enumerate(LENGTHS)
            if layout not in ("mixed", "longer")
        ),
    ],
)
def test_a_packed_row_is_its_documents(name: str, strategy: str, layout: str) -> None:
    """Whose gradient is that of ``full``. Of the other layouts, each meets every strategy and four generations.

    ``truncated`` cuts packed rows elsewhere than documents alone, so its chunk is the row there.
    """
    lengths = LENGTHS[layout]
    model, ids = model_of(name), random_tokens(sum(lengths))
    chunk = sum(lengths) if strategy == "truncated" else 8 if layout == "at-edges" else 12
    expected, states = documents_alone(name, layout)
    found = differentiate(model, strategy, chunk, input_ids=ids, borders=borders_of(lengths))
    assert_near(found, expected, tolerance_of(name, strategy))
    assert_states(found.state, states[-1], tolerance_of(name, strategy))


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_trained_models_on_text(version: str, shallow: dict[str, Path]) -> None:
    """In float64, through several chunks; a document over three of them, and one of one token."""
    lengths = [40, 1, 18]
    model, ids = load(shallow[version], torch.float64), english(sum(lengths))
    expected, states = alone(model, "reversible", 16, cut(ids, lengths), sum(lengths) - len(lengths))
    found = differentiate(model, "reversible", 16, input_ids=ids, borders=borders_of(lengths))
    assert_near(found, expected, 1e-12)
    assert_states(found.state, states[-1], 1e-12)


@pytest.mark.parametrize("name", [*VERSIONS, *OTHERS])
def test_in_a_single_chunk_no_grid_is_between(name: str) -> None:
    lengths = LENGTHS["mixed"]
    model, ids = model_of(name), random_tokens(TOKENS)
    expected, _ = documents_alone(name, "mixed")
    strategy = "reversible" if name in OTHERS else "checkpoint"  # as the other, without a chunk between
    found = differentiate(model, strategy, TOKENS, input_ids=ids, borders=borders_of(lengths))
    assert_near(found, expected, 1e-12)


@pytest.mark.parametrize("strategy", ["full", "reversible"])
@pytest.mark.parametrize("name", VERSIONS)
def test_in_float32(name: str, strategy: str) -> None:
    """RMS over texts: of one, the two numbers of RWKV-5.0's decay are chance, of sums that cancel."""
    lengths, model = LENGTHS["longer"], model_of(name, torch.float32)
    errors: dict[str, list[float]] = {}
    for seed in range(2):
        ids = random_tokens(sum(lengths), seed=seed)
        expected, states = documents_alone(name, "longer", torch.float32, seed)
        found = differentiate(model, strategy, 16, input_ids=ids, borders=borders_of(lengths))
        assert relative_error(found.loss, expected.loss) <= TOLERANCE[torch.float32]
        assert_states(found.state, states[-1], TOLERANCE[torch.float32])
        for parameter, gradient in expected.gradients.items():
            error = relative_error(found.gradients[parameter], gradient)
            errors.setdefault(parameter, []).append(error)
    for parameter, each in errors.items():
        assert math.hypot(*each) / math.sqrt(len(each)) <= TOLERANCE[torch.float32], parameter


@pytest.mark.parametrize("name", VERSIONS)
def test_kernels(name: str) -> None:
    lengths = LENGTHS["mixed"]
    model, ids = model_of(name), random_tokens(TOKENS)
    with use_kernel("naive"):
        expected, _ = alone(model, "full", None, cut(ids, lengths), PREDICTED)
    for kernel in ("naive", "chunked"):
        with use_kernel(kernel):
            found = differentiate(model, "full", input_ids=ids, borders=borders_of(lengths))
        assert_near(found, expected, 1e-10)


@pytest.mark.parametrize("name", [*VERSIONS, *OTHERS])
def test_the_exact_tapes_agree_to_the_bit(name: str) -> None:
    ids, at = random_tokens(TOKENS, batch=2), borders_of(LENGTHS["mixed"], LENGTHS["long"])
    model = model_of(name, torch.float32, tuned=True)
    found = [
        differentiate(model, strategy, 16, input_ids=ids, borders=at)
        for strategy in ("checkpoint", "reversible")
    ]
    assert_same_bits(*found)


# --- rows, masks, states ------------------------------------------------------------------------------------------


OTHER_ROWS = [LENGTHS["mixed"], [TOKENS], [14, 3, 25]]


def masked_rows() -> tuple[Tensor, Tensor]:
    """Ids and mask [3, T]: left padding, holes (one of them over a border), right padding."""
    mask = torch.ones(3, TOKENS, dtype=torch.long)
    mask[0, :5], mask[0, 26:30], mask[1, 34:], mask[2, 6:9], mask[2, 14:17] = 0, 0, 0, 0, 0
    return random_tokens(TOKENS, batch=3), mask


@functools.cache
def masked_rows_alone(name: str) -> tuple[Outcome, list[Tensor], list[ModelState]]:
    """What ``full`` makes of their documents, the gradient by the state, and the state after each row."""
    model, (ids, mask) = model_of(name, tuned=True), masked_rows()
    state = random_state(model, 3, learned=True)
    weight = random_like(state)
    model.zero_grad()
    total, ends = torch.zeros(()), []
    with model.set_bptt("full"):
        for row, lengths in enumerate(OTHER_ROWS):
            one = torch.tensor([row])
            parts = zip(cut(ids[one], lengths), cut(mask[one], lengths), strict=True)
            documents = [part[valid.bool()][None] for part, valid in parts if valid.any()]
            for number, document in enumerate(documents):
                before = state.rows(one) if number == 0 and row > 0 else None
                last = number == len(documents) - 1
                output = model(
                    document,
                    labels=document,
                    state=before,
                    num_items_in_batch=100,
                    final_state_gradient=weight.rows(one) if last else None,
                )
                output.loss.backward()
                total = total + output.loss.detach()
            ends.append(output.state)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Outcome(total, ends[-1], gradients, {}), [tensor.grad for tensor in state.tensors()], ends


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        *((name, "reversible") for name in (*VERSIONS, *OTHERS)),
        *((name, ("full", "checkpoint")[number % 2]) for number, name in enumerate(VERSIONS)),
    ],
)
def test_rows_with_other_borders_masks_and_states(name: str, strategy: str) -> None:
    """Beside these masks, a row without borders, and states that go on."""
    model, (ids, mask), at = model_of(name, tuned=True), masked_rows(), borders_of(*OTHER_ROWS)
    at[1, 0] = at[2, 0] = False  # these two go on
    state = random_state(model, 3, learned=True)
    found = differentiate(
        model,
        strategy,
        12,
        input_ids=ids,
        attention_mask=mask,
        borders=at,
        num_items_in_batch=100,
        state=state,
        final_state_gradient=random_like(state),
    )
    expected, to_state, ends = masked_rows_alone(name)
    tolerance = tolerance_of(name, strategy)
    assert_near(found, expected, tolerance)
    for tensor, gradient in zip(state.tensors(), to_state, strict=True):
        assert relative_error(tensor.grad, gradient) <= tolerance
        assert (tensor.grad[:, 0] == 0).all()  # its row began anew
    for row, end in enumerate(ends):
        assert_states(found.state.rows(torch.tensor([row])), end, tolerance)


def tuning(name: str) -> RwkvRevForCausalLM:
    """A model of which the state is trained that documents begin from, and nothing else."""
    model = model_of(name, tuned=True)
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is tuned for tuned in model.model.initial_wkv))
    return model


@functools.cache
def tuned_documents_alone(name: str) -> tuple[Outcome, list[ModelState]]:
    """What ``full`` makes of them."""
    return alone(tuning(name), "full", None, cut(random_tokens(TOKENS), LENGTHS["mixed"]), PREDICTED)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["5.2", "7", "reversible-gru", "linear-attention"])
def test_a_tuned_state_is_where_every_document_begins(name: str, strategy: str) -> None:
    lengths = LENGTHS["mixed"]
    model, ids = tuning(name), random_tokens(TOKENS)
    expected, states = tuned_documents_alone(name)
    found = differentiate(model, strategy, TOKENS, input_ids=ids, borders=borders_of(lengths))
    assert len(found.gradients) == 2 and all(g.abs().sum() > 0 for g in found.gradients.values())
    assert_near(found, expected, tolerance_of(name, strategy))
    assert_states(found.state, states[-1], tolerance_of(name, strategy))
    if strategy in ("checkpoint", "reversible"):
        cut_in_chunks = differentiate(model, strategy, 14, input_ids=ids, borders=borders_of(lengths))
        assert_near(cut_in_chunks, expected, tolerance_of(name, strategy))


def test_the_start_of_documents_under_truncated() -> None:
    """Each document's start is reached from the chunk that it begins in."""
    model, ids = model_of("7", tuned=True), random_tokens(24)
    expected = [
        differentiate(
            model, "truncated", 8, input_ids=ids[:, start : start + 8], labels=None, num_items_in_batch=21,
            shift_labels=torch.nn.functional.pad(ids[:, start + 1 : start + 8], (0, 1), value=-100),
        ).gradients["model.initial_wkv.0"]
        for start in (0, 8, 16)
    ]  # fmt: skip
    found = differentiate(model, "truncated", 8, input_ids=ids, borders=borders_of([8, 8, 8]))
    assert relative_error(found.gradients["model.initial_wkv.0"], sum(expected)) <= 1e-12


@pytest.mark.parametrize("name", [*VERSIONS, *OTHERS])
def test_every_documents_final_state(name: str) -> None:
    lengths = LENGTHS["mixed"]
    model, ids = model_of(name).eval(), random_tokens(TOKENS)
    at = borders_of(lengths)
    with torch.no_grad(), model.set_bptt("auto", chunk_length=16):
        for start, stop in pairwise([0, *torch.tensor(lengths).cumsum(0).tolist()]):
            expected = model(ids[:, start:stop])
            found = model(ids[:, :stop], borders=at[:, :stop])
            assert_states(found.state, expected.state, 1e-12)
            assert relative_error(found.logits[:, start:], expected.logits) <= 1e-12


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        *(
            (name, "reversible")
            for name in ("4", "5.2", "6", "7", "coupled", "coupled-5.2", "linear-attention")
        ),
        *((name, "checkpoint") for name in ("5.2", "coupled")),
    ],
)
def test_blocks_that_are_computed_again(name: str, strategy: str) -> None:
    ids, at = random_tokens(TOKENS), borders_of(LENGTHS["mixed"])
    model = model_of(name, tuned=True)
    expected = differentiate(model, strategy, 16, input_ids=ids, borders=at)
    checkpoint_blocks(model)
    assert_near(differentiate(model, strategy, 16, input_ids=ids, borders=at), expected, 1e-12)


@pytest.mark.parametrize("strategy", ["full", "reversible"])
@pytest.mark.parametrize("name", ["4", "5.2", "6", "7", "reversible-lstm"])
def test_a_loss_of_ones_own(name: str, strategy: str) -> None:
    ids, at = random_tokens(TOKENS), borders_of(LENGTHS["mixed"])
    model = model_of(name, tuned=True)
    expected = differentiate(model, "full", input_ids=ids, borders=at)
    model.zero_grad()
    with model.set_bptt(strategy, chunk_length=16):
        logits = model(ids, borders=at).logits
    labels = ids.masked_fill(at, -100)
    torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:]).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_near(Outcome(expected.loss, expected.state, gradients, {}), expected, tolerance_of(name, strategy))


def test_the_tape_keeps_whole_what_a_border_forgets() -> None:
    """A chunk without borders costs what it did."""
    model, ids = model_of("5.2", torch.float32), random_tokens(56)
    plain = differentiate(model, "reversible", 8, input_ids=ids).report["tape_bytes"]
    whole = differentiate(model, "checkpoint", 8, input_ids=ids).report["tape_bytes"]
    one = differentiate(model, "reversible", 8, input_ids=ids, borders=borders_of([20, 36]))
    assert plain <= one.report["tape_bytes"] <= plain + 2 * whole / 5


def test_lossy_reversal_is_refused() -> None:
    model = tiny_model("5.2")
    with pytest.raises(StrategyError, match=r"a border .* forgets them whole: use 'reversible'"):
        differentiate(model, "reversible-lossy", 8, input_ids=random_tokens(60), borders=borders_of([20, 40]))


@pytest.mark.parametrize("labels", [False, True], ids=["logits", "loss"])
def test_code_that_may_look_at_positions_is_refused(labels: bool) -> None:
    class Gate(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(1)

    model, ids = tiny_model("5.2"), random_tokens(60)
    model.model.blocks[0].time_mix.output = torch.nn.Sequential(model.model.blocks[0].time_mix.output, Gate())
    with model.set_bptt("full"):
        model(ids, labels=ids)
        with pytest.raises(StrategyError, match=r"packed into one row.*give each document a row of its own"):
            model(ids, labels=ids if labels else None, borders=borders_of([20, 40]))


# --- reading and generating ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["4", "5.2", "6", "7"])
def test_evaluation(name: str) -> None:
    lengths = LENGTHS["mixed"]
    model, ids = model_of(name).eval(), random_tokens(TOKENS)
    at = borders_of(lengths)
    expected, _ = alone(model.train(), "full", None, cut(ids, lengths), PREDICTED)
    model.eval()
    with torch.no_grad(), model.set_bptt("reversible", chunk_length=16):
        output = model(ids, labels=ids, borders=at)
    assert relative_error(output.loss, expected.loss) <= 1e-12
    logits = torch.cat([model(part).logits for part in cut(ids, lengths)], dim=1)
    assert relative_error(output.logits + 0, logits) <= 1e-12  # made at their first use


@pytest.mark.parametrize(
    ("name", "options", "embeddings"),
    every_two(["4", "5.2", "6", "7"], ["", "use_cache=False", "num_beams=2"], [False, True]),
)
def test_generation_goes_on_from_the_last_document(name: str, options: str, embeddings: bool) -> None:
    model, ids = model_of(name).eval(), random_tokens(19, batch=2)
    at = borders_of([13, 6], [13, 6])
    more = {"": {}, "use_cache=False": {"use_cache": False}, "num_beams=2": {"num_beams": 2}}[options]
    new = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **more}
    prompt: dict[str, Any] = {"inputs": ids}
    if embeddings:
        if options == "use_cache=False":
            pytest.skip("transformers does not read embeddings twice")
        prompt = {"inputs_embeds": model.get_input_embeddings()(ids)}
    found = model.generate(**prompt, borders=at, **new)[:, -5:]
    assert torch.equal(found, model.generate(ids[:, 13:], **new)[:, -5:])
    assert not torch.equal(found, model.generate(ids, **new)[:, -5:])


@pytest.mark.parametrize(
    ("version", "name", "cached"),
    every_two(["4", "5.2", "6", "7"], ["borders", "position_ids", "seq_idx", "cu_seq_lens_q"], [True, False]),
)
def test_generation_by_every_name(version: str, name: str, cached: bool) -> None:
    model, ids, lengths = model_of(version).eval(), random_tokens(22), [9, 1, 12]
    given = {"borders": borders_of(lengths)} if name == "borders" else names_of(lengths)[name]
    given.pop("max_length_q", None)  # which generate does not know
    new = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "use_cache": cached}
    found = model.generate(ids, **given, **new)[:, -5:]
    assert torch.equal(found, model.generate(ids[:, 10:], **new)[:, -5:])
    if version != "4":  # which writes the same after both
        assert not torch.equal(found, model.generate(ids, **new)[:, -5:])


COPIES: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams without a cache": {"num_beams": 2, "use_cache": False},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "assisted": {"assistant_model": None},
}


@pytest.mark.parametrize(
    ("version", "name", "copies"),
    every_two(["4", "5.2", "6", "7"], ["borders", "position_ids", "seq_idx", "cu_seq_lens_q"], COPIES),
)
def test_several_sequences_of_a_packed_row(version: str, name: str, copies: str) -> None:
    """What tells of its documents tells of every copy of the row."""
    model, ids, lengths = model_of(version).eval(), random_tokens(22), [9, 1, 12]
    given = {"borders": borders_of(lengths)} if name == "borders" else names_of(lengths)[name]
    given.pop("max_length_q", None)  # which generate does not know
    new = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **COPIES[copies]}
    if copies == "assisted":
        new["assistant_model"] = tiny_model(version, seed=3, dtype=torch.float64).eval()
    torch.manual_seed(0)
    found = model.generate(ids, **given, **new)[:, -5:]
    torch.manual_seed(0)
    assert torch.equal(found, model.generate(ids[:, 10:], **new)[:, -5:])


def test_cumulative_lengths_of_several_prompts() -> None:
    with pytest.raises(ValueError, match="in a single row, and there are 2: use borders"):
        ids = random_tokens(8, batch=2)
        model_of("7").generate(ids, cu_seq_lens_q=torch.tensor([0, 3, 8]), num_beams=2, max_new_tokens=2)


def test_assisted_generation() -> None:
    model, ids = model_of("5.2").eval(), random_tokens(19)
    new = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    helper = tiny_model("5.2", seed=3, dtype=torch.float64).eval()
    found = model.generate(ids, borders=borders_of([13, 6]), assistant_model=helper, **new)
    assert torch.equal(found[:, -6:], model.generate(ids[:, 13:], **new)[:, -6:])


# --- other names for the same -------------------------------------------------------------------------------------


def names_of(lengths: Sequence[int]) -> dict[str, dict[str, Tensor]]:
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    numbers = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    return {
        "position_ids": {"position_ids": positions},
        "cu_seq_lens_q": {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(lengths)},
        "cu_seqlens": {"cu_seqlens": ends},
        "seq_idx": {"seq_idx": numbers.int()},
        "all": {"position_ids": positions, "cu_seq_lens_q": ends, "seq_idx": numbers},
    }


@functools.cache
def named_borders(layout: str) -> Outcome:
    ids, at = random_tokens(sum(LENGTHS[layout])), borders_of(LENGTHS[layout])
    return differentiate(model_of("5.2"), "reversible", max(4, len(ids[0]) // 3), input_ids=ids, borders=at)


@pytest.mark.parametrize("name", names_of([1]))
@pytest.mark.parametrize("layout", ["mixed", "singles"])
def test_names_of_collators(name: str, layout: str) -> None:
    lengths = LENGTHS[layout]
    model, ids = model_of("5.2"), random_tokens(sum(lengths))
    expected, chunk = named_borders(layout), max(4, len(ids[0]) // 3)
    found = differentiate(model, "reversible", chunk, input_ids=ids, **names_of(lengths)[name])
    assert_same_bits(found, expected)
    logits = model(ids, borders=borders_of(lengths)).logits
    assert torch.equal(model(ids, **names_of(lengths)[name]).logits, logits)
    hidden = model.model(ids, **names_of(lengths)[name]).last_hidden_state
    assert torch.equal(model.head(hidden), logits)


@pytest.mark.parametrize("flags", [False, True], ids=["positions", "flash-attention"])
def test_the_collator_of_transformers(flags: bool) -> None:
    keywords = {"return_flash_attn_kwargs": True, "return_seq_idx": True} if flags else {}
    documents = cut(random_tokens(TOKENS), LENGTHS["mixed"])
    batch = DataCollatorWithFlattening(**keywords)([{"input_ids": part[0].tolist()} for part in documents])
    model = model_of("7")
    expected, _ = alone(model, "full", None, documents, PREDICTED)
    found = differentiate(model, "reversible", 8, **batch)
    assert_near(found, expected, 1e-12)


def test_a_row_goes_on_from_its_state_unless_borders_say_otherwise() -> None:
    model, ids = model_of("5.2").eval(), random_tokens(20)
    state, at = random_state(model, 1), borders_of([12, 8])
    with torch.no_grad():
        on = model(ids, state=state, position_ids=torch.tensor([[*range(12), *range(8)]])).logits
        anew = model(ids, state=state, borders=at).logits
        assert torch.equal(anew, model(ids, borders=at).logits)
        at[0, 0] = False
        assert torch.equal(on, model(ids, state=state, borders=at).logits)
    assert relative_error(on[:, :12], anew[:, :12]) > 1e-3 and torch.equal(on[:, 12:], anew[:, 12:])


def test_a_row_of_one_document_is_no_packed_row() -> None:
    """Neither kernels nor graphs become others by it."""
    model, ids = tiny_model("5.2"), random_tokens(40)
    expected = differentiate(model, "reversible", 16, input_ids=ids)
    for given in (
        {"borders": borders_of([40])},
        {"cu_seq_lens_q": torch.tensor([0, 40])},
        {"position_ids": torch.arange(40)[None]},
        {"seq_idx": torch.full((1, 40), 3)},
    ):
        assert_same_bits(differentiate(model, "reversible", 16, input_ids=ids, **given), expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"position_ids": torch.tensor([[0, 1, 2, 3, 3, 4, 5, 6]])}, "go from 3 to 3 at token 4 of row 0"),
        (
            {"position_ids": torch.tensor([[0, 1, 2, 3, 8, 9, 0, 1]])},
            "go from 3 to 8 at token 4 .* give each",
        ),
        ({"position_ids": torch.zeros(1, 7).long()}, r"position_ids have shape \[1, 7\], the input \[1, 8\]"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 7])}, "must rise from 0 to the row's 8 tokens"),
        ({"cu_seq_lens_q": torch.tensor([0, 5, 3, 8])}, "must rise"),
        (
            {"max_length_q": 7},
            "max_length_q = 7 says that a row of 8 tokens holds several documents, and not where",
        ),
        (
            {"cu_seq_lens_q": torch.tensor([0, 3, 8]), "max_length_k": torch.tensor(3)},
            "max_length_k = 3, and cu_seq_lens_q has a document of 5 tokens: give 5, or leave it out",
        ),
        ({"seq_idx": torch.zeros(1, 1, 8).long()}, "seq_idx have shape"),
        ({"borders": torch.zeros(1, 8)}, r"borders are torch.float32 \[1, 8\]: give bool \[1, 8\]"),
        ({"borders": torch.zeros(8, dtype=torch.bool)}, r"give bool \[1, 8\]"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 3, 8]), "seq_idx": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])},
            "cu_seq_lens_q and seq_idx say of other tokens",
        ),
        ({"borders": borders_of([4, 4]), "cu_seqlens": torch.tensor([0, 3, 8])}, "say of other tokens"),
        (
            {"cu_seq_lens_q": torch.tensor([0.0, 3.0, 8.0])},
            "cu_seq_lens_q is torch.float32: give a tensor of whole",
        ),
        ({"cu_seqlens": [0, 3, 8]}, "cu_seqlens is a list: give a tensor of whole numbers"),
        ({"position_ids": torch.arange(8.0)[None]}, "position_ids is torch.float32"),
        ({"seq_idx": torch.ones(1, 8, dtype=torch.bool)}, "seq_idx is torch.bool"),
        (
            {"seq_idx": torch.full((1, 8), -1)},
            "seq_idx numbers documents from 0, .* needs attention_mask 0 here",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("labels", [False, True], ids=["logits", "loss"])
def test_what_contradicts_itself_is_refused(given: dict[str, Any], message: str, labels: bool) -> None:
    model, ids = tiny_model("5.2"), random_tokens(8)
    with pytest.raises(ValueError, match=message):
        model(ids, labels=ids if labels else None, **given)


@pytest.mark.parametrize("labels", [False, True], ids=["logits", "loss"])
@pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seqlens"])
def test_states_of_documents_are_counted_as_their_lengths(name: str, labels: bool) -> None:
    """A document of no tokens, which has no state, would move those behind it; lengths may be padded at the end."""
    model, ids = tiny_model("7"), random_tokens(8)
    targets = ids if labels else None
    for ends in ([0, 3, 3, 8], [0, 0, 3, 8]):
        given = {name: torch.tensor(ends, dtype=torch.int32)}
        assert model(ids, labels=targets, **given) is not None
        with pytest.raises(ValueError, match=f"{name} holds {ends[1]} twice: a document of no tokens has no"):
            model(ids, labels=targets, return_document_states=True, **given)
    given = {name: torch.tensor([0, 3, 8, 8, 8])}
    states = model(ids, labels=targets, return_document_states=True, **given).document_states
    assert states.batch_size == 2


def test_numbers_of_masked_tokens() -> None:
    """-1 may stand for padding in ``seq_idx`` where the mask says so, too."""
    model, ids = model_of("7"), random_tokens(8)
    given = {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0]])}
    numbers = torch.tensor([[-1, 0, 0, 0, 1, 1, 1, -1]])
    expected = model(ids, labels=ids, borders=torch.arange(8)[None] == 4, **given).loss
    assert torch.equal(model(ids, labels=ids, seq_idx=numbers, **given).loss, expected)


def test_cumulative_lengths_are_of_a_single_row() -> None:
    ids = random_tokens(8, batch=2)
    with pytest.raises(ValueError, match="in a single row, and there are 2: use borders"):
        tiny_model("5.2")(ids, cu_seq_lens_q=torch.tensor([0, 3, 8]))


def test_positions_behind_a_hole() -> None:
    """Padding inside of a packed row, by any way of counting over it."""
    model, ids = model_of("5.2"), random_tokens(12)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0]])
    positions = torch.tensor([[1, 1, 0, 1, 2, 3, 4, 0, 0, 1, 2, 0]])
    at = torch.zeros(1, 12, dtype=torch.bool)
    at[0, 6] = True  # on a masked token: it holds for the next one that counts
    expected = model(ids, attention_mask=mask, borders=at, labels=ids).loss
    assert torch.equal(model(ids, attention_mask=mask, position_ids=positions, labels=ids).loss, expected)
    alone_ = [
        model(ids[:, part], labels=ids[:, part], num_items_in_batch=5).loss
        for part in ([2, 3, 4, 5], [8, 9, 10])
    ]
    assert relative_error(expected, sum(alone_)) <= 1e-12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("chunk", [16, 24], ids=["a long one", "parts"])
@pytest.mark.parametrize("name", ["4", "5.2", "6", "7"])
def test_on_a_gpu(name: str, chunk: int, masked: bool) -> None:
    """Kernels and fused mixes, against the documents in float64; the exact tapes agree to the bit."""
    # tokens at which float32 is off by 2e-6 on a CPU, too (at others, RWKV-6 by 13e-6)
    lengths, ids = LENGTHS["mixed"], random_tokens(TOKENS, seed=3)
    mask = torch.ones(1, TOKENS, dtype=torch.long)
    mask[0, 20:23], mask[0, 38:] = (0, 0) if masked else (1, 1)
    given = {"input_ids": ids, "attention_mask": mask, "borders": borders_of(lengths)}
    expected = differentiate(model_of(name), "full", **given)
    model = model_of(name, torch.float32).cuda()
    on_device = {name: tensor.cuda() for name, tensor in given.items()}
    found = [
        differentiate(model, strategy, chunk, **on_device)
        for strategy in ("full", "checkpoint", "reversible")
    ]
    for outcome in found:
        gradients = {name: gradient.cpu() for name, gradient in outcome.gradients.items()}
        assert grouped_errors(gradients, expected.gradients)["all"] <= TOLERANCE[torch.float32]
    assert_same_bits(found[1], found[2])


# --- the layout ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "call", "expected"),
    [
        ([5, 3, 1], 0, [1, 3, 5]),
        ([5, 3, 1], 100, [5]),
        ([100, 10, 10, 10, 10], 16, [10, 100]),
        ([64], 16, [64]),
        ([3, 3, 3], 0, [3]),
        ([9, 0], 0, [9]),
    ],
    ids=str,
)
def test_spans(lengths: list[int], call: int, expected: list[int]) -> None:
    assert ends_of_spans(torch.tensor(lengths).numpy(), call) == expected


@pytest.mark.parametrize("seed", range(5))
def test_every_token_is_laid_out_once(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    at = torch.rand(3, 70, generator=generator) < 0.1
    valid = torch.rand(3, 70, generator=generator) < 0.8
    valid[1] = False
    at &= valid
    chunk: Any = Borders(at, valid, [(torch.zeros(4),)]).chunk(torch.device("cpu"))
    chunk = chunk.of_part(0)
    tokens = torch.arange(210.0).view(3, 70, 1)
    seen: list[int] = []

    def step(stream: list[Tensor], state: list[Tensor], mask: Any) -> tuple[list[Tensor], list[Tensor]]:
        (x,), (s,) = stream, state
        there = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.valid
        seen.extend(x[..., 0][there].long().tolist())
        return [x], [s + (x * there[..., None]).sum(1)]

    (out,), (ends,) = chunk.run(step, [tokens], [torch.full((3, 4), 0.5)], list(chunk.starts))
    assert sorted(seen) == tokens[valid].flatten().long().tolist()
    assert torch.equal(out, tokens)
    for row in range(3):
        document = [t for t in range(70) if valid[row, t]]
        first = [t for t in document if at[row, t]]
        own = document if not first else [t for t in document if t >= first[-1]]
        begun = 0.5 if not first else 0.0
        total = functools.reduce(lambda s, t: s + 70 * row + t, own, begun)
        assert ends[chunk.last[row]].tolist() == [total] * 4


@pytest.mark.parametrize("holes", [None, "behind documents", "anywhere"])
def test_mixes_in_one_launch(holes: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken where no token is masked; the launch itself is tested in test_triton_cells.py."""
    launches = []

    def mixes(
        x: Tensor, shift: Tensor, mus: list[Tensor], begun: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, ...]:
        launches.append(begun)
        before = torch.cat([shift[:, None], x[:, :-1]], dim=1)
        before = torch.where(begun[0].bool()[..., None], begun[1], before)
        return tuple(mix(x, before, mu) for mu in mus)

    stub: Any = types.ModuleType("triton_token_shift")
    stub.token_mixes = mixes
    stub.mixes_and_last = lambda x, *given: (mixes(x, *given), x[:, -1])
    monkeypatch.setitem(sys.modules, "rwkv_rev.cells.triton_token_shift", stub)
    monkeypatch.setattr(rwkv_rev.cells, "triton_token_shift", stub, raising=False)
    at = borders_of([13, 7, 20], [40])
    at[1, 0], valid = False, torch.ones(2, 40, dtype=torch.bool)
    if holes == "behind documents":
        valid[0, 10:13], valid[0, 38:], valid[1, 30:] = False, False, False
    elif holes:
        valid[0, 5:7] = False
    chunk: Any = Borders(at, valid, [()]).chunk(torch.device("cpu"))
    x, shift, start, *mus = (torch.randn(*size, 6) for size in ((2, 40), (2,), (), (), ()))
    expected, last, _ = chunk.mixes(x, shift, start, mus)
    assert not launches
    monkeypatch.setattr(borders, "is_fused", lambda x: True)
    found, found_last, again = chunk.mixes(x, shift, start, mus)
    assert len(launches) == (holes is None)
    for one, repeated, other in zip(found, again(), expected, strict=True):
        assert torch.equal(one, other) and torch.equal(one, repeated)
    assert torch.equal(found_last, last)
