"""Which device a name means, by one rule for everything that takes one."""

import torch

from rwkv_rev.errors import RwkvRevError


def named_device(name: str) -> torch.device:
    """The device of a name, whether or not this machine has it; ``auto`` is a GPU if there is one, else the CPU.

    Raises:
        RwkvRevError: for a name that PyTorch does not know or takes for another's (``cuda:256`` for the first GPU), for
            any CPU but the first, and for ``meta``, which holds no values.
    """
    if name == "auto":
        name = "cuda" if is_here(torch.device("cuda")) else "cpu"
    try:
        device = torch.device(name)
        if str(device) != name or device.type == "meta" or (device.type == "cpu" and device.index):
            raise RuntimeError
    except RuntimeError as error:
        raise RwkvRevError(f"device = {name!r} is not known; use auto, cpu, cuda or cuda:1") from error
    return device


def choose_device(name: str) -> torch.device:
    """As :func:`named_device`, for something to be computed here.

    Raises:
        RwkvRevError: for a device that is not there, too.
    """
    device = named_device(name)
    if not is_here(device):
        seen = (
            f"{(n := _gpus()) or 'no'} GPU{'s' if n > 1 else ''}"
            if device.type == "cuda"
            else "no such device"
        )
        raise RwkvRevError(f"device = {name}, but PyTorch sees {seen} here; use device = cpu")
    return device


def is_here(device: torch.device) -> bool:
    """Whether PyTorch can compute on it on this machine."""
    if device.type == "cuda":  # nothing is put on a GPU, where each process that did would keep memory
        return (device.index or 0) < _gpus()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError):
        return False
    return True


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
