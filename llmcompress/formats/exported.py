"""The result of an export: sizes, and sentences on what it kept and changed."""

from __future__ import annotations

from dataclasses import dataclass

from llmcompress.runtime.json_values import JsonRecord

ALLOW_DENSE = "allow dense layers (--allow-dense, or allow_dense=True), which hold it in 16-bit floats"


@dataclass(frozen=True)
class Exported(JsonRecord):
    """Result of an export. `kept`, `changed`: sentences; bytes are those of the weights."""

    to: str
    output: str
    bytes_before: int
    bytes_after: int
    kept: tuple[str, ...]
    changed: tuple[str, ...]
