"""Frozen linear maps in 4 or 8 bits, through bitsandbytes: what they compute, and whether that is right in chunks.

    nf4    y = x V^T            V: one of 16 numbers per weight, times the largest of its block of 64 weights
                                (Dettmers et al. 2023, "QLoRA", section 3; those largest ones are in 8 bits themselves)
    int8   y = s_x [x / s_x] [W / s_w]^T s_w    s: the largest of a row, divided by 127; [.] rounds
                                (Dettmers et al. 2022, "LLM.int8()", section 2)

The gradient by x is that of ``x V^T`` in either case, V being the weights that 4 or 8 bits stand for: for nf4 the
gradient of what is computed; for int8 that of it but for the rounding of x, through which gradients go as if it were
not there (straight-through). In training on a CPU bitsandbytes rounds no x, and int8 is ``x V^T`` itself.

Both treat each row of x by itself, so chunks make no difference but by rounding; the two sweeps run the same kernel
on the same rows. Not so LLM.int8() with a threshold, which takes columns out of the 8 bits by a look at all rows of
a call: other chunks would have other columns. It is refused where a context is cut.

Limits: int8 goes through float16 on a GPU, where inputs beyond 65,504 are infinite. bitsandbytes need not be installed:
layers are known by their place in it.
"""

import copy
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_rev.code_origin import origin, qualified_name
from rwkv_rev.errors import RwkvRevError, StrategyError
from rwkv_rev.printable import shortened

KINDS = ("nf4", "int8")
OLDEST = (0, 50)
"""Older ones compute a single token by another kernel than several, and without a gradient by another than with one."""
HOW_TO_INSTALL = "pip install 'bitsandbytes>=0.50'"
BLOCK = 64
"""Weights that share a largest one."""
_BLOCK_OF_BLOCKS = 256
KEPT_IN_FLOAT = ("head", "_down", "_up")
"""Ends of the names of linear maps that stay as they are: the head, and the narrow maps of decays and mixes."""
LAYERS = frozenset({"Linear4bit", "LinearNF4", "LinearFP4", "Linear8bitLt"})
_PLACE = "bitsandbytes.nn.modules"
_said: set[str] = set()


def is_quantised(layer: type) -> bool:
    """Whether a class is one of bitsandbytes' linear maps that are known here."""
    return layer.__module__ == _PLACE and origin(layer) == _PLACE and qualified_name(layer) in LAYERS


def objection(module: Any) -> str | None:
    """What a quantised map does that is not right in chunks; None where all is well."""
    state = getattr(module, "state", None)
    if state is None:
        return PACKS if _packs(module) else None
    if state.has_fp16_weights:
        return "rounds its weights anew in each call, and their gradient over all tokens of one (has_fp16_weights)"
    if state.threshold > 0:
        return (
            "chooses the columns that stay in 16 bits by a look at all tokens of a call (LLM.int8(); not with "
            "llm_int8_threshold=0.0)"
        )
    return None


PACKS = (
    "packs its weights for reading on this CPU, through which there is no gradient (not in training mode, nor with "
    "support_avx512bf16_for_cpu = False, which from_pretrained sets)"
)


def _packs(module: Any) -> bool:
    """Whether a map in 4 bits has packed its weights, or would in the next call without gradient."""
    weight = module.weight
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        return True
    return weight.device.type == "cpu" and not module.training and module.support_avx512bf16_for_cpu


def refuse_packed(model: nn.Module) -> None:
    """Refuse to train through weights that were packed for reading on a CPU: bitsandbytes gives no gradient there.

    Raises:
        StrategyError: naming the map.
    """
    for name, module in model.named_modules():
        if is_quantised(type(module)) and getattr(module, "state", None) is None and module.training:
            weight: Any = module.weight
            if getattr(weight.quant_state, "packing_format_for_cpu", False):
                raise StrategyError(
                    f"{type(module).__name__} at {name} has packed its weights for reading on this CPU, through which "
                    "there is no gradient: load the model anew with from_pretrained, which keeps it from that"
                )


def never_packed(model: nn.Module) -> None:
    """Let quantised maps compute alike in training and in reading; and say once what bitsandbytes says in each call."""
    found = [module for module in model.modules() if is_quantised(type(module))]
    for module in found:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    log = logging.getLogger("bitsandbytes.autograd._functions")
    if found and _once not in log.filters:
        log.addFilter(_once)


def _once(entry: logging.LogRecord) -> bool:
    """A filter that lets each message through once."""
    new = entry.getMessage() not in _said
    _said.add(entry.getMessage())
    return new


