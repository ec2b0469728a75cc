"""The state of one text as a file: its tensors in safetensors, by their names.

Read back into a model of the same sizes only. Activations (token shifts) take the model's dtype; memories stay as they
are.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rwkv_rev.errors import CheckpointError, OutputError, SourceError
from rwkv_rev.folders.safe_input import refuse_special
from rwkv_rev.folders.safe_output import whole_file
from rwkv_rev.state import ModelState

KIND = "rwkv-rev state"


def save_state(state: ModelState, path: str | Path) -> None:
    """Write a state of one row; the file appears whole or not at all.

    Raises:
        OutputError: if there is a file already, or it cannot be written.
    """
    path = Path(path).expanduser()
    if path.exists():
        raise OutputError(f"{path} is there already; name another file")
    tensors = {name: getattr(state, name).detach().cpu().contiguous() for name in state.names()}
    with whole_file(path) as file:
        save_file(tensors, file, metadata={"format": "pt", "kind": KIND})


def load_state(path: str | Path, model: Any) -> ModelState:
    """The state in a file, for a model that it fits, on its device.

    Raises:
        SourceError: if the file cannot be read. CheckpointError: if it is no state, or one of another shape.
    """
    path = Path(path).expanduser()
    refuse_special(path)
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise SourceError(f"{path} cannot be read as a state: {' '.join(str(error).split())}") from error
    weight = next(model.parameters())
    empty = ModelState.empty(model.config, 1, weight.device, weight.dtype)
    if set(found) != set(empty.names()):
        raise CheckpointError(
            f"{path} is no state of this model: it holds {', '.join(sorted(found)[:8]) or 'nothing'}, "
            f"and this model's state is {', '.join(empty.names())}"
        )
    for name in empty.names():
        tensor, wanted = found[name], getattr(empty, name)
        if tensor.shape != wanted.shape:
            raise CheckpointError(
                f"{path} is the state of another model: its {name} is {_sizes(tensor)}, this model's {_sizes(wanted)}"
            )
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path} is damaged: its {name} holds what is no finite number")
    return type(empty)(*(found[name].to(getattr(empty, name)) for name in empty.names()))


def _sizes(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape))
