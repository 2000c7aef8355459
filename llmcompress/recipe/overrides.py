"""Changes to a recipe before it is validated: settings as text, and typed values.

A setting such as "rules[0].steps[1].rank=16" changes one value at any depth, as `--set` does. A `Change` replaces a
top-level value with a Python value, as `--seed` and `--bpw` do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from llmcompress.errors import RecipeError
from llmcompress.recipe.error_messages import fields, is_open, locate, unknown_key
from llmcompress.recipe.yaml import DEEPEST, Path, Places, dotted, parse, shortened

LONGEST_SHOWN = 120  # characters of a setting in an error message
_PART = re.compile(r"([A-Za-z_][A-Za-z_0-9]*)((?:\[\d{1,6}\])*)")


def overrides(
    schema: type[BaseModel], values: dict[str, Any], settings: Sequence[str], places: Places | None = None
) -> dict[str, Any]:
    """Return a copy of a recipe's plain `values` with settings such as "rules[0].steps[1].rank=16" applied.

    A setting changes a key that is present, or one that the schema knows. `places` is updated: errors name the setting.
    Raises RecipeError.
    """
    values = deepcopy(values)
    places = {} if places is None else places
    for setting in settings:
        path, value = _parsed_setting(setting)
        where = f"--set {shortened(setting, LONGEST_SHOWN)}"
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


@dataclass(frozen=True)
class Change:
    """A value for the top-level `key` of a recipe. `origin`: the option that asks for it, named in errors; `keep`: True
    to leave a value other than null as it is; `stay`: the keys of a section that stay as they are."""

    key: str
    value: Any
    origin: str
    keep: bool = False
    stay: tuple[str, ...] = ()


def changed(values: dict[str, Any], changes: Sequence[Change], places: Places) -> dict[str, Any]:
    """Return a copy of a recipe's `values` with the changes made. `places` is updated: errors name the origin."""
    values = dict(values)
    for change in changes:
        if not change.keep or values.get(change.key) is None:
            old = values.get(change.key)
            staying = {key: old[key] for key in change.stay if key in old} if isinstance(old, dict) else {}
            values[change.key] = change.value | staying if staying else change.value
            _move(places, (change.key,), change.origin)
    return values


def _move(places: Places, path: Path, where: str) -> None:
    """Note that the entry at `path`, with all inside it, now comes from `where`."""
    for old in [place for place in places if place[: len(path)] == path]:
        del places[old]
    places[path] = where


def _parsed_setting(setting: str) -> tuple[Path, Any]:
    """The path and the value of "rules[0].steps[1].rank=16"."""
    target, equals, text = setting.partition("=")
    where = f"--set {shortened(setting, LONGEST_SHOWN)}"
    path: list[str | int] = []
    for word in target.strip().split("."):
        found = _PART.fullmatch(word)
        if not found or not equals:
            raise RecipeError(f"{where}: this is not of the form key=value, such as rules[0].steps[1].rank=16")
        path += [found[1], *(int(index) for index in re.findall(r"\d+", found[2]))]
    if not text.strip():
        raise RecipeError(f"{where}: there is no value; write null for none")
    if len(path) > DEEPEST:
        raise RecipeError(f"{where}: this is deeper than a recipe needs (at most {DEEPEST} levels)")
    return tuple(path), parse(text, where)[0]


def _check_part(values: dict[str, Any], path: Path, inside: Any, where: str, schema: type[BaseModel]) -> None:
    """Raises RecipeError if the last part of `path` is not in `inside` and cannot be added there."""
    part, outer = path[-1], dotted(path[:-1])
    if isinstance(part, int):
        if not isinstance(inside, list):
            raise RecipeError(f"{where}: {outer} is not a list")
        if part >= len(inside):
            raise RecipeError(f"{where}: {outer} has {len(inside)} entries, counted from 0; there is no [{part}]")
    elif not isinstance(inside, dict):
        raise RecipeError(f"{where}: {outer} has no keys, so there is no {dotted(path)}")
    elif part not in inside and not is_open(schema, values, path):
        spot = locate(schema, values, path[:-1])
        if spot.model is None or part not in fields(spot.model):
            raise RecipeError(f"{where}: {unknown_key(part, spot)}")
