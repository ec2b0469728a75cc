"""``generate``: every token is read once, from every start, and what comes out is what re-reading would give."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import VERSIONS, random_state, random_tokens, relative_error
from generation_cases import EACH_ONCE, GREEDY, LENGTH, NEW, evaluated, reading, recomputed, returned_past
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache
from transformers.generation import BaseStreamer

from rwkv_rev import RwkvRevForCausalLM, RwkvRevState
from rwkv_rev.cache import CACHE_NAME, RwkvRevCache
from rwkv_rev.loading import load_model


@dataclass
class Start:
    """One way to begin: what ``generate`` is given, and the same as ids and state."""

    arguments: dict[str, Any]
    ids: Tensor
    state: RwkvRevState | None
    returned: int = field(default=0)
    """Prompt tokens in the returned rows."""


def start(model: RwkvRevForCausalLM, name: str, batch: int = 1) -> Start:
    ids = random_tokens(LENGTH, batch)
    state = random_state(model, batch) if name in ("state", "both") else None
    past = {} if state is None else {"state": state}
    if name in ("ids", "state"):
        return Start({"inputs": ids, **past}, ids, state, LENGTH)
    return Start({"inputs_embeds": model.get_input_embeddings()(ids).detach(), **past}, ids, state)


STARTS = ("ids", "state", "embeddings", "both")

# --- each token once --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_greedy(version: str, name: str) -> None:
    model = evaluated(version)
    begin = start(model, name, batch=2)
    with reading(model) as lengths:
        found = model.generate(**begin.arguments, **GREEDY, max_new_tokens=NEW)
    assert lengths == EACH_ONCE
    for row in range(2):
        state = None if begin.state is None else begin.state.rows(torch.tensor([row]))
        expected = recomputed(model, begin.ids[row : row + 1], NEW, state)
        assert found[row, begin.returned :].tolist() == expected


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("kind", ["sampled", "beams", "sampled beams", "several"])
def test_other_kinds(kind: str, name: str) -> None:
    """The same draws and the same beams as when every row is read again from its beginning for each token."""
    model = evaluated()
    options = {
        "sampled": {"do_sample": True},
        "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        "sampled beams": {"do_sample": True, "num_beams": 3},
        "several": {"do_sample": True, "num_return_sequences": 3},
    }[kind]
    options = {**options, "eos_token_id": None, "max_new_tokens": NEW}
    begin = start(model, name, batch=2)
    again = {"inputs": begin.ids, "state": begin.state, "use_cache": False}
    found = []
    for arguments, expected in (
        (begin.arguments, EACH_ONCE),
        (again, list(range(LENGTH, LENGTH + NEW))),
    ):
        torch.manual_seed(0)
        with reading(model) as lengths:
            found.append(model.generate(**arguments, **options)[:, -NEW:].tolist())
        assert lengths == expected
    assert found[0] == found[1]


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_left_padding(version: str, with_state: bool) -> None:
    """Each row of a left-padded batch continues as it does alone, by ids and by embeddings."""
    model, lengths = evaluated(version), (LENGTH, 6, 2)
    state = random_state(model, 3) if with_state else None
    prompts = [random_tokens(length, seed=row) for row, length in enumerate(lengths)]
    batch, mask = torch.full((3, LENGTH), 31), torch.zeros(3, LENGTH, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        batch[row, -prompt.shape[1] :], mask[row, -prompt.shape[1] :] = prompt[0], 1
    embeds = model.get_input_embeddings()(batch).detach()
    for inputs in ({"inputs": batch}, {"inputs_embeds": embeds}):
        with reading(model) as read:
            found = model.generate(
                **inputs,
                attention_mask=mask,
                state=state,
                **GREEDY | {"pad_token_id": 31},
                max_new_tokens=NEW,
            )
        assert read == EACH_ONCE
        for row, prompt in enumerate(prompts):
            one = None if state is None else state.rows(torch.tensor([row]))
            assert found[row, -NEW:].tolist() == recomputed(model, prompt, NEW, one)


@pytest.mark.parametrize("version", VERSIONS)
def test_without_cache(version: str) -> None:
    """``use_cache=False`` reads everything again, and gives the same."""
    model, prompt = evaluated(version), random_tokens(LENGTH)
    with reading(model) as lengths:
        found = model.generate(prompt, **GREEDY, max_new_tokens=NEW, use_cache=False)
    assert lengths == list(range(LENGTH, LENGTH + NEW))
    assert found[0, LENGTH:].tolist() == recomputed(model, prompt, NEW)


def test_prompts_longer_than_a_chunk() -> None:
    """A prompt is read in chunks of ``chunk_length``; a chunk size given to ``generate`` is not needed."""
    model, prompt = evaluated(chunk_length=4), random_tokens(LENGTH, batch=2)
    mask = torch.ones_like(prompt)
    mask[1, :5] = 0
    options = {**GREEDY, "max_new_tokens": NEW, "attention_mask": mask, "state": random_state(model, 2)}
    plain = model.generate(prompt, **options)
    with reading(model) as lengths:
        found = model.generate(prompt, **options, prefill_chunk_size=3)
    assert torch.equal(found, plain)
    assert lengths == [4, 4, 3] + [1] * (NEW - 1)


def test_an_initial_state_that_was_tuned() -> None:
    model, prompt = evaluated(), random_tokens(LENGTH)
    model.add_initial_state()
    with torch.no_grad():
        for parameter in model.model.initial_wkv:
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    found = model.generate(prompt, **GREEDY, max_new_tokens=NEW)
    assert found[0, LENGTH:].tolist() == recomputed(model, prompt, NEW)


# --- what sampling, ends and beams do ---------------------------------------------------------------------------


def test_sampled_generation_follows_the_distribution() -> None:
    """Sampling with a seed repeats, and draws the first token as often as its probability says."""
    model, prompt = evaluated(), random_tokens(7)
    options = {"max_new_tokens": 5, "do_sample": True, "top_k": 0, "eos_token_id": None}
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        draws.append(model.generate(prompt.expand(2000, -1), **options))
    assert torch.equal(draws[0], draws[1])
    with torch.no_grad():
        expected = model(prompt).logits[0, -1].softmax(-1)
    found = torch.bincount(draws[0][:, 7], minlength=32).double() / 2000
    assert (found - expected).abs().sum() / 2 < 0.08  # total variation; 0.05 is usual for 2000 draws of 32


def test_generation_stops_at_the_end_token() -> None:
    """Rows that end early are padded and leave the others alone."""
    model, prompts = evaluated(), random_tokens(7, batch=4)
    free = model.generate(prompts, max_new_tokens=12, do_sample=False, eos_token_id=None)
    end = int(free[0, 9])
    stopped = model.generate(prompts, max_new_tokens=12, do_sample=False, eos_token_id=end, pad_token_id=end)
    for row in range(4):
        new = free[row, 7:].tolist()
        expected = new[: new.index(end) + 1] if end in new else new
        assert stopped[row, 7 : 7 + len(expected)].tolist() == expected


def test_beam_search_is_not_worse_than_greedy() -> None:
    """Beams reorder the state; if that went wrong their scores would be another sequence's."""
    model, prompt = evaluated(), random_tokens(7)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}

    def score(row: torch.Tensor) -> float:
        with torch.no_grad():
            log_probabilities = model(row[None]).logits[0].log_softmax(-1)
        return sum(float(log_probabilities[t, row[t + 1]]) for t in range(6, 12))

    beams = model.generate(
        prompt, num_beams=4, return_dict_in_generate=True, output_scores=True, length_penalty=0.0, **options
    )
    assert float(beams.sequences_scores[0]) == pytest.approx(score(beams.sequences[0]), rel=1e-4)
    assert score(beams.sequences[0]) >= score(model.generate(prompt, **options)[0]) - 1e-6


