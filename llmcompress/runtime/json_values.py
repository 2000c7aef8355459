"""Plain values for JSON: dataclasses as dictionaries, and null in place of NaN and infinity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class JsonRecord:
    """A frozen dataclass whose fields are plain values, or dataclasses of such."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values; the keys are the names of the fields."""
        return asdict(self)


def replace_nonfinite(value: Any) -> Any:
    """Return the same plain value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: replace_nonfinite(entry) for key, entry in value.items()}
    return [replace_nonfinite(entry) for entry in value] if isinstance(value, list | tuple) else value
