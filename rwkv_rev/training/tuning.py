"""What is trained: everything (``full``), low-rank additions (``lora``), or the initial state alone (``state``).

``lora`` (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"): ``W + (alpha/rank) B A`` through
peft, on every linear map of the blocks but not the head, merged into W at the end, unless W is in 4 or 8 bits. The maps
of both mixes matter in RWKV: the channel mix holds most of the weights.

``state`` (state tuning): the WKV state [L, H, N, N] that every context begins with, zero at first. Its gradient comes
through the whole context and is exact. RWKV-5 to 7 only: the ``rwkv`` package, which loads it as
``blocks.i.att.time_state``, has no such tensor for RWKV-4.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rwkv_rev.architectures.registry import architecture, with_tuned_state
from rwkv_rev.errors import RwkvRevError, StrategyError
from rwkv_rev.foreign.adapters import without_peft_warnings
from rwkv_rev.foreign.quantised import numbers_in, restore
from rwkv_rev.training.lora_targets import has_addition, refuse_lora_targets

if TYPE_CHECKING:
    from rwkv_rev.configuration import RwkvRevConfig
    from rwkv_rev.modeling import RwkvRevForCausalLM
    from rwkv_rev.training.config import FinetuneConfig


def apply_tuning(model: "RwkvRevForCausalLM", config: "FinetuneConfig") -> nn.Module:
    """Decide what requires gradients; returns the module to train (peft's wrapper for ``lora``).

    Raises:
        StrategyError: for ``state`` on RWKV-4, and for lora targets that the model has not.
        RwkvRevError: when peft is missing.
    """
    if config.tune == "full":
        return model.requires_grad_(True)
    if config.tune == "state":
        refuse_state_tuning(model.config.rwkv_version)
        model.requires_grad_(False)
        model.add_initial_state()
        assert model.model.initial_wkv is not None
        model.model.initial_wkv.requires_grad_(True)
        return model
    return _with_lora(model, config)


def refuse_state_tuning(version: str) -> None:
    """Raise StrategyError for an architecture whose initial state cannot be tuned."""
    if not (known := architecture(version)).tunes_state:
        why = "the rwkv package loads no initial state for" if known.layouts else "there is no such tensor of"
        raise StrategyError(f"tune = state needs {with_tuned_state()}: {why} {known.called}; use tune = lora")


def merged(model: nn.Module, stored: Callable[[str], torch.Tensor | None]) -> "RwkvRevForCausalLM":
    """The plain model on the CPU, low-rank additions merged into it, with the frozen weights' stored values.

    Frozen weights may have been rounded to the arithmetic's dtype for training, or be in 4 or 8 bits.

    Args:
        model: the trained model, or peft's wrapper; it is used up.
        stored: a tensor of the source by its name, None if it has none.
    """
    restore(model, lambda name: stored(name.replace(".base_layer.", ".")))
    model = model.cpu()
    with torch.no_grad():
        for name, parameter in language_model(model).named_parameters():
            if parameter.requires_grad or (tensor := stored(name.replace(".base_layer.", "."))) is None:
                continue
            parameter.data = tensor.float()
    if hasattr(model, "merge_and_unload"):
        wrapped: Any = model
        return wrapped.merge_and_unload()
    return language_model(model)


def language_model(model: Any) -> "RwkvRevForCausalLM":
    """The causal language model inside peft's or a data-parallel wrapper."""
    from rwkv_rev.modeling import RwkvRevForCausalLM

    found: Any = model
    while not isinstance(found, RwkvRevForCausalLM):
        found = found.module if hasattr(found, "module") else found.base_model.model
    return found


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) numbers in the parameters."""
    sizes = [(numbers_in(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def count_trained(
    config: "FinetuneConfig", model: "RwkvRevConfig", shapes: Mapping[str, Sequence[int]]
) -> int:
    """Number of weights that a run trains, from the names and shapes of the stored tensors."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if config.tune == "full":
        return sum(sizes.values())
    if config.tune == "state":
        return model.num_hidden_layers * math.prod(model.architecture.memory_shape(model))
    found = 0
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        targets = config.lora_targets or model.architecture.lora_targets
        if len(shape) == 2 and module != name and has_addition(module, targets):
            found += config.lora_rank * sum(shape)
    return found


def linear_names(model: nn.Module) -> set[str]:
    """Last names of the linear maps inside the blocks."""
    return {
        name.rsplit(".", 1)[1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".blocks." in name
    }


def _with_lora(model: "RwkvRevForCausalLM", config: "FinetuneConfig") -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RwkvRevError("tune = lora needs peft: pip install 'rwkv-rev[train]'") from error
    shapes = {name: p.shape for name, p in model.named_parameters()}
    refuse_lora_targets(config.lora_targets, model.config.tie_word_embeddings, shapes)
    targets = config.lora_targets or sorted(linear_names(model) & set(model.config.architecture.lora_targets))
    adapter = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha if config.lora_alpha is not None else 2 * config.lora_rank,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        bias="none",
    )
    with without_peft_warnings():
        wrapped = get_peft_model(model, adapter)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return wrapped
