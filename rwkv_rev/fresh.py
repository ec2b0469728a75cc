"""A freshly initialised model as a model folder, of any architecture that is registered: what training begins with.

Values come from the architecture's own initialisation and a seed, and are the same on every machine with the same
PyTorch. The folder appears whole or not at all, as every output.
"""

import difflib
import json
import platform
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from rwkv_rev.architectures.architecture import Architecture
from rwkv_rev.architectures.registry import architecture as find
from rwkv_rev.arguments import checked
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.converters.card import fresh_card
from rwkv_rev.converters.rewriter import Entry, shard_layout, write_shards
from rwkv_rev.errors import ConfigError
from rwkv_rev.folders.folder import RECORD_NAME, TOKENIZER_NAMES
from rwkv_rev.folders.safe_output import check_output, require_space, whole_directory
from rwkv_rev.printable import shortened
from rwkv_rev.random_state import capture, refuse_seed, restore
from rwkv_rev.version import __version__

SIZES = {"hidden_size": 128, "num_hidden_layers": 4}
"""Of a model where nobody says otherwise: trained on a CPU in minutes."""
SETTABLE = (
    *(
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "head_size",
        "intermediate_size",
    ),
    *("layer_norm_epsilon", "group_norm_epsilon", "bonus_is_exponential", "tie_word_embeddings"),
)
"""Fields of the configuration that are no architecture's own."""
EPSILONS = ("layer_norm_epsilon", "group_norm_epsilon")
HEADS = ("num_attention_heads", "head_size")
SMALLEST_HEAD = 16
"""That comes of a width alone; smaller heads hold next to nothing, and are made only for who asks for them."""
SHARD_SIZE = "5GB"
_NO_MEMORY = "alloc.*memory|out of memory|Storage size calculation overflowed"
"""What PyTorch says where a tensor cannot be made."""


@dataclass(frozen=True)
class Fresh:
    """What :func:`init` made; ``parameters`` is their number."""

    directory: Path
    config: RwkvRevConfig
    parameters: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "directory": str(self.directory),
            "architecture": self.config.rwkv_version,
            "parameters": self.parameters,
            "seed": self.seed,
            "config": self.config.to_dict(),
        }


