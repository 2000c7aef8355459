"""Patterns on module paths: globs, and regular expressions."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
)

REGEX = "re:"


class Matching(BaseModel):
    """A statement about the layers that match one of the patterns."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    match: tuple[str, ...] = Field(min_length=1, description="globs on module paths, or regular expressions as 're:…'")

    @field_validator("match", mode="before", json_schema_input_type=str | tuple[str, ...])
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("match")
    @classmethod
    def _readable(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            if not pattern.removeprefix(REGEX).strip():
                raise ValueError(f"match has the empty pattern {pattern!r}; write '*' for every layer")
            if pattern.startswith(REGEX):
                try:
                    re.compile(pattern.removeprefix(REGEX))
                except re.error as error:
                    raise ValueError(f"match has {pattern!r}, which is no regular expression ({error})") from error
        return patterns


def matches(pattern: str, name: str) -> bool:
    """True if a recipe's pattern matches the module `name`: a glob on the whole path, or 're:' and a full match."""
    if pattern.startswith(REGEX):
        return re.fullmatch(pattern.removeprefix(REGEX), name) is not None
    return fnmatchcase(name, pattern)
