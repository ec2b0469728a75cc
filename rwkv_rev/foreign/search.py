"""Code of others inside a model whose context is cut into chunks.

A chunk is computed without the tokens before it; all that it takes from them is the state. A hook or a module that
somebody put into the model is therefore right in chunks only if it is *position-wise*: what it does to a token
depends on that token's vector alone, not on where the token stands or what else is there. That cannot be seen from
outside. PyTorch's own position-wise layers, adapters that were tested (:mod:`rwkv_rev.foreign.adapters`) and linear
maps in 4 and 8 bits (:mod:`rwkv_rev.foreign.quantised`) are known; everything else has to be declared with
:func:`rwkv_rev.position_wise`, and is refused by name until it is. Whose code it is goes by where it is defined
(:mod:`rwkv_rev.code_origin`), on objects and on classes. Cells and blocks of one's own need no declaration: their
contract (:mod:`rwkv_rev.cells.contract`) says what they do with a chunk.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules import activation
from torch.nn.modules import module as module_globals
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from rwkv_rev.autograd.one_thread import one_thread
from rwkv_rev.cells.block import in_place_of_layers, keeps_the_contract
from rwkv_rev.cells.overridden import first_of_ours, overridden_alone
from rwkv_rev.code_origin import defined_in, origin, patches, qualified_name
from rwkv_rev.errors import StrategyError
from rwkv_rev.foreign import adapters, each_way, quantised
from rwkv_rev.foreign.called_modules import below, foreign_tensors, never_called
from rwkv_rev.foreign.declared_code import MARK, class_of, is_declared, original
from rwkv_rev.foreign.each_way import is_called_everywhere, replaced
from rwkv_rev.foreign.overriding import foreign_modes

LAYERS: frozenset[type] = frozenset(
    {
        nn.Dropout,
        nn.Embedding,
        nn.Identity,
        nn.LayerNorm,
        nn.Linear,
        nn.ModuleDict,
        nn.ModuleList,
        nn.ParameterDict,
        nn.ParameterList,
        nn.RMSNorm,
        nn.Sequential,
        *(
            getattr(activation, name)
            for name in ("ELU", "GELU", "LeakyReLU", "Mish", "ReLU", "Sigmoid", "SiLU", "Softplus", "Tanh")
        ),
    }
)
"""Layers of PyTorch that treat each position by itself."""

HOOKS = ("torch.", "accelerate.", "transformers.integrations.neftune", "transformers.modeling_utils")
"""Modules whose hooks are position-wise (NEFTune's: see :mod:`rwkv_rev.foreign.neftune`)."""

SHARDING = ("torch.distributed.fsdp",)
"""Modules whose hooks and classes bring weights, and nothing else."""

_COMPILED_MODULES = "torch._dynamo.eval_frame"
_COMPILED = (
    "cannot be looked into (to compile a module in place and declare that it treats each position by itself, write "
    "module.forward = rwkv_rev.position_wise(torch.compile(module.forward)))"
)

_EVERY_MODULE = vars(nn.Module()).keys()
_TOLD = frozenset({"forward", "_call_impl", MARK})

CALLED = ("embed", "initial_state", "normalize", "read", "run")
"""Methods of a model that strategies call; of ours these and more (:mod:`rwkv_rev.foreign.each_way`)."""

_HOOK_KINDS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


class Stranger(NamedTuple):
    """Code of others: where in the model, and what it does that is not right in chunks, both in words."""

    where: str
    objection: str


class Strangers(NamedTuple):
    """Code of others inside a model.

    Attributes:
        unknown: what is not right in chunks, or not known to be.
        declared: what was declared to be position-wise, in words; cells and blocks of others, by their contract.
        keeps: whether there is a trainable tensor beside the parameters, or code that might keep one from one call to
            the next: what was declared, and parametrizations.
        brings_tensors: whether anything might make the model depend on a tensor beside its parameters.
        buffers: of all modules that strategies call, and of those that declared code may call.
        adapters: layers of peft that are known.
        more: whether there is other code than theirs, known or not, so that ``adapters`` do not say all.
        writes: whether a module might write to what it is handed, or code of others.
    """

    unknown: list[Stranger]
    declared: list[str]
    keeps: bool
    brings_tensors: bool
    buffers: list[Tensor]
    adapters: list[nn.Module]
    more: bool
    writes: bool


def strangers(model: nn.Module) -> Strangers:
    """Code of others in what strategies call below ``model``; hooks on ``model`` itself see whole contexts."""
    with one_thread():  # a loss of another thread puts code of its own into the model
        return _strangers(model)


def _strangers(model: nn.Module) -> Strangers:
    found = Strangers([], [], False, False, [], [], False, False)
    more = keeps = writes = False
    norms: set[int] = set()
    unsaid: dict[int, str] = {}
    for kind in _HOOK_KINDS:
        for hook in getattr(module_globals, f"_global_{kind}", {}).values():
            _sort(hook, f"the global hook {hook_name(hook)}", found, _hook_objection(hook))
    for mode in foreign_modes():
        _sort(mode, f"the mode {type(mode).__name__} around the model", found, adapters.UNKNOWN)
    for tensors, where in foreign_tensors(model).items():
        _sort(tensors, where, found, adapters.UNKNOWN)
    for name in () if isinstance(model, PreTrainedModel) else CALLED:
        code = replaced(model, name) or getattr(type(model), name, None)
        if code is not None and not defined_in(code, ("rwkv_rev.", "torch.")):
            _sort(code, f"{type(model).__name__}.{name}", found, adapters.UNKNOWN)
    _sort_methods_of_model(model, found, inside=False)
    base = getattr(model, "base_model", None)  # whose forward the sweeps do not call
    misplaced = in_place_of_layers(getattr(model, "blocks", ()))
    layers: set[type] = set()
    for path, module in below(model):
        layers.add(type(module))
        writes |= bool(vars(module).get("inplace"))
        stands_in = id(module) in misplaced and not adapters.is_of_peft(
            type(module)
        )  # peft's have words of their own
        if stands_in:
            why = each_way.IN_PLACE_OF_A_LAYER if misplaced[id(module)] else each_way.NO_LAYER
            found.unknown.append(Stranger(f"{class_of(module).__name__} at {path}", why))
        if _is_known(module):
            if module._buffers:
                found.buffers.extend(buffer for buffer in module._buffers.values() if buffer is not None)
            for name in _norms_of_tokens(type(module)):
                norms.update(map(id, getattr(module, name).modules()))
            continue
        layer = class_of(module)
        computed = getattr(module, "parametrizations", None) if parametrize.is_parametrized(module) else None
        for holder in (module, *(computed.modules() if isinstance(computed, nn.Module) else ())):
            found.buffers.extend(buffer for buffer in holder._buffers.values() if buffer is not None)
            keeps |= holder is not module and may_keep(holder)
        for name in _norms_of_tokens(layer):
            norms.update(map(id, getattr(module, name).modules()))
        for name in () if _says_norms_of_tokens(layer) else getattr(layer, "norms_of_tokens", ()):
            unsaid |= dict.fromkeys(map(id, getattr(module, name).modules()), layer.__name__)
        if module is base:
            _sort_methods_of_model(module, found, inside=True)
        if (alone := overridden_alone(layer)) is not None:
            where = f"the overridden {alone} of {layer.__name__} at {path}"
            found.unknown.append(Stranger(where, each_way.in_a_cell(alone)))
        if not (layer is nn.GroupNorm and id(module) in norms):
            objection = _layer_objection(module, layer)
            if objection == adapters.UNKNOWN and id(module) in unsaid:
                objection = (
                    f"is known to treat each position by itself in the class that {unsaid[id(module)]} derives from; "
                    f"{unsaid[id(module)]} has to say of itself that it does not change that, by norms_of_tokens"
                )
            if not stands_in:
                _sort(module, f"{layer.__name__} at {path}", found, objection)
        for kind in _HOOK_KINDS:
            hooks = getattr(module, f"_{kind}")
            for hook in hooks.values():
                more |= not defined_in(hook, SHARDING)
                words = f"the hook {hook_name(hook)} on {path}"
                if module is base:
                    found.unknown.append(Stranger(words, each_way.ON_THE_BASE))
                else:
                    _sort(hook, words, found, _hook_objection(hook))
        if adapters.is_of_peft(layer):
            found.adapters.append(module)
        elif not (_is_own(layer) or layer is nn.GroupNorm or quantised.is_quantised(layer)):
            more = True
        beside = [*vars(module).values(), *module._buffers.values()]
        made = type(module) is not layer and not type(module).__module__.startswith(SHARDING)
        trained = any(map(_is_trainable, beside))
        more |= made or trained
        keeps |= trained
        of_itself = module is base or type(module).__module__ == _COMPILED_MODULES  # has one on each object
        forward = None if of_itself else replaced(module, "forward")
        if forward is not None:
            _sort(forward, f"the replaced forward of {path}", found, _forward_objection(module))
        if module is not base and (call := replaced(module, "_call_impl")) is not None:
            _sort(call, f"the replaced _call_impl of {path}", found, adapters.UNKNOWN)
        for name in () if module is base else _replaced_methods(module, layer):
            where = f"the replaced {name} of {path}"
            _sort_method(layer, name, replaced(module, name), where, found)
        if getattr(module, "_compiled_call_impl", None) is not None:
            found.unknown.append(Stranger(f"the compiled call of {path}", _COMPILED))
    for patch in patches(layers):
        _sort_method(patch.layer, patch.name, patch.code, patch.where, found)
    if found.declared:  # which may call what is beside the modules that strategies call
        found.buffers.extend(buffer for module in never_called(model) for buffer in module.buffers())
    more |= bool(found.unknown or found.declared)
    return found._replace(
        keeps=keeps or bool(found.declared),
        brings_tensors=more or bool(found.adapters),
        more=more,
        writes=writes or bool(found.declared),
    )


def strangers_at(module: nn.Module) -> Strangers:
    """Code of others at or below a module."""
    return strangers(nn.ModuleDict({"head": module}))


def is_of_others(module: nn.Module) -> bool:
    """Whether a module's class is not ours, PyTorch's or peft's."""
    layer = class_of(module)
    return not (_is_own(layer) or defined_in(layer, ("torch.", "peft.")))


def may_keep(module: nn.Module) -> bool:
    """Whether a module that computes a weight runs code of others, which might keep it from one call to the next."""
    hooked = any(getattr(module, f"_{kind}") for kind in _HOOK_KINDS)
    return (
        hooked
        or is_of_others(module)
        or replaced(module, "forward") is not None
        or next(patches([type(module)]), None) is not None
    )


def refuse_unknown(found: Strangers, strategy: str) -> None:
    """Refuse a model with code that may look at positions.

    Raises:
        StrategyError: naming the code and the ways out.
    """
    if found.unknown:
        where, objection = found.unknown[0]
        more = f" (and {len(found.unknown) - 1} more)" if len(found.unknown) > 1 else ""
        if objection in each_way.OBJECTIONS:
            raise StrategyError(f"{where}{more} {objection}")
        declare = ", or declare it with rwkv_rev.position_wise(...) if that is so"
        raise StrategyError(
            f"{where}{more} {objection}, and {strategy!r} computes the context in chunks: use bptt='full'"
            f"{declare if objection == adapters.UNKNOWN else ''}"
        )


def refuse_unknown_in_packed_rows(found: Strangers) -> None:
    """Refuse the same where documents are taken out of the rows that they were packed into.

    Raises:
        StrategyError: naming the code and the ways out.
    """
    if found.unknown:
        where, objection = found.unknown[0]
        if objection in each_way.OBJECTIONS:
            raise StrategyError(f"{where} {objection}")
        declare = ", or declare it with rwkv_rev.position_wise(...) if it treats each position by itself"
        declare = declare if objection == adapters.UNKNOWN else ""
        raise StrategyError(
            f"{where} {objection}, and several documents are packed into one row, which layers take apart: give each "
            f"document a row of its own, padded, with an attention_mask{declare}"
        )


def _is_known(module: nn.Module) -> bool:
    """Whether a module is a layer of ours or of PyTorch's just as its class says: to most there is nothing to say."""
    own = vars(module)
    layer: type = type(module)
    if not _is_own(layer) or MARK in vars(layer):
        return False
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or own.get("_compiled_call_impl")
    ):
        return False
    for name in own.keys() - _EVERY_MODULE:
        value = own[name]
        if name in _TOLD or _is_trainable(value):
            return False
        if layer not in LAYERS and callable(getattr(layer, name, None)):  # a replaced method
            return False
    return not (own.get("scale_grad_by_freq") or any(map(_is_trainable, module._buffers.values())))


