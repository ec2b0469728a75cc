"""What stands beside a loss for logits that were not made: over a long context they would be the largest tensor.

In training they are not to be had: clear words where they are used, instead of those of ``None``. In evaluation,
without a gradient, they are made by whoever uses them first, by reading the context once more: ``Trainer`` does with
``compute_metrics``, and without it memory stays flat. Ids, masks, borders and labels are copied, and training or
evaluation mode is what it was. A model that has changed is refused, as far as its parameters (some numbers of each:
what writes through ``.data`` leaves no other trace), what its modules go by (:mod:`rwkv_rev.module_settings`), or the
loss tell of it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from rwkv_rev import random_state
from rwkv_rev.errors import StrategyError
from rwkv_rev.initial_states import activations
from rwkv_rev.loss import sum_cross_entropy, wide
from rwkv_rev.model_now import model_now
from rwkv_rev.module_settings import Settings, first_change, notes_of, settings

if TYPE_CHECKING:
    from rwkv_rev.bptt.strategy import LossInputs, LossResult, Strategy
    from rwkv_rev.modeling import RwkvRevForCausalLM

LIKE_THE_LOSS = {2: 5e-3, 4: 1e-5, 8: 1e-10}
"""How far the loss of logits made afterwards may be from the one they stand beside, by rounding: by bytes a number."""

SAMPLES = 64
"""Numbers of each tensor that are kept to tell whether it was written to."""


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise StrategyError(
        "this loss was computed without its logits: pass return_logits=True, with bptt='full' and a context of at most "
        "one chunk where a gradient is wanted (peft's CPT needs them), or call the model without labels"
    )


HAS_CHANGED = (
    "the model or its inputs have changed since this loss was computed without its logits{what}: use them before, or "
    "pass return_logits=True"
)
HAS_DRAWN = (
    "this loss was computed without its logits, and random numbers were drawn for it (dropout?), which a second "
    "reading would draw anew: pass return_logits=True"
)


class Unmade:
    """False, and neither a sequence nor a tensor. Its only value is :data:`LOGITS`."""

    __getitem__ = __iter__ = __len__ = __array__ = _refuse
    __torch_function__: Any = staticmethod(_refuse)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what copying, pickling and the like look for
            raise AttributeError(name)
        _refuse()

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "logits not made"

    def __reduce__(self) -> str:
        return "LOGITS"


LOGITS: Any = Unmade()
"""Logits that were not made beside a loss: no item of the output, and clear words where they are used."""


class Deferred(Tensor):
    """Logits [B, T, V] without a graph that are made at their first use: any operation of a tensor is one.

    Args:
        make: gives them.
        shape, dtype, device: theirs; asking for these makes nothing, since casting tools ask every item.
        depends_on: gives the tensors that they are made from, now and at the first use.

    Raises:
        StrategyError: at the first use, if one of these was written to or replaced since the loss; what ``make``
            raises.
    """

    _make: Callable[[], Tensor]
    _depends_on: Callable[[], list[Tensor]]
    _before: tuple[list[tuple[int, int, int]], dict[Any, Tensor]] | None

    def __new__(
        cls,
        make: Callable[[], Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        depends_on: Callable[[], list[Tensor]],
    ) -> "Deferred":
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        torch._C._set_throw_on_mutable_data_ptr(self)  # to_dlpack asks nobody, and would hand out no memory
        self._make, self._depends_on, tensors = make, depends_on, depends_on()
        self._before = _marks(tensors), _samples(tensors)
        return self

    def _made(self) -> Tensor:
        if self._before is not None:
            (marks, samples), tensors = self._before, self._depends_on()
            if _marks(tensors) != marks or not _same(_samples(tensors), samples):
                raise StrategyError(HAS_CHANGED.format(what=""))
            logits = self._make()
            if logits.shape != self.size():
                raise StrategyError(
                    f"the output layer gives logits of {logits.shape[-1]} numbers, and by its out_features or the "
                    f"configuration's vocab_size they would have {self.size(-1)}: pass return_logits=True"
                )
            self._make, self._depends_on, self._before = lambda: logits, list, None
        return self._make()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in _ASKED_OF_EVERY_ITEM:
            args, kwargs = tree_map_only(Deferred, Deferred._made, (args, kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # there it is declared without cls
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*tree_map_only(Deferred, Deferred._made, args), **(kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._made().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return "logits not made yet" if self._before is not None else repr(self._made())


def loss_and_logits(
    model: "RwkvRevForCausalLM", inputs: "LossInputs", strategy: "Strategy", *, deferred: bool
) -> tuple["LossResult", Deferred | None]:
    """A loss and, if ``deferred``, what makes logits beside it for who asks for them: in this precision and mode."""
    if not deferred:
        return strategy.loss(model, inputs), None
    kind, dtype = inputs.targets.device.type, wide(activations(model.model).dtype)
    autocast = torch.autocast(
        kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
    )
    state = inputs.state.each(Tensor.clone)
    ids = None if inputs.input_ids is None else inputs.input_ids.clone()  # which are often a buffer
    embeds = inputs.inputs_embeds
    if embeds is not None and embeds.is_inference():  # what is written to it has no version
        embeds = embeds.clone()
    devices = [inputs.targets.device]
    generators = random_state.capture(devices)
    result = strategy.loss(model, inputs)
    drawn = not generators.same(random_state.capture(devices))
    as_it_was, before = model_now(model), settings(model, versions=True)

    @torch.no_grad()
    def make() -> Tensor:
        if drawn:
            raise StrategyError(HAS_DRAWN)
        with as_it_was(), autocast:
            now = settings(model, versions=True)
            hidden, _ = model.read(ids, inputs.valid, embeds, state, inputs.borders)
            logits = model.head(hidden).to(dtype)
            _refuse_another_model(model, before, now)
        again = sum_cross_entropy(
            logits,
            nn.Identity(),
            inputs.targets,
            scale=1 / inputs.divisor,
            vocab_size=logits.shape[-1],
            weights=inputs.weights,
        )
        # what neither tensors nor modules tell of, the loss does
        near = LIKE_THE_LOSS[2 if autocast._enabled else max(2, activations(model.model).dtype.itemsize)]
        if not torch.isclose(again, result.loss, rtol=near, atol=near, equal_nan=True):
            raise StrategyError(HAS_CHANGED.format(what=""))
        return logits

    def depends_on() -> list[Tensor]:
        return [*model.parameters(), *model.buffers(), *([] if embeds is None else [embeds])]

    shape = (*inputs.targets.shape, getattr(model.head, "out_features", model.config.vocab_size))
    return result, Deferred(make, shape, dtype, inputs.targets.device, depends_on)


def _refuse_another_model(model: nn.Module, before: list[Settings], now: list[Settings]) -> None:
    """Refuse logits of modules that were ``before`` something else than ``now``, before a reading that is over.

    But for notes, which calls of the modules change themselves.

    Raises:
        StrategyError: naming the first thing that changed.
    """
    if before != now:
        notes = notes_of(now, settings(model, versions=True))
        changed = first_change(before, now, notes)
        if changed is not None:
            raise StrategyError(HAS_CHANGED.format(what=f" ({changed})"))


def _marks(tensors: list[Tensor]) -> list[tuple[int, int, int]]:
    """What tells whether tensors are the same ones, with the same values; an inference tensor's writes are not told."""
    return [
        (id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors
    ]


@torch.no_grad()
def _samples(tensors: list[Tensor]) -> dict[Any, Tensor]:
    """At most :data:`SAMPLES` numbers of each plain tensor, evenly spaced, as bytes by device and type.

    Writing through ``.data`` changes no version. Nothing waits for a device.
    """
    taken: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        size = tensor.numel()
        if type(tensor) in _PLAIN and size and tensor.is_contiguous() and not tensor.is_meta:
            step = -(-size // SAMPLES)
            some = tensor.as_strided((-(-size // step),), (step,))
            taken.setdefault((tensor.device, tensor.dtype), []).append(some)
    return {kind: torch.cat(some).view(torch.uint8) for kind, some in taken.items()}


def _same(some: dict[Any, Tensor], others: dict[Any, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(one, others[kind]) for kind, one in some.items())


_PLAIN = frozenset({Tensor, nn.Parameter})

_ASKED_OF_EVERY_ITEM = {
    *(getattr(Tensor, name).__get__ for name in ("device", "dtype", "ndim", "requires_grad", "shape")),
    Tensor.dim,
    Tensor.size,
}
