"""A model with one part of its cells replaced, and all other parameters kept."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rwkv_rev.architectures.registry import ARCHITECTURES
from rwkv_rev.arguments import checked
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.errors import ConfigError
from rwkv_rev.foreign import adapters
from rwkv_rev.foreign.search import hook_name
from rwkv_rev.initial_states import activations
from rwkv_rev.random_state import capture, refuse_seed, restore

if TYPE_CHECKING:
    from rwkv_rev.modeling import RwkvRevForCausalLM

TOKEN_SHIFTS = ("coupled",)


@checked
def rewrite(model: nn.Module, *, token_shift: str = "coupled", seed: int = 0) -> "RwkvRevForCausalLM":
    """A new model whose token shifts are another cell of the same footprint, D numbers of state.

    The new cells begin with what gives zeros, where the old ones gave the token before: the model computes something
    else until it is trained on (``examples/coupled_feedback``). Parameters are copies, of the same dtype on the same
    device, frozen where they were. Those of the new cells are trainable in a frozen model, too, and have the dtype of
    the first LayerNorm, float16 in a model of float16. How gradients are made (``set_bptt``,
    ``gradient_checkpointing_enable``), how text is generated and whether it trains are as the model had them. A model
    with hooks or layers of others, which a new model would not have, is refused.

    Args:
        model: of RWKV-4 or 5.2, without adapters and hooks.
        token_shift: ``coupled``, a coupled additive cell (:mod:`rwkv_rev.cells.coupled_feedback`).
        seed: of the new cells' gates, from 0 to 2^63 - 1.

    Raises:
        ConfigError: for another token shift or seed, and for a model that has no token shift, is of another kind, or
            has adapters, hooks or layers of others.
    """
    from rwkv_rev.modeling import RwkvRevForCausalLM

    if token_shift not in TOKEN_SHIFTS:
        raise ConfigError(f"token_shift = {token_shift!r} must be one of {', '.join(TOKEN_SHIFTS)}")
    refuse_seed(seed)
    if type(model) is not RwkvRevForCausalLM:
        raise ConfigError(
            f"rewrite takes a RwkvRevForCausalLM, not a {type(model).__name__}: merge adapters first, if it has any"
        )
    known, version = model.config.architecture, f"{token_shift}-{model.config.rwkv_version}"
    if version not in ARCHITECTURES:
        there = [
            name.removeprefix(f"{token_shift}-")
            for name in ARCHITECTURES
            if name.startswith(f"{token_shift}-")
        ]
        raise ConfigError(
            f"token_shift = {token_shift!r} takes the place of the token shift of RWKV-{' or '.join(there)}, not of "
            f"{known.called}"
        )
    _refuse_others(model)
    before = capture(())
    torch.manual_seed(seed)
    try:
        found = RwkvRevForCausalLM(RwkvRevConfig(**(model.config.to_dict() | {"rwkv_version": version})))
    finally:
        restore(before)
    weight: Any = activations(model.model)
    kept = dict(model.named_parameters())
    found.to(weight.device)
    for name, parameter in found.named_parameters():
        like = kept.get(name, weight)
        parameter.data = parameter.data.to(like.dtype)
        parameter.requires_grad_(name not in kept or like.requires_grad)
    loaded = found.load_state_dict(model.state_dict(), strict=False)
    strange = [name for name in loaded.missing_keys if ".feedback." not in name] + loaded.unexpected_keys
    if strange:
        raise ConfigError(f"this model has other parameters than {known.called}: {', '.join(strange[:3])}")
    found.model.bptt = model.model.bptt
    found.generation_config = copy.deepcopy(model.generation_config)
    for block, former in zip(found.blocks, model.blocks, strict=True):
        block.recompute = former.recompute
    return found.train(model.training)


def _refuse_others(model: nn.Module) -> None:
    """Refuse what others have put into a model: it would be lost without a word."""
    for path, module in model.named_modules():
        layer, where = type(module), path or "the model"
        if adapters.is_of_peft(layer):
            method = layer.__module__.split(".")[2]
            raise ConfigError(
                f"this model has adapters of peft ({method} at {where}): merge them first, by the PeftModel's "
                "merge_and_unload()"
            )
        if not layer.__module__.startswith(("torch.nn.", "rwkv_rev.")):
            raise _lost(f"{layer.__name__} at {where}")
        if "forward" in vars(module):
            raise _lost(f"the replaced forward of {where}")
        for kind, hooks in vars(module).items():
            if kind.endswith("_hooks") and hooks:
                raise _lost(f"the hook {hook_name(next(iter(hooks.values())))} on {where}")
    for path, parameter in model.named_parameters():
        for hooks in (parameter._backward_hooks, parameter._post_accumulate_grad_hooks):
            if hooks:
                raise _lost(f"the hook {hook_name(next(iter(hooks.values())))} on {path}")


def _lost(what: str) -> ConfigError:
    return ConfigError(
        f"rewrite makes a new model, which would not have {what}: take it away, and add it afterwards"
    )
