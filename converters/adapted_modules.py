"""Which modules a configuration of peft's adapts, as far as lists of names and of layers say it.

peft makes an adapter of a module that ``target_modules`` names (the whole name, or its end), where
``layers_to_transform`` has the layer, and that ``exclude_modules`` does not name; tensors of others in the file it
leaves out (``check_target_module_exists``). A whole name in ``target_modules`` counts in every layer.

Limit: of texts, which peft takes as regular expressions or as ``all-linear``, nothing is concluded.
"""

import re
from collections.abc import Mapping
from typing import Any

SELECTING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_LAYER = re.compile(r"(?:^|.*?\.)([^.]+)\.(\d+)\.")


def selects(name: str, value: object) -> bool:
    """Whether a field of :data:`SELECTING` holds what peft writes there."""
    if name == "layers_to_transform":
        listed = value if isinstance(value, list) else [] if value is None else [value]
        return all(isinstance(each, int) and not isinstance(each, bool) for each in listed)
    return (
        value is None
        or isinstance(value, str)
        or (isinstance(value, list) and all(isinstance(each, str) for each in value))
    )


def not_adapted(settings: Mapping[str, Any], module: str) -> str | None:
    """The field by which peft does not adapt a module; None where it does."""
    targets, excluded = settings.get("target_modules"), settings.get("exclude_modules")
    if isinstance(excluded, list) and _named(excluded, module):
        return "exclude_modules"
    if not isinstance(targets, list) or module in targets:
        return None
    if not _named(targets, module):
        return "target_modules"
    layers = settings.get("layers_to_transform")
    if layers is None or layers == []:
        return None
    patterns = settings.get("layers_pattern") or []
    found = _LAYER.match(module)
    if found is None or int(found[2]) not in (layers if isinstance(layers, list) else [layers]):
        return "layers_to_transform"
    if found[1] not in ([patterns] if isinstance(patterns, str) else patterns or [found[1]]):
        return "layers_pattern"
    return None


def _named(names: list[str], module: str) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)
