"""Sentences for what pydantic finds wrong with a recipe: where, what, and which values are possible."""

from __future__ import annotations

import functools
import json
import math
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from llmcompress.errors import RecipeError
from llmcompress.losses.features import feature_losses
from llmcompress.losses.loss import LossConfig, losses
from llmcompress.methods.layer import StepConfig, methods
from llmcompress.recipe.yaml import Path, Places, at, shortened

_BOUNDS = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
EXPECTED = "Input should be "  # pydantic's way to begin


@dataclass(frozen=True)
class Spot:
    """A place in a recipe: its schema, the label of that in messages, and the key inside it (None: all of it)."""

    model: type[BaseModel] | None
    label: str
    key: str | None


def first_complaint(error: ValidationError, model: type[BaseModel], values: Any, places: Places) -> str:
    """Return the sentence for the complaint that comes first in the file."""
    found = [
        (_trimmed(path, values), path, details)
        for path, details in _flattened(error, ())
        if not (details["type"] == "too_short" and details["input"])  # too few valid items: those have their own errors
    ]
    order = list(places)

    def rank(one: tuple[Path, Path, Any]) -> tuple[bool, int]:
        """Document order, but a misspelt key before the key that is missing because of it."""
        return one[2]["type"] == "missing", order.index(one[0]) if one[0] in places else len(order)

    path, whole, details = min(found, key=rank)
    spot = locate(model, values, path)
    message = details["msg"].removeprefix("Value error, ")
    match details["type"]:
        case "extra_forbidden":
            return at(path, places) + unknown_key(str(path[-1]), locate(model, values, path[:-1]))
        case "missing":
            return at(path, places) + f'{_intro(spot)}the key "{whole[-1]}" is missing'
        case "value_error" | "assertion_error":
            if spot.key is not None and message.startswith("the "):
                message = f"{spot.key} is {message}"
            elif spot.key is not None and spot.key not in message:
                message = f"{spot.key}: {message}"
        case kind:
            wanted = f"be {requirement(spot, path)}"
            if kind in ("too_short", "string_too_short"):
                wanted = "not be empty"
            elif spot.model is None and message.startswith(EXPECTED):  # a value in a map, whose keys no schema lists
                wanted = f"be {message.removeprefix(EXPECTED)}"
            message = _misfit(spot, path, details["input"], wanted)
    return at(path, places) + _intro(spot) + message


def check_numbers(model: type[BaseModel], values: Any, places: Places) -> None:
    """Raises RecipeError for true or false in place of a number, which pydantic would take for 1 and 0, and for numbers
    that are infinite or none."""
    for path in _doubtful(values, ()):
        spot = locate(model, values, path)
        wanted = requirement(spot, path)
        value = functools.reduce(_inside, path, values)
        if isinstance(value, float):
            wanted = wanted if "number" in wanted else "a number"
            raise RecipeError(at(path, places) + _intro(spot) + _misfit(spot, path, value, f"be {wanted}, and finite"))
        if spot.key is not None and ("number" in wanted or wanted.isdigit()) and "true" not in wanted:
            raise RecipeError(at(path, places) + _intro(spot) + _misfit(spot, path, value, f"be {wanted}"))


def unknown_key(key: str, spot: Spot) -> str:
    """Return the sentence about a key that the schema at `spot` does not have."""
    known = [] if spot.model is None else list(fields(spot.model))
    return f'unknown key "{shortened(key, 100)}" in {spot.label or "the recipe"}; {hint(key, known)}'


def hint(name: str, known: Sequence[str]) -> str:
    """Return the nearest of the known names, or all of them."""
    near = get_close_matches(name, known, n=1)
    return f'did you mean "{near[0]}"?' if near else f"known: {', '.join(known)}"


def locate(model: type[BaseModel], values: Any, path: Path) -> Spot:
    """Return the schema at `path` of the raw `values`, and the key inside it."""
    spot = Spot(model, "", None)
    rules: type[BaseModel] | None = model
    label = ""
    for part in path:
        values = _inside(values, part)
        if isinstance(part, int):
            label = f"rule {part + 1}" if label == "rules" else label
        else:
            spot = Spot(rules, "" if rules is model else label, part)
            field = None if rules is None else fields(rules).get(part)
            rules, label = (None if field is None else _model(field.annotation)), part
        if isinstance(values, dict) and rules is not None:
            rules, label = _registered(rules, values) or (rules, label)
            label = "" if "version" in rules.model_fields else label  # a section that is a recipe of its own
            spot = Spot(rules, label, None)
    return spot


