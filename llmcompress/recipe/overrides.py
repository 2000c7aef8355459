"""Changes to a recipe before it is validated: `--set` at any depth, and options such as `--seed` at the top."""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from llmcompress.errors import RecipeError
from llmcompress.recipe.validation import fields, is_open, locate, unknown_key
from llmcompress.recipe.yaml import Path, Places, dotted_path, parse, shorten

_PART = re.compile(r"([A-Za-z_][A-Za-z_0-9]*)((?:\[\d{1,6}\])*)")


@dataclass(frozen=True)
class Change:
    """A Python value for the top-level `key` of a recipe."""

    key: str
    value: Any
    origin: str  # the option that asks for it, named in errors
    keep: bool = False  # True to leave a value other than null as it is
    stay: tuple[str, ...] = ()  # keys of a section that stay as they are


def apply_changes(values: dict[str, Any], changes: Sequence[Change], places: Places) -> dict[str, Any]:
    """Return a copy of a recipe's plain `values` with the changes made. `places` is updated to their origins."""
    values = dict(values)
    for change in changes:
        old = values.get(change.key)
        if not change.keep or old is None:
            staying = {key: old[key] for key in change.stay if key in old} if isinstance(old, dict) else {}
            values[change.key] = change.value | staying if staying else change.value
            _move(places, (change.key,), change.origin)
    return values


def apply_settings(
    schema: type[BaseModel], values: dict[str, Any], settings: Sequence[str], places: Places
) -> dict[str, Any]:
    """Return a copy of a recipe's plain `values` with settings such as "rules[0].steps[1].rank=16" applied.

    A setting changes a key that is present, or adds one that the schema knows. `places` is updated to the settings.
    Raises RecipeError.
    """
    values = deepcopy(values)
    for setting in settings:
        where = f"--set {shorten(setting, 120)}"
        path, value = _parse_setting(setting, where)
        inside: Any = values
        for length, part in enumerate(path[:-1], start=1):
            _check_part(values, path[:length], inside, where, schema)
            if isinstance(inside, dict) and inside.get(part) is None:
                inside[part] = {}
            inside = inside[part]
        _check_part(values, path, inside, where, schema)
        inside[path[-1]] = value
        _move(places, path, where)
    return values


def _move(places: Places, path: Path, where: str) -> None:
    """Note that the entry at `path`, with all inside it, now comes from `where`."""
    for old in [place for place in places if place[: len(path)] == path]:
        del places[old]
    places[path] = where


def _parse_setting(setting: str, where: str) -> tuple[Path, Any]:
    """Return the path and the value of "rules[0].steps[1].rank=16"."""
    target, equals, text = setting.partition("=")
    path: list[str | int] = []
    for word in target.strip().split("."):
        part = _PART.fullmatch(word)
        if not part or not equals:
            raise RecipeError(f"{where}: this is not of the form key=value, such as rules[0].steps[1].rank=16")
        path += [part[1], *(int(index) for index in re.findall(r"\d+", part[2]))]
    if not text.strip():
        raise RecipeError(f"{where}: there is no value; write null for none")
    return tuple(path), parse(text, where)[0]


def _check_part(values: dict[str, Any], path: Path, inside: Any, where: str, schema: type[BaseModel]) -> None:
    """Raise RecipeError if the last part of `path` is not in `inside` and cannot be added there."""
    part, outer = path[-1], dotted_path(path[:-1])
    if isinstance(part, int):
        if not isinstance(inside, list):
            raise RecipeError(f"{where}: {outer} is not a list")
        if part >= len(inside):
            raise RecipeError(f"{where}: {outer} has {len(inside)} entries, counted from 0; there is no [{part}]")
    elif not isinstance(inside, dict):
        raise RecipeError(f"{where}: {outer} has no keys, so there is no {dotted_path(path)}")
    elif part not in inside and not is_open(schema, values, path):
        spot = locate(schema, values, path[:-1])
        if spot.model is None or part not in fields(spot.model):
            raise RecipeError(f"{where}: {unknown_key(part, spot)}")
