"""The result of an export: sizes, and sentences on what it kept and changed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

ALLOW_DENSE = "allow dense layers (--allow-dense, or allow_dense=True), which hold it in 16-bit floats"


@dataclass(frozen=True)
class Exported:
    """Result of an export. `kept`, `changed`: sentences; bytes are those of the weights."""

    to: str
    output: str
    bytes_before: int
    bytes_after: int
    kept: tuple[str, ...]
    changed: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values, keys as in the fields."""
        return asdict(self)
