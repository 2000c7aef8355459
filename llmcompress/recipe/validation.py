"""Check plain values against a schema. Any mistake is one sentence: where, what, and which values are possible."""

from __future__ import annotations

import functools
import json
import math
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from llmcompress.errors import RecipeError
from llmcompress.losses.loss import LossConfig, feature_losses, losses
from llmcompress.methods.layer import StepConfig, methods
from llmcompress.recipe.yaml import Path, Places, at, shorten

S = TypeVar("S", bound=BaseModel)
_BOUNDS = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
_EXPECTED = "Input should be "  # the beginning of many messages of pydantic


@dataclass(frozen=True)
class Spot:
    """A place in a recipe: its schema, the schema's label in messages, and the key inside it (None: all of it)."""

    model: type[BaseModel] | None
    label: str
    key: str | None

    @property
    def field(self) -> FieldInfo | None:
        """The field of the schema at the key, if it has one."""
        return None if self.model is None or self.key is None else fields(self.model).get(self.key)


def validate(schema: type[S], values: Mapping[str, Any], places: Places) -> S:
    """Return plain values as an object of `schema`. Raises RecipeError for the mistake that comes first in the file.

    True is no number, although pydantic takes it for 1; nor are infinity and NaN.
    """
    try:
        result = schema.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_first_complaint(error, schema, values, places)) from error
    for path in _doubtful_paths(values, ()):
        spot = locate(schema, values, path)
        wanted = _requirement(spot, path)
        value = functools.reduce(_inside, path, values)
        if isinstance(value, float):
            wanted = f"{wanted if 'number' in wanted else 'a number'}, and finite"
        elif spot.key is None or "true" in wanted or not ("number" in wanted or wanted.isdigit()):
            continue
        raise RecipeError(at(path, places) + _intro(spot) + _misfit(spot, path, value, f"be {wanted}"))
    return result


def _first_complaint(error: ValidationError, model: type[BaseModel], values: Any, places: Places) -> str:
    """Return the sentence for the complaint that comes first in the file."""
    complaints = [
        (_existing_part(path, values), path, details)
        for path, details in _flatten(error, ())
        if not (details["type"] == "too_short" and details["input"])  # too few valid items: those have their own errors
    ]
    order = list(places)

    def rank(complaint: tuple[Path, Path, Any]) -> tuple[bool, int]:
        """Document order, but a misspelt key before the key that is missing because of it."""
        path, _, details = complaint
        return details["type"] == "missing", order.index(path) if path in places else len(order)

    path, whole, details = min(complaints, key=rank)
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
            wanted = f"be {_requirement(spot, path)}"
            if kind in ("too_short", "string_too_short"):
                wanted = "not be empty"
            elif spot.model is None and message.startswith(_EXPECTED):  # a value in a map whose keys no schema lists
                wanted = f"be {message.removeprefix(_EXPECTED)}"
            message = _misfit(spot, path, details["input"], wanted)
    return at(path, places) + _intro(spot) + message


def unknown_key(key: str, spot: Spot) -> str:
    """Return the sentence about a key that the schema at `spot` does not have."""
    known = [] if spot.model is None else list(fields(spot.model))
    return f'unknown key "{shorten(key, 100)}" in {spot.label or "the recipe"}; {hint(key, known)}'


def hint(name: str, known: Sequence[str]) -> str:
    """Return the nearest of the known names, or all of them."""
    near = get_close_matches(name, known, n=1)
    return f'did you mean "{near[0]}"?' if near else f"known: {', '.join(known)}"


def locate(model: type[BaseModel], values: Any, path: Path) -> Spot:
    """Return the schema at `path` of the plain `values`, and the key inside it."""
    spot = Spot(model, "", None)
    schema: type[BaseModel] | None = model
    label = ""
    for part in path:
        values = _inside(values, part)
        if isinstance(part, int):
            label = f"rule {part + 1}" if label == "rules" else label
        else:
            spot = Spot(schema, "" if schema is model else label, part)
            schema, label = (None if spot.field is None else _schema_in(spot.field.annotation)), part
        if isinstance(values, dict) and schema is not None:
            schema, label = _registered_schema(schema, values) or (schema, label)
            label = "" if "version" in schema.model_fields else label  # a section that is a recipe of its own
            spot = Spot(schema, label, None)
    return spot


