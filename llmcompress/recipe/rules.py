"""The rules of a recipe: patterns and roles of layers, and the steps that these get."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

import llmcompress.methods  # noqa: F401 (registers them)
from llmcompress.methods.layer import StepConfig, step
from llmcompress.weight.inputs import GROUPS, InputName, describe_inputs

REGEX = "re:"
GLOB = frozenset("*?[")  # characters that make a pattern match other names
Role = Literal["query", "key", "value", "output", "gate", "up", "down"]


def _read_step(value: Any) -> Any:
    """Return a step from its map of arguments. Raises ValueError (pydantic's error is one) for what is not a step."""
    if isinstance(value, StepConfig):
        return value
    if not isinstance(value, dict):
        raise ValueError("a step is a map such as {method: rtn, bits: 4}")
    _check_arguments(value)
    return step(value)


def _check_arguments(arguments: dict[str, Any]) -> None:
    """Raise ValueError unless a step, and every step inside it, has text as keys and names a method."""
    if not isinstance(arguments.get("method"), str):
        raise ValueError('a step needs the key "method" with the name of a method')
    for key, value in arguments.items():
        if not isinstance(key, str):
            raise ValueError(f"the key {key!r} is not text")
        if isinstance(value, dict) and "method" in value:
            _check_arguments(value)


Step = Annotated[SerializeAsAny[StepConfig], BeforeValidator(_read_step)]


def matches(pattern: str, name: str) -> bool:
    """True if a pattern matches the whole module path `name`: a glob, or a regular expression after 're:'."""
    if pattern.startswith(REGEX):
        return _compile(pattern).fullmatch(name) is not None
    return fnmatchcase(name, pattern)


def is_name(pattern: str) -> bool:
    """True if a pattern matches nothing but itself."""
    return not pattern.startswith(REGEX) and GLOB.isdisjoint(pattern)


@lru_cache(maxsize=256)
def _compile(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a pattern. Raises ValueError if it is none."""
    try:
        return re.compile(pattern.removeprefix(REGEX))
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"match has {pattern[:100]!r}, which is no regular expression ({error})") from error


class Matching(BaseModel, extra="forbid", frozen=True):
    """A statement about the layers that match one of the patterns."""

    match: tuple[str, ...] = Field(min_length=1, description="globs on module paths, or regular expressions as 're:…'")

    @field_validator("match", mode="before", json_schema_input_type=str | tuple[str, ...])
    @classmethod
    def _wrap_single_pattern(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("match")
    @classmethod
    def _check_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            if not pattern.removeprefix(REGEX).strip():
                raise ValueError(f"match has the empty pattern {pattern!r}; write '*' for every layer")
            if pattern.startswith(REGEX):
                _compile(pattern)
        return patterns


class InputRounding(BaseModel, extra="forbid", frozen=True):
    """The numbers that inputs of layers are rounded to, as the engine that runs the model rounds them."""

    format: InputName = Field(description="the numbers: 8 bits, or 4 in groups of 16 (nvfp4)")
    scale: Literal["token", "tensor"] | None = Field(
        default=None,
        description="token: every token has a scale of its own; tensor: one is calibrated for all; null: token for fp8 "
        "and int8, tensor for nvfp4, whose groups have scales too, and neither for mxfp8, whose groups need no other",
    )

    @model_validator(mode="after")
    def _check_scale(self) -> InputRounding:
        known = {"nvfp4": "tensor", "mxfp8": None}
        if self.scale is not None and self.format in known and self.scale != known[self.format]:
            raise ValueError(
                f"{self.format} has a scale for {GROUPS[self.format]} numbers, so none by {self.scale}; leave scale out"
            )
        return self

    @property
    def is_calibrated(self) -> bool:
        """True if a number of the format comes from calibration text."""
        return self.scale == "tensor" or self.format == "nvfp4"

    def __str__(self) -> str:
        return describe_inputs(self.format, self.is_calibrated)


class Rule(Matching):
    """The steps for the layers that match one of the patterns or have one of the roles. Without steps, they stay dense.

    A fused layer, such as query, key and value in one, gets the steps of the part for which they store most bits.
    """

    match: tuple[str, ...] = Field(
        default=(),
        min_length=1,
        description="globs on module paths, or regular expressions as 're:…'; instead of role",
    )
    role: tuple[Role, ...] = Field(
        default=(),
        min_length=1,
        description="what layers do in their block, whatever the model family calls them; instead of match",
    )
    steps: tuple[Step, ...] = Field(description="methods in the order they run; []: the layers stay dense")
    inputs: InputRounding | None = Field(
        default=None, description="what the layers' inputs are rounded to; null: they stay as they are"
    )

    @field_validator("role", mode="before", json_schema_input_type=Role | tuple[Role, ...])
    @classmethod
    def _wrap_single_role(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_match_or_role(self) -> Rule:
        if bool(self.match) == bool(self.role):
            raise ValueError("give either match or role")
        if self.inputs is not None and not self.steps:
            raise ValueError("inputs: layers that stay dense get their inputs as they are; give steps, or drop inputs")
        return self

    @model_serializer(mode="wrap")
    def _drop_unused(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unused = {"role" if self.match else "match"} | ({"inputs"} if self.inputs is None else set())
        return {key: value for key, value in serialize(self).items() if key not in unused}

    def covers(self, name: str, role: str | None = None) -> bool:
        """True if the rule is about the layer `name`, or about its part that has `role`."""
        return role in self.role or any(matches(pattern, name) for pattern in self.match)