@checked
def init(
    architecture: str,
    output: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    tokenizer: str = "byte",
    seed: int = 0,
    force: bool = False,
) -> Fresh:
    """Make a freshly initialised model folder, for training.

    Args:
        architecture: a name of :data:`~rwkv_rev.architectures.registry.ARCHITECTURES`: ``5.2``, ``linear-attention``.
        output: folder to make.
        settings: fields of the configuration, the architecture's own too; sizes follow from ``hidden_size`` where they
            are not given, the vocabulary from the tokenizer.
        tokenizer: ``byte``, ``world``, ``neox``, a folder or a Hub id.
        seed: of the values.
        force: replace an existing model folder, at the very end.

    Raises:
        ConfigError: for an architecture or a field that there is not, and values that do not fit each other or the
            machine's memory.
        SourceError, CheckpointError: for a tokenizer that cannot be read or has more tokens than the vocabulary.
        OutputError: if the folder exists without ``force`` or cannot be written.
    """
    directory, given = Path(output), dict(settings or {})
    refuse_seed(seed)
    try:
        known = find(architecture)
    except ValueError as error:
        raise ConfigError(str(error).replace("rwkv_version", "architecture")) from None
    _refuse_unknown(known, given)
    read = [] if tokenizer in TOKENIZER_NAMES else [tokenizer]
    check_output(directory.absolute(), force=force, directory=True, inputs=read)
    from rwkv_rev.tokenization.choice import choose_tokenizer

    chosen = choose_tokenizer(given.get("vocab_size", 1 << 31), override=tokenizer)
    vocabulary = max(chosen.get_vocab().values(), default=0) + 1
    config = _config(known, {"vocab_size": vocabulary} | given)
    model = _initialised(config, given, seed)
    shared = model.all_tied_weights_keys  # the head, where it is the embedding
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in shared}
    record = {
        "initialised": {"architecture": known.version, "seed": seed},
        "dtypes": dict(Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values())),
        "versions": {
            "rwkv-rev": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    entries = [Entry(name, name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    shards = shard_layout(entries, SHARD_SIZE)
    require_space(directory.parent, sum(shard.nbytes for shard in shards))
    with whole_directory(directory, force=force) as folder:
        chosen.save_pretrained(str(folder))
        config.save_pretrained(str(folder))
        _save_generation(config, folder)
        write_shards(shards, folder, lambda entry: tensors[entry.name])
        (folder / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(fresh_card(config, directory.name, record), encoding="utf-8")
    return Fresh(directory, config, sum(tensor.numel() for tensor in tensors.values()), seed)


def _refuse_unknown(known: Architecture, given: dict[str, Any]) -> None:
    without = set() if known.has_heads else set(HEADS)
    without |= set() if known.has_group_norm else {"group_norm_epsilon"}
    without |= set() if known.has_two_bonuses else {"bonus_is_exponential"}
    there = [name for name in (*SETTABLE, *known.fields) if name not in without]
    for name in given:
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(there)}"
            raise ConfigError(f"{known.called} has no field {shortened(repr(name))}; {hint}")


def _config(known: Architecture, given: dict[str, Any]) -> RwkvRevConfig:
    width = given.get("hidden_size", SIZES["hidden_size"])
    sizes: dict[str, Any] = {}
    if isinstance(width, int) and width > 0:
        sizes = known.sizes(width)
        for said, follows in (HEADS, HEADS[::-1]):
            if said in given and follows not in given:
                divisor = max(1, _whole(given[said]))
                if width % divisor:
                    raise ConfigError(f"{said} = {divisor} must divide hidden_size = {width}")
                sizes[follows] = width // divisor
        if sizes.get("head_size", SMALLEST_HEAD) < min(SMALLEST_HEAD, width) and given.keys().isdisjoint(
            HEADS
        ):
            heads, size = sizes["num_attention_heads"], sizes["head_size"]
            raise ConfigError(
                f"hidden_size = {width} would make {heads} heads of {size} numbers: use a multiple of 64 (of "
                f"{SMALLEST_HEAD} at least), or say what you want with --set head_size={size}"
            )
    floats = {*EPSILONS, *(name for name, field in known.fields.items() if field.kind is float)}
    given = {
        name: float(value) if name in floats and type(value) is int else value
        for name, value in given.items()
    }
    if sizes.get("intermediate_size") == 0 and "intermediate_size" not in given:
        raise ConfigError(
            f"hidden_size = {width} is too small for {known.called}: no channel mix comes of it; use more"
        )
    try:
        return RwkvRevConfig(
            rwkv_version=known.version,
            architectures=["RwkvRevForCausalLM"],
            dtype="float32",
            **(SIZES | sizes | given),
        )
    except (ValueError, TypeError, StrictDataclassError) as error:  # the last is of a wrong kind
        reason = " ".join(str(error.__cause__ or error).split())
        if any(reason.startswith(f"{name} = ") for name in sizes.keys() - given.keys()):
            reason += f", and follows from hidden_size = {width}"
        raise ConfigError(f"{known.called} cannot be made so: {shortened(reason, 300)}") from None


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 1  # whatever else is refused by the configuration


def _initialised(config: RwkvRevConfig, given: Mapping[str, Any], seed: int) -> Any:
    """A model by its architecture's initialisation; the caller's random numbers go on as they were.

    Raises:
        ConfigError: naming what was ``given``, where no memory holds such a model.
    """
    from rwkv_rev.modeling import RwkvRevForCausalLM

    before = capture(())
    torch.manual_seed(seed)
    try:
        return RwkvRevForCausalLM(config)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(_NO_MEMORY, str(error)):
            raise
        sizes = {name: value for name, value in given.items() if type(value) is int} or SIZES
        told = ", ".join(f"{name} = {value}" for name, value in sizes.items())
        raise ConfigError(
            f"{config.architecture.called} of {told} do not fit this machine's memory: use smaller numbers"
        ) from error
    finally:
        restore(before)


def _save_generation(config: RwkvRevConfig, folder: Path) -> None:
    from transformers import GenerationConfig

    pad = 0 if config.pad_token_id is None else config.pad_token_id
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=pad
    ).save_pretrained(str(folder))
