"""The gradient of a weight, not multiplied yet."""

from typing import NamedTuple

import torch
from torch import Tensor


class WeightProduct(NamedTuple):
    """``gradient^T x`` of the gradient by a linear map's outputs [T, out] and its inputs [T, in]."""

    gradient: Tensor
    x: Tensor

    def add_to(self, total: Tensor | None) -> Tensor:
        """The float32 sum [out, in] with this added in place; a new one for None. The same bits either way."""
        if total is None:
            shape = self.gradient.shape[1], self.x.shape[1]
            total = torch.zeros(shape, dtype=torch.float32, device=self.x.device)
        # no method of torch offers all of these arguments
        return torch.ops.aten.addmm.dtype_out(total, self.gradient.t(), self.x, torch.float32, out=total)
