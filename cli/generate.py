"""``rwkv-rev generate``: continue a text, with the state carried token by token."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from rwkv_rev.cli.counts import whole
from rwkv_rev.cli.options import Adapter, Quantise
from rwkv_rev.cli.output import write
from rwkv_rev.cli.sampling import (
    Device,
    FrequencyPenalty,
    PenaltyDecay,
    PresencePenalty,
    Temperature,
    TopK,
    top_p_option,
)
from rwkv_rev.errors import DataError
from rwkv_rev.folders.folder import refuse_no_model


def generate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A converted or fine-tuned model folder.")],
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from stdin.")],
    max_new_tokens: Annotated[
        int, typer.Option(parser=whole(1), metavar="N", help="Most tokens to add.")
    ] = 128,
    temperature: Temperature = 1.0,
    top_p: Annotated[float | None, top_p_option(0.7)] = None,
    top_k: TopK = 0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    penalty_decay: PenaltyDecay = 0.996,
    seed: Annotated[
        int | None, typer.Option(parser=whole(), metavar="N", help="Makes the text repeatable.")
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A tuned state to begin with: rwkv-rev state --help.  [the folder's]"
        ),
    ] = None,
    adapter: Adapter = None,
    quantise: Quantise = None,
    stream: Annotated[bool, typer.Option(help="Print each token as it is made.")] = True,
    device: Device = "auto",
) -> None:
    r"""Continue a text with a converted model.

    The text goes to stdout, prompt included.

    Examples:

      rwkv-rev generate my-model --prompt "def main():" --max-new-tokens 64

      rwkv-rev generate my-model --prompt - --temperature 0 < text.txt

      rwkv-rev generate my-model --prompt "User: Hello" --state poet.pth

      rwkv-rev generate my-model --prompt "Once" --adapter my-lora --quantise nf4

      rwkv-rev generate my-model --prompt "Once" --top-p 0.3 \
        --presence-penalty 0.5 --frequency-penalty 0.5
    """
    refuse_no_model(directory)  # before anything heavy is imported
    from rwkv_rev.continuation import generate as continued

    text = continued(
        directory,
        _from_stdin() if prompt == "-" else prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        penalty_decay=penalty_decay,
        seed=seed,
        device=device,
        stream=stream,
        state=state,
        adapter=adapter,
        quantise=quantise,
    )
    if not stream:
        write(text + "\n")  # as it is: this is the model's own


def _from_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise DataError(
            f"the prompt on stdin is no text in {error.encoding}: its byte {error.start} is none"
        ) from None
