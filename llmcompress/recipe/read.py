"""Read recipes from YAML files or plain values, and write them.

Whatever is wrong is a RecipeError of one sentence that names the line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from llmcompress.errors import RecipeError
from llmcompress.recipe.compression import VERSION, Origin, Recipe
from llmcompress.recipe.error_messages import check_numbers, first_complaint
from llmcompress.recipe.library import find_recipe
from llmcompress.recipe.overrides import Change, changed, overrides
from llmcompress.recipe.plain import check_plain
from llmcompress.recipe.user_file import read_file
from llmcompress.recipe.yaml import OneLine, Places, at, parse, shortened, written

S = TypeVar("S", bound=BaseModel)
MOST_BYTES = 1_000_000  # of a recipe's file


def read_recipe(
    source: Recipe | str | FilePath | Mapping[str, Any], settings: Sequence[str] = (), changes: Sequence[Change] = ()
) -> Recipe:
    """Return a recipe of compression from a YAML file, the name of one that comes with llmcompress, or plain values.

    A `Recipe` is returned as it is. `settings`, as `overrides` takes them, and then `changes` are applied before the
    recipe is validated. Raises RecipeError for the first thing wrong with it.
    """
    return read_as(Recipe, source, settings, changes)


def read_as(
    schema: type[S],
    source: S | str | FilePath | Mapping[str, Any],
    settings: Sequence[str] = (),
    changes: Sequence[Change] = (),
) -> S:
    """`read_recipe` for any schema that has a version and a name."""
    if isinstance(source, schema):
        if not settings and not changes:
            return source
        values = source.model_dump(mode="json") if settings else dict(source)
        return _validated(schema, values, {}, settings, changes)
    if isinstance(source, Mapping):
        return _validated(schema, dict(source), {}, settings, changes)
    if not isinstance(source, str | FilePath):
        raise RecipeError(
            f"the recipe is an object of type {type(source).__name__}; give the path of a YAML file, a name that "
            "`llmcompress recipes` lists, or a map of its keys"
        )
    path = find_recipe(source, distillation=schema is not Recipe)
    try:
        text = read_file(path, MOST_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{shortened(path, 300)} is not UTF-8 text (byte {error.start}); a recipe is a YAML file"
        ) from error
    except OSError as error:
        reason = error.strerror or error
        raise RecipeError(f"the recipe {shortened(path, 300)} cannot be read ({reason}); give a YAML file") from error
    return _parsed(schema, text, path.name, settings, changes)


def parse_recipe(text: str, name: str = "recipe.yaml", settings: Sequence[str] = ()) -> Recipe:
    """Return a recipe of compression from YAML text; `name` is the file's, for errors and recipes without a name.

    Raises RecipeError for the first thing wrong with it.
    """
    return _parsed(Recipe, text, name, settings)


def _parsed(schema: type[S], text: str, name: str, settings: Sequence[str], changes: Sequence[Change] = ()) -> S:
    values, places = parse(text, name)
    if not isinstance(values, dict):
        raise RecipeError(f"{name}: a recipe is a map that starts with version: {VERSION}; this is {_kind(values)}")
    return _validated(schema, {"name": FilePath(name).stem, **values}, places, settings, changes)


def dump(recipe: BaseModel) -> str:
    """Return the recipe as YAML text with every value written out; it reads back equal."""
    return written(_flow(recipe.model_dump(mode="json")))


def _validated(
    schema: type[S], values: dict[str, Any], places: Places, settings: Sequence[str], changes: Sequence[Change]
) -> S:
    places = dict(places)
    values = changed(overrides(schema, values, settings, places) if settings else values, changes, places)
    check_plain(values, places)
    version = values.get("version")
    if version is None:
        raise RecipeError(f"{at((), places)}the recipe has no version; write version: {VERSION}")
    if isinstance(version, bool):
        raise RecipeError(f"{at(('version',), places)}version is {str(version).lower()}; write version: {VERSION}")
    if isinstance(version, int) and version > VERSION:
        raise RecipeError(
            f"{at(('version',), places)}version is {version}, and this llmcompress reads up to {VERSION}; upgrade it"
        )
    try:
        recipe = schema.model_validate(values)
    except ValidationError as error:
        raise RecipeError(first_complaint(error, schema, values, places)) from error
    check_numbers(schema, values, places)
    if isinstance(recipe, Recipe):
        recipe._origin = Origin(places)
    return recipe


def _flow(values: dict[str, Any]) -> dict[str, Any]:
    if "rules" not in values:
        return values
    rules = [{**rule, "steps": [OneLine(one) for one in rule["steps"]]} for rule in values["rules"]]
    return {**values, "rules": rules}


def _kind(value: Any) -> str:
    return "empty" if value is None else f"a {'list' if isinstance(value, list) else 'single value'}"
