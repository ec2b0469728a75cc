"""Which layers and hooks of peft are right in a model whose context is cut into chunks.

Known are those that ``tests/test_peft_methods.py`` holds against ``full``; ``docs/peft.md`` is its table. What is not
named here is refused like the code of anybody else. Named by their place in peft, which need not be installed.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from rwkv_rev.code_origin import origin, qualified_name
from rwkv_rev.errors import StrategyError

LAYERS = frozenset(
    {
        "tuners._buffer_dict.BufferDict",
        "tuners.adalora.layer.SVDLinear",
        "tuners.adamss.layer.Linear",
        "tuners.beft.layer.Linear",
        "tuners.boft.layer.Linear",
        "tuners.boft.layer.MultiplicativeDropoutLayer",
        "tuners.bone.layer.BoneLinear",
        "tuners.c3a.layer.C3ALinear",
        "tuners.deft.layer.DeftLinear",
        "tuners.delora.layer.DeloraLinear",
        "tuners.fourierft.layer.FourierFTLinear",
        "tuners.frod.layer.Linear",
        "tuners.glora.layer.GloraEmptyPath",
        "tuners.glora.layer.GloraLinear",
        "tuners.glora.layer.GloraLoraPath",
        "tuners.gralora.layer.Linear",
        "tuners.hira.layer.Embedding",
        "tuners.hira.layer.Linear",
        "tuners.hra.layer.HRALinear",
        "tuners.ia3.layer.Linear",
        "tuners.ln_tuning.layer.LNTuningLayer",
        "tuners.loha.layer.Linear",
        "tuners.lokr.layer.Linear",
        "tuners.lora.arrow.ArrowLoraLinearLayer",
        "tuners.lora.bnb.Linear4bit",
        "tuners.lora.bnb.Linear8bitLt",
        "tuners.lora.dora.DoraEmbeddingLayer",
        "tuners.lora.dora.DoraLinearLayer",
        "tuners.lora.layer.Embedding",
        "tuners.lora.layer.Linear",
        "tuners.lora.layer.ParamWrapper",
        "tuners.lora.monteclora.MontecloraSampler",
        "tuners.lora.variants.ArrowLinearVariant",
        "tuners.lora.variants.BdLoraLinearVariant",
        "tuners.lora.variants.BlockDiagonalLinear",
        "tuners.lora.variants.DoraEmbeddingVariant",
        "tuners.lora.variants.DoraLinearVariant",
        "tuners.lora.variants.KasaLinearVariant",
        "tuners.lora.variants.MiCAEmbeddingVariant",
        "tuners.lora.variants.MiCALinearVariant",
        "tuners.lora.variants.VeloraLinearVariant",
        "tuners.miss.layer.MissLinear",
        "tuners.oft.layer.Embedding",
        "tuners.oft.layer.Linear",
        "tuners.oft.layer.MultiplicativeDropoutLayer",
        "tuners.oft.layer.OFTRotationModule",
        "tuners.osf.layer.Linear",
        "tuners.peanut.layer.Linear",
        "tuners.poly.layer.Linear",
        "tuners.poly.router.PolyRouter",
        "tuners.psoft.layer.Linear",
        "tuners.psoft.layer.OrthLayer",
        "tuners.pvera.layer.Linear",
        "tuners.randlora.layer.Linear",
        "tuners.road.layer.Linear",
        "tuners.shira.layer.Linear",
        "tuners.supertuning.layer.Linear",
        "tuners.tinylora.layer.Embedding",
        "tuners.tinylora.layer.Linear",
        "tuners.trainable_tokens.layer.TrainableTokensLayer",
        "tuners.unilora.layer.Linear",
        "tuners.vblora.layer.Linear",
        "tuners.vera.layer.Linear",
        "tuners.waveft.layer.WaveFTLinear",
        "utils.other.ModulesToSaveWrapper",
        "utils.other.TrainableTokensWrapper",
    }
)
"""Layers that treat each token by itself, below ``peft.``."""

ALORA = "tuners.lora.model._alora_offsets_pre_forward_hook"
LILY = "tuners.lily.layer.Linear"
POLY = "tuners.poly.model.PolyModel._register_pre_hooks.<locals>.pre_hook"
SHADOW = "tuners.shadow.layers.ShadowLayer"
X_LORA = "tuners.xlora.model.XLoraModel._enable_peft_forward_hooks.<locals>.scalings_injection_hook"

HOOKS = frozenset(
    {
        "tuners.glora.model._adapter_names_pre_forward_hook",
        "tuners.lora.model._adapter_names_pre_forward_hook",
        "tuners.road.model._adapter_names_pre_forward_hook",
        POLY,
    }
)
"""Hooks that tell layers which adapter, or which task's, a row is for."""