# --- going on ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["state", "past_key_values", CACHE_NAME])
@pytest.mark.parametrize("as_state", [True, False])
def test_going_on_from_what_generate_returned(argument: str, as_state: bool) -> None:
    """The returned past has read all but the last token; with that one it gives the rest of the text."""
    model, prompt = evaluated(), random_tokens(LENGTH, batch=2)
    whole = model.generate(prompt, **GREEDY, max_new_tokens=2 * NEW)
    first = model.generate(prompt, **GREEDY, max_new_tokens=NEW, return_dict_in_generate=True)
    past = returned_past(first)
    expected = model(first.sequences[:, :-1]).state
    for a, b in zip(past.state.tensors(), expected.tensors(), strict=True):
        assert relative_error(a, b) < 1e-12
    with warnings.catch_warnings(), reading(model) as lengths:
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5.24 renamed past_key_values
        rest = model.generate(
            first.sequences[:, -1:],
            **GREEDY,
            max_new_tokens=NEW,
            **{argument: past.state if as_state else past},
        )
    assert torch.equal(torch.cat([first.sequences, rest[:, 1:]], dim=1), whole)
    assert lengths == [1] * NEW


def test_a_cache_is_brought_up_to_date_and_a_state_is_not() -> None:
    model, (one, two) = evaluated(), random_tokens(LENGTH).split([6, 5], dim=1)
    state = model(one).state
    before = [tensor.clone() for tensor in state.tensors()]
    cache = RwkvRevCache(state)
    model.generate(two, **GREEDY, max_new_tokens=3, **{CACHE_NAME: cache})
    model.generate(two, **GREEDY, max_new_tokens=3, state=state)
    for a, b in zip(state.tensors(), before, strict=True):
        assert torch.equal(a, b)
    expected = model.generate(torch.cat([one, two], dim=1), **GREEDY, max_new_tokens=3)[:, :-1]
    assert relative_error(cache.state.wkv, model(expected).state.wkv) < 1e-12
    held = cache.state
    model.generate(two, **GREEDY, max_new_tokens=3, use_cache=False, **{CACHE_NAME: cache})
    assert cache.state is held


