"""Values that are needed on the host later, fetched without making the device wait now."""

from collections.abc import Callable

import torch
from torch import Tensor


def start_copy(tensor: Tensor) -> Callable[[], Tensor]:
    """Start copying to the host; the returned function gives the copy, waiting for it alone."""
    if tensor.device.type != "cuda":
        return lambda: tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))

    def wait() -> Tensor:
        event.synchronize()
        return copy

    return wait