def _is_trainable(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


@lru_cache(maxsize=256)
def _is_own(layer: type) -> bool:
    return layer in LAYERS or (layer.__module__.startswith("rwkv_rev.") and origin(layer) != "")


def _norms_of_tokens(layer: type) -> tuple[str, ...]:
    """What the very class says (:class:`ReversibleCell`), or one of ours: a subclass may do other things."""
    found: tuple[str, ...] = getattr(layer, "norms_of_tokens", ()) if _says_norms_of_tokens(layer) else ()
    return found


def _says_norms_of_tokens(layer: type) -> bool:
    return _is_own(layer) or "norms_of_tokens" in vars(layer)


def _layer_objection(module: nn.Module, layer: type) -> str | None:
    if getattr(module, "scale_grad_by_freq", False):
        return "divides gradients by how often it sees a token (scale_grad_by_freq)"
    if _is_own(layer):
        return None
    if quantised.is_quantised(layer):
        return quantised.objection(module)
    return adapters.objection(module) if adapters.is_of_peft(layer) else adapters.UNKNOWN


def _hook_objection(hook: Any) -> str | None:
    hook = original(hook)
    if defined_in(hook, HOOKS):
        return None
    code = hook.func if isinstance(hook, partial) else hook
    return adapters.hook_objection(code) if defined_in(hook, ("peft.",)) else adapters.UNKNOWN


def _forward_objection(module: nn.Module) -> str | None:
    """To a replaced forward: accelerate's own, with hooks of its own, calls the module's."""
    forward, hook = replaced(module, "forward"), getattr(module, "_hf_hook", None)
    hooks = [hook, *getattr(hook, "hooks", ())]  # a SequentialHook has others
    layers = [forward.func if isinstance(forward, partial) else forward, *map(type, hooks)]
    former = getattr(getattr(module, "_old_forward", None), "__func__", None)
    own = former is getattr(class_of(module), "forward", None) and all(
        origin(layer).startswith("accelerate.") for layer in layers
    )
    return None if own else adapters.UNKNOWN


def _replaced_methods(module: nn.Module, layer: type) -> list[str]:
    """Methods that a layer has of a class of ours and that an attribute of the instance stands before."""
    ours = first_of_ours(layer)
    if ours is None:
        return []
    own = vars(module).keys() - _EVERY_MODULE - {"forward", "_call_impl"}
    names = [name for name in own if callable(getattr(ours, name, None))]
    return sorted(name for name in names if replaced(module, name) is not None)


def _sort_methods_of_model(model: nn.Module, found: Strangers, *, inside: bool) -> None:
    for name, code in each_way.overridden(model, inside=inside):
        where = f"{type(model).__name__}.{name}"
        if name == "forward" and name in vars(model) and _forward_objection(model) is None:
            continue
        _sort_method(type(model), name, code, where, found)


def _sort_method(layer: type, name: str, code: Any, where: str, found: Strangers) -> None:
    """A function in the place of a method: what one way calls and another does not is not to be declared."""
    if is_called_everywhere(layer, name):
        _sort(code, where, found, adapters.UNKNOWN)
    else:
        of_model = issubclass(layer, PreTrainedModel)
        found.unknown.append(Stranger(where, each_way.IN_A_MODEL if of_model else each_way.in_a_cell(name)))


def _sort(code: Any, where: str, found: Strangers, objection: str | None) -> None:
    if is_declared(code) or (
        objection == adapters.UNKNOWN and isinstance(code, nn.Module) and keeps_the_contract(class_of(code))
    ):
        found.declared.append(where)
    elif objection is not None:
        found.unknown.append(Stranger(where, objection))


def hook_name(hook: Any) -> str:
    """What messages call a hook: the function of a partial, the class of an object."""
    hook = original(hook)
    code = hook.func if isinstance(hook, partial) else hook
    return qualified_name(code) or type(code).__name__
