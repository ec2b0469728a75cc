"""What a checkpoint belongs to, so that a run is never resumed with another model, other data or other settings."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rwkv_rev.architectures.registry import architecture
from rwkv_rev.errors import CheckpointError
from rwkv_rev.training.batches import UNSAID
from rwkv_rev.training.checkpoints import RUN_NAME

_ANEW = "begin anew, without what is there: --force, no --resume"
_FIRST = ("tune", "model", "data")
_ELSE = {
    "model": "the model was another one",
    "data": "the text, the tokenizer or how it is cut was another",
}
_UNSAID = {"bptt": "exact", **UNSAID}
WHOLE_BYTES = 1 << 30
BLOCK_BYTES = 1 << 16


def model_fingerprint(directory: Path) -> str:
    """SHA-256 over every weight file, and the architecture.

    Of files of more than :data:`WHOLE_BYTES` only the size, the header and the first :data:`BLOCK_BYTES` of each tensor
    are read, so that a start takes no minute.
    """
    digest = hashlib.sha256()
    config = json.loads((directory / "config.json").read_text("utf-8"))
    own = architecture(config.get("rwkv_version", "5.2")).fields
    general = ("rwkv_version", "hidden_size", "num_hidden_layers", "vocab_size")
    for name in (*general, "layer_norm_epsilon", "group_norm_epsilon", *own):
        digest.update(f"{name}={config.get(name)}\n".encode())
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as file:
            for begin, length in [(0, size)] if size <= WHOLE_BYTES else _begins(file):
                file.seek(begin)
                while length > 0 and (block := file.read(min(length, 1 << 20))):
                    digest.update(block)
                    length -= len(block)
    return digest.hexdigest()


def _begins(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Offset and length in bytes of the header of a safetensors file, and of the beginning of each of its tensors."""
    header = 8 + int.from_bytes(file.read(8), "little")
    yield 0, header
    file.seek(8)
    for name, tensor in sorted(json.loads(file.read(header - 8)).items()):
        if name != "__metadata__":
            begin, end = tensor["data_offsets"]
            yield header + begin, min(end - begin, BLOCK_BYTES)


def refuse_other_run(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Raise CheckpointError unless ``checkpoint`` belongs to a run of this identity."""
    try:
        saved = json.loads((checkpoint / RUN_NAME).read_text("utf-8"))["identity"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{checkpoint} is not a whole checkpoint of a fine-tuning run") from error
    if differ := differences(saved, identity):
        back = "set it back" if len(differ) == 1 else "set them back"
        raise CheckpointError(f"{checkpoint} cannot be resumed: {', '.join(differ)}; {back}, or {_ANEW}")


def differences(saved: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """What an identity has otherwise than a saved one, in words: ``lr was 0.1 and is now 0.2``."""
    there, mine = _flat(saved), _flat(identity)
    found = []
    for name in sorted(set(there) | set(mine), key=lambda name: (name not in _FIRST, name)):
        leads = "tune" if name.startswith("lora_") else "bptt" if name == "chunk_length" else None
        if leads is not None and there.get(leads) != mine.get(leads):
            continue  # comes and goes with the setting that is named already
        was, now = (values.get(name, _UNSAID.get(name)) for values in (there, mine))
        if was != now:
            found.append(_ELSE.get(name, f"{name} was {was} and is now {now}"))
    return found


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in identity.items() if k != "order"} | dict(identity.get("order", {}))
