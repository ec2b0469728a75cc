"""What is declared position-wise is the object itself: nothing that took over its attributes, or shares its code."""

import copy
import functools
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rwkv_rev import position_wise
from rwkv_rev.foreign.declared_code import is_declared


def hook(module: Any, given: Any, output: Tensor) -> Tensor:
    return 2 * output


class Timed:
    """A decorator as a class, as profilers have them."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner = inner
        functools.update_wrapper(self, inner)

    def __call__(self, *given: Any) -> Any:
        return self.inner(*given)

    def method(self, *given: Any) -> Any:
        return self.inner(*given)


class Other(Timed):
    pass


def timed(inner: Callable[..., Any]) -> Any:
    @functools.wraps(inner)
    def call(*given: Any) -> Any:
        return inner(*given)

    return call


def centre(inner: Callable[..., Any]) -> Any:
    @functools.wraps(inner)
    def call(*given: Any) -> Any:
        out = inner(*given)
        return out - out.mean(1, keepdim=True)

    return call


def declared(kind: str) -> Any:
    made = {
        "function": lambda: timed(hook),
        "object": lambda: Timed(hook),
        "partial": lambda: functools.partial(hook),
        "module": lambda: Doubled(),
        "method": lambda: Timed(hook).method,
        "without graph": lambda: torch.no_grad()(hook),
    }
    return position_wise(made[kind]())


class Doubled(nn.Module):
    def forward(self, *given: Any) -> Any:
        return 2 * given[-1]


KINDS = ["function", "object", "partial", "module", "method", "without graph"]
AROUND: dict[str, Callable[[Any], Any]] = {
    "wraps": timed,
    "another function of the factory": lambda inner: functools.wraps(inner)(timed(centre(hook))),
    "class": Timed,
    "centred and timed": lambda inner: timed(centre(inner)),
    "centred and timed by objects": lambda inner: Timed(centre(inner)),
    "without graph": lambda inner: torch.no_grad()(centre(inner)),
    "partial": lambda inner: functools.update_wrapper(functools.partial(centre(inner)), inner),
}


@pytest.mark.parametrize("way", AROUND)
@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_around_declared_code_is_not_declared(kind: str, way: str) -> None:
    code = declared(kind)
    assert is_declared(code)
    assert not is_declared(AROUND[way](code))


def test_a_declared_method_speaks_for_its_object_alone() -> None:
    one, other, third = Timed(timed(hook)), Timed(centre(hook)), Other(timed(hook))
    position_wise(one.method)
    assert is_declared(one.method)
    assert not is_declared(other.method) and not is_declared(third.method)

    class Own:
        @position_wise
        def method(self, *given: Any) -> None: ...

    assert is_declared(Own().method)


def test_a_declared_autograd_function_does_not_speak_for_others() -> None:
    class One(torch.autograd.Function):
        pass

    class Two(torch.autograd.Function):
        pass

    position_wise(One.apply)
    assert is_declared(One.apply) and not is_declared(Two.apply)


def test_a_declared_class() -> None:
    class Own(nn.Module):
        pass

    class Sub(Own):
        pass

    position_wise(Own)
    assert is_declared(Own()) and not is_declared(Sub())
    assert not is_declared(functools.wraps(Own)(lambda *given: None))


def test_copies_of_declared_objects_are_declared() -> None:
    model = nn.Sequential(position_wise(Doubled()), nn.Linear(1, 1))
    model[1].register_forward_hook(position_wise(Plain()))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_declared(again[0]) and again[0] is not model[0]
        (of_linear,) = again[1]._forward_hooks.values()
        assert is_declared(of_linear)
        assert not is_declared(Timed(of_linear))


class Plain:
    def __call__(self, *given: Any) -> Any:
        return 2 * given[-1]


@pytest.mark.parametrize("code", [3, "forward", None, [], object(), torch.relu])
def test_what_cannot_be_declared(code: Any) -> None:
    with pytest.raises(
        TypeError, match=rf"^{re.escape(repr(code))} cannot be declared position-wise: give a hook"
    ):
        position_wise(code)