def test_a_mask_that_tells_of_the_past_too() -> None:
    """Of a mask longer than the new tokens the end is theirs."""
    model = evaluated()
    text, new = random_tokens(LENGTH, batch=2), random_tokens(5, batch=2, seed=3)
    mask = torch.ones(2, LENGTH + 5, dtype=torch.int64)
    mask[1, : LENGTH + 2] = 0
    past = model(text, attention_mask=mask[:, :LENGTH]).state
    found = model.generate(new, state=past, attention_mask=mask, **GREEDY, max_new_tokens=NEW)
    assert found[0, 5:].tolist() == recomputed(model, torch.cat([text, new], dim=1)[:1], NEW)
    assert found[1, 5:].tolist() == recomputed(model, new[1:, 2:], NEW)


def test_beams_return_no_past_to_go_on_from() -> None:
    model = evaluated()
    output = model.generate(
        random_tokens(LENGTH), **GREEDY, num_beams=2, max_new_tokens=4, return_dict_in_generate=True
    )
    for name in ("state", CACHE_NAME):
        with pytest.raises(ValueError, match=r"beams as they ran.*read a returned sequence again"):
            past = {name: returned_past(output)}
            model.generate(output.sequences, **GREEDY, num_beams=2, max_new_tokens=2, **past)


def test_a_stream_gets_each_token_once() -> None:
    class Collected(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    model, streamer = evaluated(), Collected()
    found = model.generate(random_tokens(LENGTH), **GREEDY, max_new_tokens=NEW, streamer=streamer)
    assert streamer.tokens == [*found[0].tolist(), -1]


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True}, {"num_beams": 2}, {"use_cache": False}], ids=str
)
def test_generation_stops_at_strings(shallow: dict[str, Path], options: dict[str, Any]) -> None:
    """``generate`` needs a tokenizer for it, which some of its loops hand on as if it were the model's."""
    model, words = load_model(shallow["7"], "cpu", torch.float32), AutoTokenizer.from_pretrained(shallow["7"])
    prompt = words("The state of a", return_tensors="pt").input_ids
    settings = {**GREEDY, **options, "max_new_tokens": 8}
    torch.manual_seed(0)
    free = words.decode(model.generate(prompt, **settings)[0, prompt.shape[1] :])
    wanted = free[1:3]
    torch.manual_seed(0)
    stopped = model.generate(prompt, **settings, stop_strings=[wanted], tokenizer=words)
    text = words.decode(stopped[0, prompt.shape[1] :])
    assert len(wanted) == 2 and text
    if "num_beams" not in options:  # of which one that goes on may be the better one
        assert wanted in text and len(text) < len(free)


