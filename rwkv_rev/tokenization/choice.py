"""Which tokenizer belongs to a checkpoint: told by the size of its vocabulary, or by the user.

| vocabulary | tokenizer | source |
|---|---|---|
| 256 | byte | none needed |
| 65530 to 65536 | world | the vocabulary file of ``pyrwkv_tokenizer`` |
| 50254 to 50432 | GPT-NeoX | the source's own ``tokenizer.json``, else ``EleutherAI/gpt-neox-20b`` |

GPT-NeoX models were trained with tables of 50277 rows, some padded to a multiple of a power of two.
"""

from pathlib import Path

from huggingface_hub import hf_hub_download
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rwkv_rev.errors import CheckpointError, SourceError
from rwkv_rev.folders.safe_input import refuse_special
from rwkv_rev.tokenization.byte_level import RwkvByteTokenizer
from rwkv_rev.tokenization.world import RwkvWorldTokenizer

NEOX_REPOSITORY = "EleutherAI/gpt-neox-20b"
NEOX_FILES = ("tokenizer.json", "20B_tokenizer.json")
CHOICES = "--tokenizer world|byte|neox|PATH|HUB_ID"


def name_for_vocabulary(vocab_size: int) -> str:
    """``byte``, ``neox`` or ``world`` for a model with that many rows in its embedding.

    Raises:
        CheckpointError: for any other size.
    """
    if vocab_size == 256:
        return "byte"
    if 50254 <= vocab_size <= 50432:
        return "neox"
    if 65530 <= vocab_size <= 65536:
        return "world"
    raise CheckpointError(
        f"a vocabulary of {vocab_size} belongs to no known tokenizer "
        f"(byte 256, neox 50254 to 50432, world 65536): name one with {CHOICES}"
    )


def choose_tokenizer(
    vocab_size: int, *, override: str | Path | None = None, source_directory: str | Path | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        vocab_size: V, rows of the model's embedding.
        override: ``world``, ``byte``, ``neox``, a directory, a ``tokenizer.json``, a world vocabulary
            ``.txt`` or a Hub id (a path of that name on the disk wins); by the vocabulary size when None.
        source_directory: where the checkpoint came from; its ``tokenizer.json`` is used for ``neox``.

    Raises:
        CheckpointError: unknown vocabulary size, or a tokenizer with ids the model has no rows for.
        SourceError: a tokenizer that cannot be found, read or downloaded.
    """
    name = str(override) if override is not None else name_for_vocabulary(vocab_size)
    if name == "byte":
        tokenizer: PreTrainedTokenizerBase = RwkvByteTokenizer()
    elif name == "world":
        tokenizer = RwkvWorldTokenizer()
    elif name == "neox":
        tokenizer = load_neox(source_directory)
    else:
        tokenizer = load_named(name)
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= vocab_size:
        raise CheckpointError(
            f"the {name} tokenizer has ids up to {highest} but the model only {vocab_size} rows: "
            f"choose another with {CHOICES}"
        )
    return tokenizer


def load_neox(source_directory: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The GPT-NeoX tokenizer: the source's own file, else the Hub's.

    Raises:
        SourceError: when it is in neither place, or unreadable.
    """
    for file in NEOX_FILES if source_directory is not None else ():
        if (path := Path(source_directory or "") / file).is_file():
            return read_tokenizer_json(path)
    try:
        path = Path(hf_hub_download(NEOX_REPOSITORY, "tokenizer.json"))
    except (OSError, ValueError) as error:  # the client's errors derive from these, offline mode included
        raise SourceError(
            f"cannot download the GPT-NeoX tokenizer from {NEOX_REPOSITORY} ({type(error).__name__}): "
            "give its tokenizer.json, or a directory that holds one, with --tokenizer PATH"
        ) from error
    return read_tokenizer_json(path)


def read_tokenizer_json(path: Path) -> PreTrainedTokenizerBase:
    """A fast tokenizer from one ``tokenizer.json``, with GPT-NeoX's special tokens where it has them.

    Raises:
        SourceError: when the file is not one.
    """
    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), padding_side="left")
    except Exception as error:  # the Rust reader raises bare Exception
        raise SourceError(f"{path} is not a readable tokenizer.json: name another with {CHOICES}") from error
    vocabulary = tokenizer.get_vocab()
    if "<|endoftext|>" in vocabulary:
        tokenizer.bos_token = tokenizer.eos_token = "<|endoftext|>"
        # Not the end of text where there is a choice: collators drop the loss of whatever pads.
        tokenizer.pad_token = "<|padding|>" if "<|padding|>" in vocabulary else "<|endoftext|>"
    return tokenizer


def load_named(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer from a path or a Hub id.

    Raises:
        SourceError: when it cannot be found or read.
    """
    path = Path(name)
    refuse_special(path)
    if path.is_file():
        return RwkvWorldTokenizer(path) if path.suffix == ".txt" else read_tokenizer_json(path)
    if path.is_dir() and not (path / "tokenizer_config.json").is_file():
        for file in NEOX_FILES:
            if (path / file).is_file():
                return read_tokenizer_json(path / file)
    from rwkv_rev.loading import load_tokenizer  # brings torch, which processes that tokenise need not import

    return load_tokenizer(name)
