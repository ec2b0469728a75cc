"""Complex weights of declared code: both parts of their gradients are summed, in the precision of losses."""

import pytest
import torch
from bptt_cases import tiny_model
from test_between_layers import LENGTH, assert_same, outcome
from torch import Tensor, nn

from rwkv_rev import RwkvRevForCausalLM, position_wise

PLACES = ("head", "model.blocks.1.time_mix.key", "model.blocks.0.channel_mix.value")


@position_wise
class Fourier(nn.Module):
    """A filter over the channels of each token, in front of a map."""

    def __init__(self, inner: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.size = inner, inner.in_features
        drawn = torch.randn(self.size // 2 + 1, dtype=dtype, generator=torch.Generator().manual_seed(0))
        self.filter = nn.Parameter(0.1 * drawn)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=self.size))


def filtered(place: str, dtype: torch.dtype) -> RwkvRevForCausalLM:
    model = tiny_model("5.2", dtype=torch.float64)
    above, _, name = place.rpartition(".")
    holder = model.get_submodule(above)
    setattr(holder, name, Fourier(getattr(holder, name), dtype))
    return model


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "own"])
@pytest.mark.parametrize("chunk", [LENGTH, 12, 7])
@pytest.mark.parametrize("strategy", ["full", "checkpoint", "reversible"])
@pytest.mark.parametrize("place", PLACES)
def test_gradient(place: str, strategy: str, chunk: int, labels: bool) -> None:
    """Against autograd's own, of a loss on the logits under ``full``."""
    found = outcome(filtered(place, torch.complex128), strategy, labels, chunk)
    expected = outcome(filtered(place, torch.complex128), "full", False, LENGTH)
    (name,) = (name for name in found if name.endswith("filter"))
    assert_same(found, expected)
    assert expected[name].imag.norm() > 0.1 * expected[name].real.norm()
