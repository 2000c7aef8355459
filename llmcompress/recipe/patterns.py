"""Patterns on module paths: globs, and regular expressions."""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import lru_cache
from math import prod
from typing import Any

import regex
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
)
from pydantic_core import SchemaError, SchemaValidator, core_schema

from llmcompress.errors import RecipeError
from llmcompress.recipe.yaml import shortened

REGEX = "re:"
LONGEST = 300  # characters of a pattern
GROUPS, REPEATS = 10, 1000  # most in an expression that looks around or back; its repeats multiply
SECONDS = 0.2  # for such an expression and one name


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
            if len(pattern) > LONGEST:
                raise ValueError(f"match has a pattern of {len(pattern)} characters; write at most {LONGEST}")
            if pattern.startswith(REGEX):
                _expression(pattern)
        return patterns


def matches(pattern: str, name: str) -> bool:
    """True if a recipe's pattern matches the module `name`: a glob on the whole path, or 're:' and a full match.

    Raises RecipeError for an expression that takes too long.
    """
    return _expression(pattern)(name) if pattern.startswith(REGEX) else fnmatchcase(name, pattern)


@lru_cache(maxsize=256)
def _expression(pattern: str) -> Callable[[str], bool]:
    """Return what tells whether a regular expression matches all of a name. Raises ValueError for one that is none.

    Rust's engine, which pydantic brings, needs time in proportion to the name. Only what it lacks, looking around and
    back, is left to an engine that tries, and can be stopped.
    """
    text = pattern.removeprefix(REGEX)
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        reason = str(error) if isinstance(error, re.error) else "it is nested too deeply, or repeats too often"
        raise ValueError(f"match has {pattern!r}, which is no regular expression ({reason})") from error
    try:
        return SchemaValidator(core_schema.str_schema(pattern=rf"\A(?:{text})\z", strict=True)).isinstance_python
    except SchemaError:
        return _trying(pattern, text)


def _trying(pattern: str, text: str) -> Callable[[str], bool]:
    """Return the same by an engine that tries one way after another. Raises ValueError where that may be too many."""
    repeats = [int(number) for number in re.findall(r"[{,](\d{1,9})(?=[,}])", text)]
    if text.count("(") > GROUPS or prod(repeats) > REPEATS:
        raise ValueError(
            f"match has {shortened(pattern, 100)!r}, which may take too long: an expression that looks around or "
            f"back, or is very large, may have {GROUPS} groups and repeat {REPEATS} times; write several patterns"
        )
    try:
        compiled = regex.compile(text)
    except (regex.error, RecursionError) as error:
        raise ValueError(f"match has {pattern!r}, which is no regular expression ({error})") from error

    def matched(name: str) -> bool:
        try:
            return compiled.fullmatch(name, timeout=SECONDS) is not None
        except TimeoutError as error:
            raise RecipeError(
                f"match: {shortened(pattern, 100)!r} takes more than {SECONDS:g} seconds for the layer {name}; write "
                "it without repeats inside repeats"
            ) from error

    return matched
