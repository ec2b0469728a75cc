"""One line for a model whose parameters are of several dtypes that cannot be computed with together.

PyTorch's own errors name neither the parameter nor what would work. Nothing is looked at before there is such an error:
mixed dtypes that compute, as of decays, adapters or under autocast, are nobody's business.
"""

import re
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from rwkv_rev.errors import ConfigError
from rwkv_rev.printable import counted

Forward = TypeVar("Forward", bound=Callable[..., Any])

_ABOUT_DTYPES = re.compile(r"d-?type|scalar type|same type", re.IGNORECASE)


def naming_mixed_dtypes(forward: Forward) -> Forward:
    """A model's ``forward``, whose errors of PyTorch's about dtypes name a parameter that is of another one.

    Raises:
        ConfigError: in the place of such an error, where the model's parameters or its embeddings differ.
    """

    @wraps(forward)
    def naming(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        try:
            return forward(self, *args, **kwargs)
        except RuntimeError as error:
            found = (
                _difference(self, kwargs.get("inputs_embeds")) if _ABOUT_DTYPES.search(str(error)) else None
            )
            if found is None:
                raise
            raise ConfigError(found) from error

    return cast(Forward, naming)


def _difference(model: nn.Module, embeddings: Tensor | None) -> str | None:
    """What differs from most parameters of a model, and what works; None where nothing does."""
    kept: set[str] = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    dtypes = {
        name: parameter.dtype for name, parameter in model.named_parameters() if parameter.is_floating_point()
    }
    if not dtypes:
        return None
    usual = Counter(dtypes.values()).most_common(1)[0][0]
    odd = [
        name
        for name, dtype in dtypes.items()
        if dtype != usual and (dtype != torch.float32 or kept.isdisjoint(name.split(".")))
    ]
    if odd:
        return (
            f"{counted(len(odd), 'parameter')} of another dtype cannot be computed with the rest of the model, which "
            f"is {_short(usual)}: {odd[0]} is {_short(dtypes[odd[0]])}; call model.to({usual})"
        )
    if embeddings is not None and embeddings.dtype != usual:
        return (
            f"inputs_embeds are {_short(embeddings.dtype)}, which cannot be computed with the model, which is "
            f"{_short(usual)}: give inputs_embeds.to({usual})"
        )
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
