"""Numbers and times as people read them."""

from __future__ import annotations

import math
from typing import Any


def duration(seconds: float) -> str:
    """Seconds as "48 s", "3 min 20 s" or "1 h 2 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def finite(value: Any) -> Any:
    """The same plain value with null for NaN and Inf, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, list | tuple) else value