def _registered_schema(schema: type[BaseModel], values: dict[str, Any]) -> tuple[type[BaseModel], str] | None:
    """Return the schema and the label of a step or a loss, by the name in its map; None for other schemas."""
    registries: dict[type[BaseModel], tuple[str, str, Mapping[str, Any]]] = {
        StepConfig: ("method", "step", methods()),
        LossConfig: ("loss", "loss", losses() | feature_losses()),
    }
    if schema not in registries:
        return None
    key, label, known = registries[schema]
    name = values.get(key)
    entry = known.get(name) if isinstance(name, str) else None
    return (schema, "") if entry is None else (entry.config, f"{label} {name}")


def fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a schema, keyed as a recipe spells them."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def is_open(model: type[BaseModel], values: Any, path: Path) -> bool:
    """True if `path` is a key in a map whose keys no schema lists, such as rates."""
    field = locate(model, values, path[:-1]).field
    return field is not None and _is_map(field.annotation)


def _requirement(spot: Spot, path: Path) -> str:
    """Return what the field at `path` takes, in words: "a number at least 0 and at most 1 or null"."""
    if spot.field is None:
        return "a map of keys"
    if isinstance(path[-1], int):
        return " or ".join(_kinds(get_args(spot.field.annotation)[0]))
    bounds = [
        f"{words} {getattr(limit, name)}"
        for limit in spot.field.metadata
        for name, words in _BOUNDS.items()
        if getattr(limit, name, None) is not None
    ]
    kinds = list(dict.fromkeys(_kinds(spot.field.annotation)))
    numeric = next((index for index, kind in enumerate(kinds) if "number" in kind), None)
    if bounds and numeric is not None:
        kinds[numeric] += f" {' and '.join(bounds)}"
    return " or ".join(kinds)


def _misfit(spot: Spot, path: Path, value: Any, wanted: str) -> str:
    name = f"item {path[-1] + 1} of {spot.key}" if path and isinstance(path[-1], int) else spot.key
    return f"{name or 'the recipe'} is {_show(value)}; it must {wanted}"


def _show(value: Any) -> str:
    """Return a value as a recipe would spell it, shortened."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


def _intro(spot: Spot) -> str:
    return f"{spot.label}: " if spot.label else ""


def _doubtful_paths(values: Any, path: Path) -> Iterator[Path]:
    """Yield the paths of booleans, and of numbers that are not finite."""
    if isinstance(values, bool) or (isinstance(values, float) and not math.isfinite(values)):
        yield path
    entries: Iterable[tuple[Any, Any]] = values.items() if isinstance(values, Mapping) else ()
    for key, value in enumerate(values) if isinstance(values, list | tuple) else entries:
        yield from _doubtful_paths(value, (*path, key))


def _kinds(annotation: Any) -> Iterator[str]:
    """Yield the values that an annotation allows, in words."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        for option in get_args(annotation):
            yield from _kinds(option)
    elif origin is Literal:
        yield from (_show(option) for option in get_args(annotation))
    elif origin in (tuple, list):
        inner = get_args(annotation)[0]
        yield f"a list of {' or '.join(_kinds(inner))}" if get_origin(inner) is Literal else "a list"
    elif origin is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        yield "a map of keys"
    else:
        yield _KINDS.get(annotation, str(annotation))


def _schema_in(annotation: Any) -> type[BaseModel] | None:
    """Return the schema inside an annotation such as `Gates | None` or `tuple[Rule, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((schema for option in get_args(annotation) if (schema := _schema_in(option)) is not None), None)


def _is_map(annotation: Any) -> bool:
    """True if the annotation is or may be a dict."""
    return get_origin(annotation) is dict or any(_is_map(option) for option in get_args(annotation))


def _flatten(error: ValidationError, path: Path) -> Iterator[tuple[Path, Any]]:
    """Yield all errors, also those of steps, which have a validation of their own."""
    for details in error.errors():
        inner = details.get("ctx", {}).get("error")
        place = (*path, *details["loc"])
        if isinstance(inner, ValidationError):
            yield from _flatten(inner, place)
        else:
            yield place, details


def _existing_part(path: Path, values: Any) -> Path:
    """Return the part of a location that exists in the values; the rest names types of a union, or missing keys."""
    for length, part in enumerate(path):
        if not _has(values, part):
            return path[:length]
        values = _inside(values, part)
    return path


def _has(values: Any, part: str | int) -> bool:
    if isinstance(part, int):
        return isinstance(values, list | tuple) and part < len(values)
    return isinstance(values, Mapping) and part in values


def _inside(values: Any, part: str | int) -> Any:
    return values[part] if _has(values, part) else None
