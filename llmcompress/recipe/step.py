"""A step as a recipe spells it: the name of a method and its arguments."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

import llmcompress.methods  # noqa: F401 (registers them)
from llmcompress.methods.layer import StepConfig, step


def _step(value: Any) -> Any:
    """A step from its map of arguments. Raises ValueError (pydantic's kind is one) for what is not a step."""
    if not isinstance(value, dict):
        if isinstance(value, StepConfig):
            return value
        raise ValueError("a step is a map such as {method: rtn, bits: 4}")
    _check_plain(value)
    return step(value)


def _check_plain(arguments: dict[str, Any]) -> None:
    """Raises ValueError for what `step` takes for granted of a map, and of the steps inside it."""
    if not isinstance(arguments.get("method"), str):
        raise ValueError('a step needs the key "method" with the name of a method')
    for key, value in arguments.items():
        if not isinstance(key, str):
            raise ValueError(f"the key {key!r} is not text")
        if isinstance(value, dict) and "method" in value:
            _check_plain(value)


Step = Annotated[SerializeAsAny[StepConfig], BeforeValidator(_step)]
