"""Tables of the keys that pydantic models have: their types, defaults and meanings."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Iterator
from enum import Enum
from itertools import pairwise
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from scripts.reference.markdown import line, prose, table

BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
PLAIN = {int: "integer", float: "number", str: "text", bool: "true or false"}


def section(model: type[BaseModel], key: str, level: int = 2, skip: frozenset[str] = frozenset()) -> str:
    """Return the heading, the description and the table of one model; `key` is where a recipe has it."""
    parts = [f"{'#' * level} `{key}`", prose(inspect.getdoc(model) or ""), keys(model, skip)]
    return "\n\n".join(part for part in parts if part)


def keys(model: type[BaseModel], skip: frozenset[str] = frozenset()) -> str:
    """Return the table of a model's keys, without those in `skip`; empty where there is none."""
    said = _field_docstrings(model)
    rows = []
    for name, field in model.model_fields.items():
        if name not in skip:
            meaning = field.description or said.get(name, "")
            shown = _words(field.annotation, field.metadata)
            rows.append([f"`{field.alias or name}`", shown, _default(field), line(meaning)])
    return table(["key", "value", "default", "meaning"], rows) if rows else ""


def nested(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield the models inside a model, each with the path of the first key that has it, depth first."""
    for name, field in model.model_fields.items():
        for inner in _models(field.annotation):
            many = "[]" if "tuple" in str(field.annotation) and _is_repeated(field.annotation, inner) else ""
            where = f"{path}{name}{many}"
            yield where, inner
            yield from nested(inner, f"{where}.")


def _is_repeated(annotation: Any, model: type[BaseModel]) -> bool:
    if typing.get_origin(annotation) is tuple:
        return model in _models(annotation)
    return any(_is_repeated(part, model) for part in typing.get_args(annotation))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        if not isinstance(part, str):
            yield from _models(part)


def _words(annotation: Any, metadata: list[Any]) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation is type(None):
        return "null"
    if annotation in PLAIN:
        return PLAIN[annotation] + _bounds(metadata)
    if origin is typing.Annotated:
        return _words(arguments[0], [*arguments[1:], *metadata])
    if origin is typing.Literal:
        return ", ".join(f"`{json.dumps(value) if value is None else value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(part, metadata) for part in arguments))
    if origin in (tuple, list):
        ends = ", ".join(dict.fromkeys(_words(part, []) for part in arguments if part is not Ellipsis))
        return f"list of: {ends}"
    if origin is dict:
        return f"map of {_words(arguments[0], [])} to {_words(arguments[1], [])}"
    return _name(annotation)


def _name(annotation: Any) -> str:
    name = getattr(annotation, "__name__", str(annotation))
    return {"StepConfig": "step", "LossConfig": "loss", "Any": "anything"}.get(name, f"map ({name})")


def _bounds(metadata: list[Any]) -> str:
    entries = [inner for entry in metadata for inner in (getattr(entry, "metadata", None) or [entry])]
    found = [
        f"{word} {_number(limit)}"
        for entry in entries
        for name, word in BOUNDS.items()
        if isinstance(limit := getattr(entry, name, None), int | float)
    ]
    return f" ({', '.join(found)})" if found else ""


def _number(limit: float) -> str:
    return "2^63" if limit == 2**63 else f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True) if not field.is_required() else PydanticUndefined
    return "required" if value is PydanticUndefined else f"`{json.dumps(_plain(value), ensure_ascii=False)}`"


def _plain(value: Any) -> Any:
    match value:
        case BaseModel():
            return {name: _plain(getattr(value, name)) for name in sorted(value.model_fields_set)}
        case tuple() | list():
            return [_plain(entry) for entry in value]
        case dict():
            return {str(key): _plain(entry) for key, entry in value.items()}
        case Enum():
            return value.value
    return value


def _field_docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Return the strings that stand below fields, by field, the parents' too."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if not (issubclass(cls, BaseModel) and cls is not BaseModel):
            continue
        [tree] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        body = getattr(tree, "body", [])
        for field, after in pairwise(body):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
                found[field.target.id] = str(after.value.value)
    return found
