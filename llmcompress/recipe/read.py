"""Read recipes from YAML files or plain values, write them, and describe them as a JSON schema.

Any mistake in a recipe is a RecipeError: one sentence that names the line. Changes come before the check: `--set` at
any depth, and options such as `--seed` at the top.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, TypeVar

from pydantic import BaseModel

from llmcompress.errors import RecipeError
from llmcompress.losses.loss import LossConfig, feature_losses, losses
from llmcompress.methods.layer import StepConfig, methods
from llmcompress.recipe.calibration import Calibration
from llmcompress.recipe.compression import Origin, Recipe
from llmcompress.recipe.library import find_recipe
from llmcompress.recipe.text_files import files_sha256, hide_folder, is_file, last_part, list_files
from llmcompress.recipe.validation import fields, is_open, locate, unknown_key, validate
from llmcompress.recipe.yaml import OneLine, Path, Places, at, dotted_path, parse, shorten, write_yaml

S = TypeVar("S", bound=BaseModel)
VERSION = 1
DIALECT = "https://json-schema.org/draft/2020-12/schema"
_PART = re.compile(r"([A-Za-z_][A-Za-z_0-9]*)((?:\[\d{1,6}\])*)")


def read_recipe(
    source: Recipe | str | FilePath | Mapping[str, Any], settings: Sequence[str] = (), changes: Sequence[Change] = ()
) -> Recipe:
    """Return a recipe of compression from a YAML file, the name of one that comes with llmcompress, or plain values.

    A `Recipe` is returned as it is. `settings` such as "seed=3", and then `changes`, are applied before the recipe is
    validated. Raises RecipeError for the first mistake in it.
    """
    return read_as(Recipe, source, settings, changes)


def read_as(
    schema: type[S],
    source: S | str | FilePath | Mapping[str, Any],
    settings: Sequence[str] = (),
    changes: Sequence[Change] = (),
) -> S:
    """Do as `read_recipe`, for any schema that has a version and a name."""
    if isinstance(source, schema) and not settings and not changes:
        return source
    if isinstance(source, schema | Mapping):
        values = source.model_dump(mode="json") if settings and isinstance(source, schema) else dict(source)
        return _build(schema, values, {}, settings, changes)
    if not isinstance(source, str | FilePath):
        raise RecipeError(
            f"the recipe is an object of type {type(source).__name__}; give the path of a YAML file, a name that "
            "`llmcompress recipes` lists, or a map of its keys"
        )
    path = find_recipe(source, distillation=schema is not Recipe)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{shorten(path, 300)} is not UTF-8 text (byte {error.start}); a recipe is a YAML file"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: no path can have this name
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"the recipe {shorten(path, 300)} cannot be read ({reason}); give a YAML file") from error
    return _parse(schema, text, path.name, settings, changes)


def parse_recipe(text: str, name: str = "recipe.yaml", settings: Sequence[str] = ()) -> Recipe:
    """Return a recipe of compression from YAML text. `name` is the file's, for errors and recipes without a name.

    Raises RecipeError for the first mistake in it.
    """
    return _parse(Recipe, text, name, settings)


def _parse(schema: type[S], text: str, name: str, settings: Sequence[str], changes: Sequence[Change] = ()) -> S:
    values, places = parse(text, name)
    if not isinstance(values, dict):
        kind = "empty" if values is None else f"a {'list' if isinstance(values, list) else 'single value'}"
        raise RecipeError(f"{name}: a recipe is a map that starts with version: {VERSION}; this is {kind}")
    return _build(schema, {"name": FilePath(name).stem, **values}, places, settings, changes)


def _build(
    schema: type[S], values: dict[str, Any], places: Places, settings: Sequence[str], changes: Sequence[Change]
) -> S:
    if settings:
        values = apply_settings(schema, values, settings, places)
    values = apply_changes(values, changes, places)
    for key, value in values.items():
        try:
            str((key, value))
        except (ValueError, RecursionError) as error:  # no message could show it, nor a file hold it
            name = shorten(key) if isinstance(key, str) else "a key"
            raise RecipeError(f"{name}: a number has too many digits, or entries are nested too deeply") from error
    version = values.get("version")
    if version is None:
        raise RecipeError(f"{at((), places)}the recipe has no version; write version: {VERSION}")
    if isinstance(version, int) and version > VERSION:
        known = f"this llmcompress reads up to {VERSION}; upgrade it"
        raise RecipeError(f"{at(('version',), places)}version is {version}, and {known}")
    recipe = validate(schema, values, places)
    if isinstance(recipe, Recipe):
        recipe._origin = Origin(places)
    return recipe


def dump(recipe: BaseModel) -> str:
    """Return the recipe as YAML text with every value written out; it reads back equal."""
    values = recipe.model_dump(mode="json")
    for rule in values.get("rules", ()):
        rule["steps"] = [OneLine(step) for step in rule["steps"]]
    return write_yaml(values)


def hide_folders(recipe: S) -> S:
    """Return a recipe without folders of this machine: the last part of every path in it.

    A text in a file also gets the SHA-256 of its content. So the recipe still says which text it was, and runs wherever
    a file of that name and content is.
    """
    changes: dict[str, Any] = {}
    for name in type(recipe).model_fields:
        value = getattr(recipe, name)
        if isinstance(value, BaseModel):
            changes[name] = hide_folders(value)
        elif isinstance(value, tuple):
            changes[name] = tuple(hide_folders(item) if isinstance(item, BaseModel) else item for item in value)
        elif name == "folder" and isinstance(value, str):
            changes[name] = last_part(value)
    if isinstance(recipe, Calibration):
        changes["dataset"] = hide_folder(recipe.dataset)
        files = list_files(recipe.dataset) if is_file(recipe.dataset) else []
        if files and all(path.is_file() for path in files):
            changes["sha256"] = files_sha256(files)
    return recipe.model_copy(update={name: value for name, value in changes.items() if value != getattr(recipe, name)})


def json_schema(schema: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of recipes that `schema` reads: `Recipe` or `Distillation`.

    Steps and losses are unions that `method` and `loss` tell apart. Rules that are code, such as on values that exclude
    each other, are not part of it: a recipe that it accepts may still be refused.
    """
    result = schema.model_json_schema()
    definitions = result["$defs"]
    if StepConfig.__name__ in definitions:
        configs = {name: method.config for name, method in methods().items()}
        definitions |= _union(StepConfig, "method", configs)
    if LossConfig.__name__ in definitions:
        registered = losses() | feature_losses()
        definitions |= _union(LossConfig, "loss", {name: loss.config for name, loss in registered.items()})
    return {"$schema": DIALECT, **result, "required": sorted({"version", *result.get("required", ())})}


def _union(base: type[BaseModel], key: str, configs: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """Return the definition of `base` as one of `configs`, by the name under `key`, and the definitions of these."""
    definitions, mapping = dict[str, Any](), dict[str, str]()
    for name, config in sorted(configs.items()):
        values = config.model_json_schema()
        definitions |= {inner: entry for inner, entry in values.pop("$defs", {}).items() if inner != base.__name__}
        values["properties"][key] = {"const": name, "description": f"the name of the {key}"}
        values["required"] = sorted({key, *values.get("required", ())})
        definitions[config.__name__] = values
        mapping[name] = f"#/$defs/{config.__name__}"
    alternatives = [{"$ref": place} for place in mapping.values()]
    union = {"oneOf": alternatives, "discriminator": {"propertyName": key, "mapping": mapping}}
    return definitions | {base.__name__: union}


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
