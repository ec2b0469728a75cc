"""The state as a cache: what ``forward`` takes and gives, and going back."""

import pytest
import torch
from bptt_cases import random_state, random_tokens, relative_error
from generation_cases import LENGTH, evaluated, returned_past
from transformers import DynamicCache

from rwkv_rev import RwkvRevState
from rwkv_rev.cache import CACHE_NAME, RwkvRevCache


def test_forward_gives_a_cache_when_asked() -> None:
    model, tokens = evaluated(), random_tokens(LENGTH)
    assert returned_past(model(tokens)).state is not None
    assert returned_past(model(tokens, use_cache=True)).get_seq_length() == LENGTH
    quiet = model(tokens, use_cache=False)
    assert CACHE_NAME not in quiet
    assert isinstance(quiet.state, RwkvRevState)
    assert CACHE_NAME not in model(tokens, labels=tokens)
    assert CACHE_NAME not in model.train()(tokens)


@pytest.mark.parametrize("argument", ["state", "past_key_values", "cache"])
def test_forward_takes_the_past_by_any_name(argument: str) -> None:
    model, (one, two) = evaluated(), random_tokens(LENGTH).split([6, 5], dim=1)
    expected = model(torch.cat([one, two], dim=1)).logits[:, 6:]
    loss = model(two, labels=two, state=model(one).state).loss
    for as_state in (True, False):
        past = model(one).state if as_state else returned_past(model(one))
        assert torch.equal(model(two, labels=two, **{argument: past}).loss, loss)
        assert torch.equal(
            model.model(two, **{argument: model(one).state}).state.wkv,
            model(two, state=model(one).state).state.wkv,
        )
        assert relative_error(model(two, **{argument: past}).logits, expected) < 1e-12


@pytest.mark.parametrize("argument", ["state", "past_key_values", "cache"])
def test_a_past_that_is_not_ours(argument: str) -> None:
    model, tokens = evaluated(), random_tokens(LENGTH)
    for past in (DynamicCache(), (torch.zeros(1),)):
        for call in (model, model.model, lambda ids, **past: model(ids, labels=ids, **past)):
            with pytest.raises(ValueError, match=f"{argument} is a .*past is its state.*prompt tuning"):
                call(tokens, **{argument: past})
    state = random_state(model, 1)
    with pytest.raises(ValueError, match="one and the same"):
        model(tokens, state=state, past_key_values=state)


def test_states_and_masks_that_do_not_fit() -> None:
    model, tokens = evaluated(), random_tokens(LENGTH, batch=2)
    holes = torch.ones(2, LENGTH, dtype=torch.int64)
    holes[0, 0] = 0
    for mask in (holes[:, :-1], holes[:, None, None]):
        with pytest.raises(ValueError, match=r"attention_mask has shape.*at least 11"):
            model(tokens, attention_mask=mask)
        with pytest.raises(ValueError, match="attention_mask"):
            model.generate(tokens, attention_mask=mask, state=random_state(model, 2), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"attention_mask has shape \[1, 11\]; it must be \[2, T\]"):
        model(tokens, attention_mask=holes[:1])
    with pytest.raises(ValueError, match="3 layers, the model has 2"):
        model(tokens, state=random_state(evaluated(num_hidden_layers=3), 2))
    with pytest.raises(ValueError, match="3 rows, the input has 2"):
        model.generate(tokens, state=random_state(model, 3), max_new_tokens=2)


def test_crop() -> None:
    """A recording cache goes back by any number of tokens, over pieces and into them, padding or not."""
    model, tokens = evaluated(), random_tokens(12, batch=2)
    mask = torch.ones_like(tokens)
    mask[1, [0, 4, 9]] = 0
    for remove in range(13):
        cache = RwkvRevCache()
        cache.activate_past_recording()
        for start_, stop in ((0, 5), (5, 6), (6, 12)):
            model(tokens[:, start_:stop], attention_mask=mask[:, start_:stop], cache=cache, use_cache=True)
        cache.crop(-remove)
        left = 12 - remove
        assert cache.get_seq_length() == left
        if left:
            expected = model(tokens[:, :left], attention_mask=mask[:, :left]).state
            for a, b in zip(cache.state.tensors(), expected.tensors(), strict=True):
                assert relative_error(a, b) < 1e-12
        with pytest.raises(RuntimeError, match="cannot forget 1 tokens that were not recorded"):
            cache.crop(-1)
    for remove in (-1, 1):
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            RwkvRevCache(random_state(model, 1)).crop(remove)


@pytest.mark.parametrize("length", [3, 11])
@pytest.mark.parametrize("kind", ["evaluation", "training", "config.use_cache=False", "with a gradient"])
def test_a_cache_that_is_handed_over_is_brought_up_to_date(kind: str, length: int) -> None:
    """Whatever makes one by default: only ``use_cache=False`` says that it is not."""
    model, tokens = evaluated(), random_tokens(LENGTH)
    model.train(kind in ("training", "with a gradient"))
    if kind == "config.use_cache=False":
        model.config.use_cache = False
    expected = model(tokens).logits
    for base in (False, True):
        reader, name = (model.model, "last_hidden_state") if base else (model, "logits")
        expected, cache = reader(tokens)[name], RwkvRevCache()
        with torch.set_grad_enabled(kind == "with a gradient"):
            read = [reader(part, past_key_values=cache)[name] for part in tokens.split(length, dim=1)]
        assert cache.get_seq_length() == LENGTH
        assert relative_error(torch.cat(read, dim=1), expected) < 1e-12
    cache = RwkvRevCache()
    model(tokens, past_key_values=cache, use_cache=False)
    assert cache.state is None
