"""Write tensors as ``torch.save`` does: one ``.pth``, whole or not at all."""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch

from rwkv_rev.folders.safe_output import whole_file


def write_torch(
    state: Mapping[str, torch.Tensor],
    output: Path,
    *,
    force: bool,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a dictionary of tensors.

    Args:
        state: contiguous tensors by name.
        output: the file to make.
        force: replace an existing file.
        metadata: texts for readers of ours, where ``state_dict()`` of PyTorch has its own: as ``_metadata`` of the
            dictionary, whose keys stay names of tensors alone.

    Raises:
        OutputError: if ``output`` exists without ``force``, or cannot be written.
    """
    saved = OrderedDict(state) if metadata else dict(state)
    if metadata:
        vars(saved)["_metadata"] = dict(metadata)
    # a file of Python's: torch's own tells of a full disk as of any other error
    with whole_file(output, force=force) as path, path.open("wb") as file:
        try:
            torch.save(saved, file)
        except RuntimeError as error:
            if error.__context__ is None:
                raise
            raise error.__context__ from None  # what broke the archive, a full disk or Ctrl-C; its end only failed too
