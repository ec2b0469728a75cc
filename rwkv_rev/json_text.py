"""JSON that every reader takes: the format has no NaN and no infinity, which Python writes all the same."""

import json
import math
from typing import Any


def finite(value: Any) -> Any:
    """Plain values, of which every number that is not finite is None, ``null`` in JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value


def json_text(value: Any, **options: Any) -> str:
    """``json.dumps`` of :func:`finite` values; ``options`` are those of ``json.dumps``."""
    return json.dumps(finite(value), allow_nan=False, **options)
