"""Continue a text with a model folder: what ``rwkv-rev generate`` does."""

from pathlib import Path

import torch
from transformers import TextStreamer

from rwkv_rev.converters.converted import ConvertedModel
from rwkv_rev.errors import DataError, RwkvRevError
from rwkv_rev.loading import load_model, load_tokenizer


def generate(
    directory: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 0.7,
    seed: int | None = None,
    device: str = "auto",
    stream: bool = False,
) -> str:
    """The prompt with what a converted or fine-tuned model makes of it.

    A model that is in memory already continues by its own ``generate``; this reads the folder at every call.

    Args:
        prompt: text to continue, at least one token.
        max_new_tokens: most tokens to add; an end token of the model ends the text before.
        temperature: 0 takes the likeliest token; higher is more random.
        top_p: sample from the likeliest tokens of this total probability.
        seed: makes the text repeatable.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
        stream: print each token to stdout as it is made.

    Raises:
        SourceError, CheckpointError: if the folder is not a whole model. DataError: for a prompt without tokens.
        RwkvRevError: for a device that is not there.
    """
    with ConvertedModel(directory):
        pass  # refuses what is not a whole model, in one line
    place = _device(device)
    tokenizer = load_tokenizer(directory)
    inputs = tokenizer(prompt, return_tensors="pt").to(place)
    if inputs["input_ids"].shape[1] == 0:
        raise DataError("the prompt holds no tokens; give at least one character")
    dtype = torch.float32 if place.type == "cpu" else "auto"
    model = load_model(directory, dtype)
    model.to(place).eval()
    if seed is not None:
        torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    tokens = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True) if stream else None,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RwkvRevError(f"{name} is no device of this machine; use cpu") from error
    return device
