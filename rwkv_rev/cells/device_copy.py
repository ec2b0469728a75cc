"""What is known on the host brought to a device: several arrays in one transfer."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ALIGNED = 16
"""Numbers by which what is transferred at once begins: kernels are compiled anew for memory that begins elsewhere."""


def on_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays of one dtype on the device, in one transfer that does not wait for what it has to do before."""
    room = [-(-array.size // ALIGNED) * ALIGNED for array in arrays]
    joined = np.zeros(sum(room), arrays[0].dtype)
    starts = [0, *np.cumsum(room).tolist()]
    for start, array in zip(starts, arrays, strict=False):
        joined[start : start + array.size] = array.reshape(-1)
    found = torch.from_numpy(joined)
    found = found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)
    pairs = zip(starts, arrays, strict=False)
    return [found[start : start + array.size].view(array.shape) for start, array in pairs]