def _registered(rules: type[BaseModel], values: dict[str, Any]) -> tuple[type[BaseModel], str] | None:
    """The arguments' schema and the label of a step or a loss, by the name in its map; None for other schemas."""
    registries: dict[type[BaseModel], tuple[str, Mapping[str, Any]]] = {
        StepConfig: ("method", methods()),
        LossConfig: ("loss", losses() | feature_losses()),
    }
    if rules not in registries:
        return None
    key, known = registries[rules]
    name = values.get(key)
    found = known.get(name) if isinstance(name, str) else None
    label = "step" if key == "method" else key
    return (rules, "") if found is None else (found.config, f"{label} {name}")


def fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a schema, keyed as a recipe spells them."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def is_open(model: type[BaseModel], values: Any, path: Path) -> bool:
    """True if `path` is the key of a map whose keys no schema lists, such as rates: it is judged with the whole."""
    spot = locate(model, values, path[:-1])
    field = None if spot.model is None or spot.key is None else fields(spot.model).get(spot.key)
    return field is not None and _is_map(field.annotation)


def requirement(spot: Spot, path: Path) -> str:
    """Return what the field at `path` takes, in words: "a number at least 0 and at most 1 or null"."""
    field = None if spot.model is None or spot.key is None else fields(spot.model).get(spot.key)
    if field is None:
        return "a map of keys"
    if isinstance(path[-1], int):
        return " or ".join(_kinds(get_args(field.annotation)[0]))
    bounds = [
        f"{words} {getattr(limit, name)}"
        for limit in field.metadata
        for name, words in _BOUNDS.items()
        if getattr(limit, name, None) is not None
    ]
    kinds = list(dict.fromkeys(_kinds(field.annotation)))
    numeric = next((i for i, kind in enumerate(kinds) if "number" in kind), None)
    if bounds and numeric is not None:
        kinds[numeric] += f" {' and '.join(bounds)}"
    return " or ".join(kinds)


def shown(value: Any) -> str:
    """Return a value as a recipe would spell it, shortened."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


def _misfit(spot: Spot, path: Path, value: Any, wanted: str) -> str:
    what = f"item {path[-1] + 1} of {spot.key}" if path and isinstance(path[-1], int) else spot.key
    return f"{what or 'the recipe'} is {shown(value)}; it must {wanted}"


def _doubtful(values: Any, path: Path) -> Iterator[Path]:
    """The paths of booleans, and of numbers that are not finite."""
    if isinstance(values, bool) or (isinstance(values, float) and not math.isfinite(values)):
        yield path
    for key, value in _entries(values):
        yield from _doubtful(value, (*path, key))


def _entries(values: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(values, dict):
        return values.items()
    return enumerate(values) if isinstance(values, list | tuple) else ()


def _kinds(annotation: Any) -> Iterator[str]:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        for option in get_args(annotation):
            yield from _kinds(option)
    elif origin is Literal:
        yield from (shown(option) for option in get_args(annotation))
    elif origin in (tuple, list):
        inner = get_args(annotation)[0]
        yield f"a list of {' or '.join(_kinds(inner))}" if get_origin(inner) is Literal else "a list"
    elif origin is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        yield "a map of keys"
    else:
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
        yield names.get(annotation, str(annotation))


def _model(annotation: Any) -> type[BaseModel] | None:
    """The schema inside an annotation such as `Gates | None` or `tuple[Rule, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for option in get_args(annotation) if (found := _model(option)) is not None), None)


def _is_map(annotation: Any) -> bool:
    """True if the annotation is or may be a dict."""
    return get_origin(annotation) is dict or any(_is_map(option) for option in get_args(annotation))


def _flattened(error: ValidationError, path: Path) -> Iterator[tuple[Path, Any]]:
    """The errors, also those of steps, which are validated in a validation of their own."""
    for details in error.errors():
        inner = details.get("ctx", {}).get("error")
        here = (*path, *details["loc"])
        if isinstance(inner, ValidationError):
            yield from _flattened(inner, here)
        else:
            yield here, details


def _trimmed(path: Path, values: Any) -> Path:
    """The part of a pydantic location that exists in the values; the rest names types of a union, or missing keys."""
    for length, part in enumerate(path):
        if not _has(values, part):
            return path[:length]
        values = _inside(values, part)
    return path


def _has(values: Any, part: str | int) -> bool:
    if isinstance(part, int):
        return isinstance(values, list | tuple) and part < len(values)
    return isinstance(values, dict) and part in values


def _inside(values: Any, part: str | int) -> Any:
    return values[part] if _has(values, part) else None


def _intro(spot: Spot) -> str:
    return f"{spot.label}: " if spot.label else ""