def test_hidden_states_of_every_step() -> None:
    model = evaluated()
    output = model.generate(
        random_tokens(LENGTH),
        **GREEDY,
        max_new_tokens=3,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    assert [[part.shape[1] for part in step] for step in output.hidden_states] == [
        [LENGTH] * 3,
        [1] * 3,
        [1] * 3,
    ]


# --- guidance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_classifier_free_guidance(version: str, negative: bool) -> None:
    """Both texts are read once, and weighed as the formula says: s * (log p - log q) + log q."""
    model, prompt, scale = evaluated(version), random_tokens(LENGTH, batch=2), 1.5
    other = random_tokens(7, batch=2, seed=9) if negative else prompt[:, -1:]
    row, beside = prompt, other
    for _ in range(NEW):
        with torch.no_grad():
            log_p = model(row).logits[:, -1].float().log_softmax(-1)
            log_q = model(beside).logits[:, -1].log_softmax(-1)
        token = (scale * (log_p - log_q) + log_q).argmax(-1, keepdim=True)
        row, beside = torch.cat([row, token], dim=1), torch.cat([beside, token], dim=1)
    options = {**GREEDY, "max_new_tokens": NEW, "guidance_scale": scale}
    if negative:
        options["negative_prompt_ids"] = other
    for use_cache in (True, False):
        with reading(model) as lengths:
            found = model.generate(prompt, **options, use_cache=use_cache)
        assert torch.equal(found, row)
        if use_cache:
            assert sum(lengths) == LENGTH + other.shape[1] + 2 * (NEW - 1)


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "static"}, "cache_implementation='static'.*leave the argument out"),
        ({"cache_implementation": "dynamic"}, "cache_implementation='dynamic'"),
        ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
        ({"cache_implementation": "paged"}, "continuous batching.*left-padded batch"),
        (
            {"penalty_alpha": 0.6, "top_k": 4, "do_sample": False},
            "contrastive search is not supported.*greedy",
        ),
        (
            {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
            "group beam search is not supported",
        ),
        ({"dola_layers": "low", "do_sample": False}, "dola generation is not supported"),
        ({"assistant_early_exit": 1, "do_sample": False}, "assistant_early_exit"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "no attentions"),
        ({"guidance_scale": 1.5, "num_beams": 2}, "guidance_scale.*num_beams=1"),
        ({"guidance_scale": 1.5, "prompt_lookup_num_tokens": 3}, "guidance_scale.*no assistant"),
        (
            {"attention_mask": torch.tensor([[1] * (LENGTH - 1) + [0]])},
            "last token of a prompt is masked.*pad on the left",
        ),
    ],
)
@pytest.mark.parametrize("trusting", [False, True])
def test_refusals(options: dict[str, Any], message: str, trusting: bool) -> None:
    model = evaluated()
    trust = {"trust_remote_code": True} if trusting else {}
    with pytest.raises(ValueError, match=message):
        model.generate(random_tokens(LENGTH), max_new_tokens=3, pad_token_id=0, **options, **trust)


def test_refused_starts() -> None:
    model = evaluated()
    embeds = start(model, "embeddings").arguments["inputs_embeds"]
    with pytest.raises(ValueError, match="assisted generation begins with input_ids"):
        model.generate(inputs_embeds=embeds, **GREEDY, max_new_tokens=3, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="is a DynamicCache"):
        model.generate(random_tokens(LENGTH), max_new_tokens=3, **{CACHE_NAME: DynamicCache()})
    with pytest.raises(ValueError, match="one and the same"):
        state = random_state(model, 1)
        model.generate(random_tokens(LENGTH), max_new_tokens=3, state=state, **{CACHE_NAME: state})