REFUSED = {
    ALORA: "counts tokens from the end of a call (activated LoRA)",
    "tuners.lora.variants.ALoraLinearVariant": "counts tokens from the end of a call (activated LoRA)",
    "tuners.lora.variants.MontecloraLinearVariant": "takes other noise from its store in each call (MonteCLoRA)",
    LILY: "chooses its experts by an average over all tokens of a call (Lily)",
    SHADOW: "goes by a second model that reads the same call (ShadowPEFT)",
    X_LORA: "scales tokens by what a first reading of the whole call gave (X-LoRA)",
}
"""What other layers, variants of LoRA's layer and hooks do, for which chunks make a difference."""

WHOLE_TEXTS = frozenset({LILY, SHADOW, X_LORA})
"""What gives another result where a text is read in several calls, with the state carried from one to the next."""

TAKEN_OFF = frozenset({ALORA, POLY, X_LORA})
"""Hooks that peft puts on for a call in training, and takes off again before the backward pass."""

UNKNOWN = "is not known to treat each position by itself"


def is_of_peft(code: Any) -> bool:
    """Whether a class or function is peft's own."""
    return origin(code).startswith("peft.")


def objection(module: nn.Module) -> str | None:
    """What a layer of peft does that is not right in chunks, or that this is not known; None where all is well."""
    place = place_of(type(module))
    if place not in LAYERS | REFUSED.keys():
        return UNKNOWN
    if type(getattr(module, "base_layer", None)).__module__.startswith("rwkv_rev.") and place in LAYERS:
        return "stands in the place of a whole cell, whose parameters are read outside of its calls too"
    if getattr(module, "disable_adapters", False):
        return None
    if place in REFUSED:
        return REFUSED[place]
    if module.training and any(getattr(module, "pvera_generator", {}).values()):
        return "draws from a generator of its own (PVeRA; not without generator_seed)"
    if module.training and getattr(module, "coft", False):
        return "writes to its weights in each call (OFT with coft)"
    for adapter, variant in getattr(module, "lora_variant", {}).items():
        found = _variant_objection(module, adapter, place_of(type(variant)))
        if found is not None:
            return found
    return None


def _variant_objection(layer: Any, adapter: str, variant: str) -> str | None:
    """:func:`objection` to what a variant of LoRA does in LoRA's layer."""
    if adapter not in layer.active_adapters:
        return None
    if variant == "tuners.lora.variants.MontecloraLinearVariant" and not layer.training:
        return None
    if variant not in LAYERS:
        return REFUSED.get(variant, UNKNOWN)
    averages = layer.training and variant == "tuners.lora.variants.VeloraLinearVariant"
    if averages and layer.lora_velora_init_type[adapter] != "random":
        return "averages over all tokens of a call for its gradient (VeLoRA; not with init_type='random')"
    return None


def hook_objection(hook: Any) -> str | None:
    """:func:`objection` to a hook."""
    place = place_of(hook)
    return None if place in HOOKS else REFUSED.get(place, UNKNOWN)


def refuse_recomputing(model: nn.Module) -> None:
    """Refuse to compute blocks once more in the backward pass where peft's hooks are gone by then.

    Raises:
        StrategyError: naming the hook.
    """
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if place_of(hook) in TAKEN_OFF:
                raise StrategyError(
                    f"gradient checkpointing computes layers once more in the backward pass, when peft has taken "
                    f"{place_of(hook).rpartition('.')[2]} off them: train without gradient checkpointing"
                )


def refuse_carried_state(model: nn.Module) -> None:
    """Refuse to read a text in several calls where a layer needs all of it in one.

    Raises:
        StrategyError: naming the layer, and what it does.
    """
    for name, module in model.named_modules():
        if not is_of_peft(type(module)):
            continue
        for code in (type(module), *module._forward_pre_hooks.values()):
            if place_of(code) in WHOLE_TEXTS and not module.disable_adapters:
                raise StrategyError(
                    f"{type(module).__name__} at {name} {REFUSED[place_of(code)]}, so a state cannot be carried from "
                    "one call to the next: generate with use_cache=False, and hand over whole texts"
                )


def put_back(layers: Iterable[Any]) -> set[int]:
    """Ids of parameters that ``target_parameters`` of LoRA takes out and puts back in each call, unchanged.

    ``layers``: those of peft in the model.
    """
    wrappers = [layer for layer in layers if place_of(type(layer)) == "tuners.lora.layer.ParamWrapper"]
    return {id(getattr(wrapper.get_base_layer(), wrapper.parameter_name)) for wrapper in wrappers}


def place_of(code: Any) -> str:
    """Where in peft a class or function stands: module and name, below ``peft.``."""
    code = code.func if isinstance(code, partial) else code
    return f"{origin(code).removeprefix('peft.')}.{qualified_name(code)}"


@contextmanager
def without_peft_warnings() -> Iterator[None]:
    """Inside, nothing is said of peft asking transformers by a name that is on its way out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield
