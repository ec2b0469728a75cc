"""Tensors that code of others makes of trained weights in one call and keeps for the next ones.

The first sweep has no graph. What a declared module, hook or parametrization made there and kept, wherever it keeps it
(an attribute, a dictionary, ``functools.lru_cache``), would have none in the second sweep either, and the weights that
it was made of would get no gradient, without a word. So such code is called with gradients enabled in the first sweep,
too: what comes out has no graph, what it keeps has one. The gradient goes through that once. The second chunk finds it
used up, as ``full`` would in a second ``backward()``, and is refused by name.

Such code may turn gradients off itself, for the length of a call or from one hook to another. The mode that it leaves
is its own until it sets another: in the first sweep for its calls alone, in the second one for what is computed.

Of cells by the contract these are the methods that a subclass fills in; arithmetic on exact states stays without graph.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._pytree import tree_map

from rwkv_rev.bptt.language_model import LanguageModel
from rwkv_rev.cells.block import keeps_the_contract
from rwkv_rev.code_origin import defined_in
from rwkv_rev.foreign.declared_code import StandIn, is_declared
from rwkv_rev.foreign.search import CALLED, Strangers, is_of_others, may_keep

_FILLED_IN = ("project", "gates", "update", "read", "output_of")
"""Methods of cells that make differentiable tensors of a chunk, and nothing else."""


@contextmanager
def what_is_kept_is_trained(model: LanguageModel, found: Strangers) -> Iterator[None]:
    """Inside, code of others has gradients enabled; where the caller has not, what it gives has no graph.

    ``found``: the code of others in the model; nothing is done where none :attr:`~.Strangers.keeps`.
    """
    replaced: list[tuple[Any, Any, Any, Any]] = []
    called = _Called()
    try:
        for place, name, code in _calls(model) if found.keeps else ():
            now = StandIn(called, code)
            replaced.append((place, name, place.get(name), now))
            place[name] = now
        yield
    finally:
        for place, name, before, now in reversed(replaced):
            if place.get(name) is not now:  # a hook has taken itself off
                continue
            if before is None:
                del place[name]
            else:
                place[name] = before


def _calls(model: Any) -> list[tuple[Any, Any, Any]]:
    """Where code of others is called from, as a dictionary, a key of it, and the code."""
    found: list[tuple[Any, Any, Any]] = []
    hooked = [module_globals._global_forward_hooks, module_globals._global_forward_pre_hooks]
    for name in CALLED:
        if is_declared(getattr(model, name, None)):
            found.append((vars(model), name, getattr(model, name)))
    for module in model.modules():
        hooked += [module._forward_hooks, module._forward_pre_hooks]
        own = vars(module)
        if isinstance(module, ParametrizationList):
            if any(map(may_keep, module.modules())):  # with its hooks
                found.append((own, "_compiled_call_impl", module._compiled_call_impl or module._call_impl))
        elif module is not model and (is_declared(module) or is_declared(module.forward)):
            found.append((own, "forward", module.forward))
        elif keeps_the_contract(type(module)):
            others = is_of_others(module)
            methods = [(name, getattr(module, name, None)) for name in _FILLED_IN if others or name in own]
            found += [
                (own, name, code) for name, code in methods if code and not defined_in(code, ("rwkv_rev.",))
            ]
    found += [(hooks, key, hook) for hooks in hooked for key, hook in hooks.items() if is_declared(hook)]
    return found


class _Called:
    """Calls code of others, and follows whether that has gradients enabled."""

    def __init__(self) -> None:
        self._enabled = True
        """As it was left where the caller has no graph."""
        self._off = False
        """Whether it was the code that turned gradients off where the caller has one."""

    def __call__(self, code: Any, *given: Any, **named: Any) -> Any:
        if torch.is_grad_enabled() or self._off:
            try:
                return code(*given, **named)
            finally:
                self._off = not torch.is_grad_enabled()
        # other tensors of the same memory: what is written into one has no graph outside
        given = _each(_again, given)
        named = {name: _each(_again, value) for name, value in named.items()}
        torch.set_grad_enabled(self._enabled)
        try:
            return _each(_detached, code(*given, **named))
        finally:
            self._enabled = torch.is_grad_enabled()
            torch.set_grad_enabled(False)


def _each(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Change the tensors in a value; others than the commonest take PyTorch's way, which takes longer."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) is tuple:
        return tuple([_each(change, one) for one in value])
    if value is None or isinstance(value, nn.Module | int):
        return value
    return tree_map(lambda one: change(one) if isinstance(one, Tensor) else one, value)


def _again(tensor: Tensor) -> Tensor:
    return tensor if tensor.requires_grad else tensor.detach()


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor
