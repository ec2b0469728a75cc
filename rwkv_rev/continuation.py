"""Continue a text with a model folder: what ``rwkv-rev generate`` does."""

import math
from pathlib import Path

import torch
from transformers import TextStreamer

from rwkv_rev.arguments import checked
from rwkv_rev.converters.converted import ConvertedModel
from rwkv_rev.converters.tuned_states import read_state, refuse_other_model, set_state
from rwkv_rev.counts import MOST
from rwkv_rev.device import choose_device
from rwkv_rev.errors import ConfigError, DataError
from rwkv_rev.loading import load_model, load_tokenizer
from rwkv_rev.printable import shortened
from rwkv_rev.wkv.dispatch import choose_kernel

TOP_P = 0.7


@checked
def generate(
    directory: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float | None = None,
    seed: int | None = None,
    device: str = "auto",
    stream: bool = False,
    state: str | Path | None = None,
) -> str:
    """The prompt with what a converted or fine-tuned model makes of it.

    A model that is in memory already continues by its own ``generate``; this reads the folder at every call.

    Args:
        directory: a converted or fine-tuned model folder.
        prompt: text to continue, at least one token.
        max_new_tokens: most tokens to add; an end token of the model ends the text before.
        temperature: 0 takes the likeliest token; higher is more random; else at least 0.01.
        top_p: sample from the likeliest tokens of this total probability; 0.7 when None. Not at temperature 0.
        seed: makes the text repeatable.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
        stream: print each token to stdout as it is made.
        state: a state file, or a folder with a tuned state, that the text begins with, whatever the folder has.

    Raises:
        SourceError, CheckpointError: if the folder is not a whole model, or the state is none of such a model.
        DataError: for a prompt without tokens, or of another model's.
        ConfigError: for a value that means nothing. RwkvRevError: for a device that is not there.
    """
    choose_kernel(
        None, torch.empty(0)
    )  # refuses a name that the environment gives, before the prompt is printed
    _check(max_new_tokens, temperature, top_p, seed)
    with ConvertedModel(directory) as source:  # refuses what is not a whole model, in one line
        vocab_size = source.config.vocab_size
        begin = None if state is None else read_state(state)
        if begin is not None:
            refuse_other_model(begin, source.config, str(directory))
    place = choose_device(device)
    tokenizer = load_tokenizer(directory)
    inputs = tokenizer(prompt, return_tensors="pt").to(place)
    if inputs["input_ids"].shape[1] == 0:
        raise DataError("the prompt holds no tokens; give at least one character")
    if (highest := int(inputs["input_ids"].max())) >= vocab_size:
        raise DataError(
            f"token id {highest} of the prompt is outside the model's vocabulary of {vocab_size}; save the model's own "
            f"tokenizer in {directory}"
        )
    dtype = torch.float32 if place.type == "cpu" else "auto"
    model = load_model(directory, place, dtype).eval()
    if begin is not None:
        set_state(model, begin)
    if seed is not None:
        torch.manual_seed(seed)
    sampling = {
        "do_sample": True,
        "temperature": float(temperature),
        "top_p": TOP_P if top_p is None else top_p,
        "top_k": 0,
    }
    tokens = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True) if stream else None,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def _check(max_new_tokens: int, temperature: float, top_p: float | None, seed: int | None) -> None:
    for name, value, right, wanted in (
        ("max_new_tokens", max_new_tokens, 1 <= max_new_tokens <= MOST, f"from 1 to {MOST}"),
        (
            "temperature",
            temperature,
            temperature == 0 or 0.01 <= temperature < math.inf,
            "0, or a finite number of at least 0.01",
        ),
        ("top_p", top_p, top_p is None or 0 <= top_p <= 1, "from 0 to 1"),
        ("seed", seed, seed is None or 0 <= seed < 2**63, "from 0 to 2**63 - 1"),
    ):
        if not right:
            raise ConfigError(f"{name} = {shortened(repr(value))} must be {wanted}")
    if temperature == 0 and top_p is not None:
        raise ConfigError(
            f"top_p = {top_p} is without effect at temperature = 0, the likeliest token; leave one out"
        )
