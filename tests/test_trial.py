"""A kernel's trial before its first use; here chunked recurrences stand for kernels, right ones and wrong ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rwkv_rev.wkv import KernelError, chunked_wkv5, chunked_wkv6, chunked_wkv7, dispatch, trial

KERNELS = {"wkv5": chunked_wkv5.wkv5, "wkv6": chunked_wkv6.wkv6, "wkv7": chunked_wkv7.wkv7}
DTYPES = {"wkv5": 6, "wkv6": 6, "wkv7": 7}


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_found", {})


def arguments(function: str, dtype: torch.dtype, masked: bool) -> list[Tensor | None]:
    given = trial.drawn(
        function, 16, [dtype] * 3 + [torch.float32] * (DTYPES[function] - 3), torch.device("cpu")
    )
    return [*given, torch.ones(1, trial.TOKENS, dtype=torch.bool) if masked else None]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", KERNELS)
def test_right_kernels_pass(function: str, dtype: torch.dtype, masked: bool) -> None:
    with torch.inference_mode():
        assert trial.wrong(function, KERNELS[function], arguments(function, dtype, masked)) == ""
    assert len(trial._found) == 1


def test_inputs_of_several_dtypes_are_held_to_the_coarsest() -> None:
    """Under autocast RWKV-7's keys and values are float32, its receptances bfloat16, and so is their gradient."""
    dtypes = [torch.bfloat16, *[torch.float32] * 6]
    given = trial.drawn("wkv7", 16, dtypes, torch.device("cpu"))
    assert trial.wrong("wkv7", KERNELS["wkv7"], [*given, None]) == ""


class _Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 1.2


def spoilt(how: str, function: str) -> Callable[..., Any]:
    """A kernel with one fault."""

    def kernel(*given: Tensor) -> Any:
        inputs = list(given)
        if how == "gradient":
            inputs[2] = _Wrong.apply(inputs[2])
        elif how == "mask" and inputs[-1] is not None:
            inputs[-1] = torch.ones_like(inputs[-1])
        out, *rest = KERNELS[function](*inputs)
        if how == "last token":
            out = torch.cat([out[:, :-1], torch.full_like(out[:, -1:], torch.nan)], 1)
        return (out, *rest)

    return kernel


@pytest.mark.parametrize("how", ["gradient", "mask", "last token"])
@pytest.mark.parametrize("function", KERNELS)
def test_wrong_kernels_are_refused_by_name(function: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "off by" in trial.wrong(function, spoilt(how, function), arguments(function, torch.bfloat16, True))
    module = type("Module", (), {function: staticmethod(spoilt(how, function))})
    monkeypatch.setattr(dispatch, "choose_kernel", lambda kernel, key: "triton")
    monkeypatch.setattr(dispatch.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(trial, "_found", {})
    with pytest.raises(KernelError, match=f"Triton kernel of {function} .*RWKV_REV_KERNEL=chunked"):
        dispatch.run_kernel(function, None, *arguments(function, torch.float32, True))
