"""What an export kept and what it changed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Exported:
    """What an export did. `kept`, `changed`: sentences; bytes are those of the weights."""

    to: str
    output: str
    bytes_before: int
    bytes_after: int
    kept: tuple[str, ...]
    changed: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, keys as in the fields."""
        return asdict(self)
