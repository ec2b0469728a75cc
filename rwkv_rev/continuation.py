"""Continue a text with a model folder: what ``rwkv-rev generate`` does."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import TextStreamer

from rwkv_rev.adapted_model import load_adapted
from rwkv_rev.arguments import checked
from rwkv_rev.converters.converted import ConvertedModel
from rwkv_rev.converters.tuned_states import read_state, refuse_other_model, set_state
from rwkv_rev.counts import MOST
from rwkv_rev.device import choose_device
from rwkv_rev.errors import ConfigError, DataError
from rwkv_rev.loading import load_tokenizer
from rwkv_rev.printable import shortened
from rwkv_rev.random_state import refuse_seed
from rwkv_rev.sampling import Sampling
from rwkv_rev.tokenization.special_tokens import refuse_special
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
    top_k: int = 0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    penalty_decay: float = 0.996,
    seed: int | None = None,
    device: str = "auto",
    stream: bool = False,
    state: str | Path | None = None,
    adapter: str | Path | None = None,
    quantise: Literal["nf4", "int8"] | None = None,
) -> str:
    """The prompt with what a converted or fine-tuned model makes of it.

    A model that is in memory already continues by its own ``generate``; this reads the folder at every call.

    Args:
        directory: a converted or fine-tuned model folder.
        prompt: text to continue, at least one token.
        max_new_tokens: most tokens to add; an end token of the model ends the text before.
        temperature: 0 takes the likeliest token; higher is more random; else at least 0.01.
        top_p: sample from the likeliest tokens of this total probability; 0.7 when None. Not at temperature 0.
        top_k: sample from so many of the likeliest tokens; 0 for all. Not at temperature 0.
        presence_penalty: taken off the logits of tokens that were said already, the prompt apart.
        frequency_penalty: the same for each time that they were said.
        penalty_decay: by which what was said counts less with each token after it (:mod:`rwkv_rev.sampling`).
        seed: makes the text repeatable.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
        stream: print each token to stdout as it is made.
        adapter: folder of a LoRA of this model, in peft's layout.
        quantise: kind of linear maps in 4 or 8 bits (:mod:`rwkv_rev.foreign.quantised`).
        state: a state file, or a folder with a tuned state, that the text begins with, whatever the folder has.

    Raises:
        SourceError, CheckpointError: if the folder is not a whole model, or the state is none of such a model.
        DataError: for a prompt without tokens, of another model's, or with a byte that is the end of text.
        ConfigError: for a value that means nothing. RwkvRevError: for a device that is not there.
    """
    choose_kernel(
        None, torch.empty(0, device="cpu")
    )  # refuses a name that the environment gives, before the prompt is printed
    if not 1 <= max_new_tokens <= MOST:
        raise ConfigError(f"max_new_tokens = {shortened(repr(max_new_tokens))} must be from 1 to {MOST}")
    refuse_seed(seed)
    sampling = Sampling(
        temperature,
        TOP_P if top_p is None else top_p,
        top_k,
        presence_penalty,
        frequency_penalty,
        penalty_decay,
    )
    refuse_without_effect(temperature, top_p, top_k)
    with ConvertedModel(directory) as source:  # refuses what is not a whole model, in one line
        vocab_size = source.config.vocab_size
        begin = None if state is None else read_state(state)
        if begin is not None:
            refuse_other_model(begin, source.config, str(directory))
    place = choose_device(device)
    tokenizer = load_tokenizer(directory)
    end = tokenizer.eos_token
    if end and not end.isprintable():  # a token that can be read, as <|im_end|>, is written on purpose
        refuse_special(prompt, {end: tokenizer.eos_token_id}, tokenizer, "the prompt")
    inputs = tokenizer(prompt, return_tensors="pt").to(place)
    if inputs["input_ids"].shape[1] == 0:
        raise DataError("the prompt holds no tokens; give at least one character")
    if (highest := int(inputs["input_ids"].max())) >= vocab_size:
        raise DataError(
            f"token id {highest} of the prompt is outside the model's vocabulary of {vocab_size}; save the model's own "
            f"tokenizer in {directory}"
        )
    dtype = torch.float32 if place.type == "cpu" else "auto"
    model = load_adapted(directory, place, dtype, quantised=quantise, adapter=adapter).eval()
    if begin is not None:
        set_state(model, begin)
    if seed is not None:
        torch.manual_seed(seed)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if stream else None
    tokens = continued(model, tokenizer, inputs["input_ids"], sampling, max_new_tokens, streamer)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def continued(
    model: Any,
    tokenizer: Any,
    prompt: Tensor,
    sampling: Sampling,
    max_new_tokens: int,
    streamer: TextStreamer | None = None,
) -> Tensor:
    """A prompt [1, T] of token ids with what a model in evaluation mode makes of it, [1, T + new]."""
    tokens: Tensor = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        use_cache=True,
        streamer=streamer,
        logits_processor=sampling.processors(tokenizer, prompt.shape[1]),
        **sampling.arguments(),
    )
    return tokens


def refuse_without_effect(temperature: float, top_p: float | None, top_k: int) -> None:
    """Raise ConfigError for what says how to draw where nothing is drawn."""
    for name, value in (("top_p", top_p), ("top_k", top_k or None)):
        if temperature == 0 and value is not None:
            raise ConfigError(
                f"{name} = {value} is without effect at temperature = 0, the likeliest token; leave one out"
            )