class Quantisable:
    """What loading a quantised model by transformers is here; a base of the models, before transformers' own."""

    @classmethod
    def from_pretrained(cls, *args: Any, quantization_config: Any = None, **kwargs: Any) -> Any:
        """As in transformers; where ``llm_int8_skip_modules`` does not say which maps stay as they are, those of
        :data:`KEPT_IN_FLOAT` do.
        """
        if quantization_config is not None:
            kwargs["quantization_config"] = with_our_exceptions(quantization_config)
        above: Any = super()
        loaded = above.from_pretrained(*args, **kwargs)
        never_packed(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded


def with_our_exceptions(config: Any) -> Any:
    """transformers' settings of bitsandbytes, where nobody has said which maps stay as they are: those that do here."""
    given = config if isinstance(config, dict) else vars(config)
    method = str(getattr(given.get("quant_method"), "value", given.get("quant_method", "bitsandbytes")))
    if method != "bitsandbytes" or given.get("llm_int8_skip_modules") is not None:
        return config
    config = copy.copy(config)
    if isinstance(config, dict):
        config["llm_int8_skip_modules"] = list(KEPT_IN_FLOAT)
    else:
        config.llm_int8_skip_modules = list(KEPT_IN_FLOAT)
    return config


def stays(name: str) -> bool:
    """Whether a linear map of this name stays as it is."""
    return name.endswith(KEPT_IN_FLOAT)


def refuse_unusable(kind: str, device: torch.device) -> None:
    """Refuse a kind that cannot be had on ``device``.

    Raises:
        RwkvRevError: naming what is missing, and what would work.
    """
    try:
        installed = metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        raise RwkvRevError(f"quantise = {kind} needs bitsandbytes: {HOW_TO_INSTALL}") from None
    if tuple(int(part) for part in re.findall(r"\d+", installed)[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise RwkvRevError(
            f"quantise = {kind} needs bitsandbytes {oldest} or newer, not {installed}: {HOW_TO_INSTALL}"
        )
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(
        logging.ERROR
    )  # tells of a kernel it did not fetch
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # of all kinds, by its build and the driver
        reason = shortened(" ".join(str(error).split()), 300)
        raise RwkvRevError(f"bitsandbytes {installed} cannot be loaded: {reason}") from error
    if device.type not in ("cuda", "cpu"):
        raise RwkvRevError(
            f"quantise = {kind} is tested on CUDA devices and on the CPU, not on {device.type}: leave it out"
        )


def quantise(
    module: nn.Module, kind: str, compute: torch.dtype, device: torch.device, *, inside: str = ""
) -> None:
    """Put quantised maps on ``device`` in the place of the linear maps below ``module``, one after another.

    Args:
        kind: of :data:`KINDS`.
        compute: dtype of the products; int8 goes by its inputs'.
        inside: name of ``module`` in a model, by which maps are told that stay as they are (:func:`stays`).

    What stays is left where it is. peft is told by the attributes that transformers sets.
    """
    import bitsandbytes.nn as bnb
    from bitsandbytes import functional

    for path, parent in list(module.named_modules(prefix=inside)):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or stays(f"{path}.{name}"):
                continue
            made: Any
            with torch.device("meta"):
                sizes = child.in_features, child.out_features, child.bias is not None
                if kind == "nf4":
                    made = bnb.Linear4bit(*sizes, compute_dtype=compute, quant_type="nf4")
                else:
                    made = bnb.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=0.0)
            weight = child.weight.data.to(device)
            if kind == "nf4":
                made.weight = bnb.Params4bit(
                    weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=made
                ).to(device)
            else:
                rows, scales, _ = functional.int8_vectorwise_quant(weight.half())
                made.weight = bnb.Int8Params(rows, requires_grad=False, CB=rows, SCB=scales)
            made.bias = child.bias
            setattr(parent, name, made.train(child.training))
    never_packed(module)


def restore(model: nn.Module, stored: Callable[[str], Tensor | None]) -> None:
    """Put float32 maps on the CPU in the place of the quantised ones, with their stored weights.

    Args:
        stored: a tensor by the name that its parameter has in ``model``.
    """
    for path, layer in [(path, layer) for path, layer in model.named_modules() if is_quantised(type(layer))]:
        parent, _, name = path.rpartition(".")
        weight = stored(f"{path}.weight")
        assert weight is not None
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight.float(), requires_grad=False)
        plain.bias = layer.bias
        setattr(model.get_submodule(parent), name, plain.train(layer.training))


def told_to_peft(model: Any, kind: str) -> None:
    """Set the attribute by which peft knows that a model has quantised maps."""
    setattr(model, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)


def numbers_in(parameter: Tensor) -> int:
    """Numbers that a parameter stands for: more than it has where several share a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def maps_of(model: nn.Module) -> Iterator[Any]:
    """The quantised maps of a model."""
    return (module for module in model.modules() if is_quantised(type(module)))


def bytes_of(kind: str, shapes: Iterable[tuple[int, ...]]) -> int:
    """Bytes that linear maps [out, in] of these shapes take: packed weights, and largest ones."""
    total = 0
    for out, inputs in shapes:
        weights = out * inputs
        if kind == "int8":
            total += weights + 4 * out
        else:
            blocks = -(-weights // BLOCK)
            total += -(-weights // 2) + blocks + 4 * -(-blocks // _BLOCK_OF_BLOCKS)
    return total
