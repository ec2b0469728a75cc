"""``rwkv-rev generate``: continue a text, with the state carried token by token."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rwkv_rev.cli import output as out
from rwkv_rev.converters.folder import refuse_no_model

if TYPE_CHECKING:
    import torch


def generate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A converted or fine-tuned model folder.")],
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from stdin.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; higher is more random.")
    ] = 1.0,
    top_p: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this total probability."),
    ] = 0.7,
    seed: Annotated[int | None, typer.Option(help="Makes the text repeatable.")] = None,
    stream: Annotated[bool, typer.Option(help="Print each token as it is made.")] = True,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")
    ] = "auto",
) -> None:
    """Continue a text with a converted model.

    The text goes to stdout, prompt included.

    Examples:

      rwkv-rev generate my-model --prompt "def main():" --max-new-tokens 64

      rwkv-rev generate my-model --prompt - --temperature 0 < text.txt
    """
    refuse_no_model(directory)  # before anything heavy is imported
    import torch
    from transformers import AutoTokenizer, TextStreamer

    import rwkv_rev  # registers the Auto classes  # noqa: F401
    from rwkv_rev.converters.converted import ConvertedModel
    from rwkv_rev.errors import DataError
    from rwkv_rev.modeling import RwkvRevForCausalLM

    with ConvertedModel(directory):
        pass  # refuses what is not a whole model, in one line
    text = sys.stdin.read() if prompt == "-" else prompt
    place = _device(device)
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    dtype = torch.float32 if place.type == "cpu" else "auto"
    model: Any = RwkvRevForCausalLM.from_pretrained(str(directory), dtype=dtype)
    model.to(place).eval()
    inputs = tokenizer(text, return_tensors="pt").to(place)
    if inputs["input_ids"].shape[1] == 0:
        raise DataError("the prompt holds no tokens; give at least one character")
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
    if not stream:
        out.print_text(str(tokenizer.decode(tokens[0], skip_special_tokens=True)))


def _device(name: str) -> "torch.device":
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"{name} is no device of this machine; use --device cpu") from error
    return device
