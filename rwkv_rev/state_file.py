"""The state of one text as a file: its tensors in safetensors, by their names.

Its metadata say which architecture it is of, how many layers and how wide, and hold a SHA-256 of all that and of every
tensor's name, type, shape and bytes. Read back into a model of the same architecture and sizes only. Activations (token
shifts) take the model's dtype; memories stay as they are.

Limit: the state of another model of the same architecture and sizes is not told apart.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rwkv_rev.architectures.registry import architecture
from rwkv_rev.errors import CheckpointError, OutputError, RwkvRevError, SourceError
from rwkv_rev.folders.safe_input import refuse_special
from rwkv_rev.folders.safe_output import whole_file
from rwkv_rev.folders.selection import some
from rwkv_rev.printable import shortened
from rwkv_rev.state import ModelState

KIND = "rwkv-rev state"
_VERSION, _CHECKSUM = "rwkv_version", "sha256"
_TUNED = (
    "is a tuned initial state and no conversation's: begin with it by rwkv-rev generate --state FILE, or put it into a "
    "model by rwkv-rev state load, and chat with that"
)


def save_state(state: ModelState, path: str | Path, config: Any) -> None:
    """Write a state of one row; the file appears whole or not at all. ``config`` is the model's.

    Raises:
        OutputError: if there is a file already, or it cannot be written.
    """
    path = Path(path).expanduser()
    if path.exists():
        raise OutputError(f"{path} is there already; name another file")
    tensors = {name: getattr(state, name).detach().cpu().contiguous() for name in state.names()}
    told = {
        "format": "pt",
        "kind": KIND,
        _VERSION: config.rwkv_version,
        "layers": str(config.num_hidden_layers),
        "hidden_size": str(config.hidden_size),
    }
    with whole_file(path) as file:
        save_file(tensors, file, metadata=told | {_CHECKSUM: _checksum(told, tensors)})


def load_state(path: str | Path, model: Any) -> ModelState:
    """The state in a file, for a model that it fits, on its device.

    Raises:
        SourceError: if the file cannot be read.
        CheckpointError: if it is no state, damaged, or one of another architecture or shape.
    """
    path = Path(path).expanduser()
    refuse_special(path)
    if path.is_dir():
        raise SourceError(f"{path} is a folder; give a file that /save wrote")
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    told, found = _read(path)
    weight = next(model.parameters())
    empty = ModelState.empty(model.config, 1, weight.device, weight.dtype)
    _refuse_other(path, told, found, model.config.rwkv_version)
    if set(found) != set(empty.names()):
        raise CheckpointError(
            f"{path} is no state of this model: it holds {', '.join(sorted(found)[:8]) or 'nothing'}, "
            f"and this model's state is {', '.join(empty.names())}"
        )
    converted = []
    for name in empty.names():
        tensor, wanted = found[name], getattr(empty, name)
        if tensor.shape != wanted.shape:
            raise CheckpointError(
                f"{path} is the state of another model: its {name} is {_sizes(tensor)}, this model's {_sizes(wanted)}"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{path}: its {name} is of {_name(tensor.dtype)}, and a state's numbers are floating-point"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path} is damaged: its {name} holds what is no finite number")
        converted.append(tensor.to(wanted))
        if not bool(torch.isfinite(converted[-1]).all()):
            raise CheckpointError(f"{path}: its {name} holds numbers beyond {_name(wanted.dtype)}")
    return type(empty)(*converted)


def _read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return dict(file.metadata() or {}), tensors
    except (OSError, SafetensorError) as error:
        raise _unreadable(path) from error


def _unreadable(path: Path) -> RwkvRevError:
    """What a file is that safetensors does not read."""
    from rwkv_rev.converters.tuned_states import read_state

    try:
        with path.open("rb") as file:
            begins = file.read(1)
    except OSError as error:
        return SourceError(f"{path} cannot be read: {error.strerror or error}")
    if not begins:
        return CheckpointError(f"{path} is empty; give a file that /save wrote")
    try:
        read_state(path)
    except RwkvRevError:
        return CheckpointError(
            f"{path} is no conversation that /save wrote, or one that is cut off or damaged"
        )
    return CheckpointError(f"{path} {_TUNED}")


def _refuse_other(
    path: Path, told: Mapping[str, str], found: Mapping[str, torch.Tensor], version: str
) -> None:
    """Refuse what is no state, one of another architecture, and one that is not as it was written."""
    if told.get("kind") != KIND:
        if any(name.endswith(".time_state") for name in found):
            raise CheckpointError(f"{path} {_TUNED}")
        raise CheckpointError(
            f"{path} is no conversation that /save wrote: it holds {some(sorted(found), 1) if found else 'nothing'}"
        )
    for name, what in ((_VERSION, "which architecture it is of"), (_CHECKSUM, "its checksum")):
        if name not in told:
            raise CheckpointError(
                f"{path} does not say {what} ({name}), so nothing tells whether this model can go on from it; "
                "have the conversation again and /save it with this version"
            )
    if _checksum(told, found) != told[_CHECKSUM]:
        raise CheckpointError(
            f"{path} is damaged: its tensors or their description are not those that /save wrote (SHA-256)"
        )
    if told[_VERSION] != version:
        of, own = (_called(each) for each in (told[_VERSION], version))
        raise CheckpointError(f"{path} is a conversation's state of {of}, and this model is of {own}")


def _checksum(told: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of metadata and tensors, in the order of their names."""
    digest = hashlib.sha256(repr(sorted((k, v) for k, v in told.items() if k != _CHECKSUM)).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, _name(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _called(version: str) -> str:
    try:
        return architecture(version).called
    except ValueError:
        return shortened(repr(version))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sizes(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape))
