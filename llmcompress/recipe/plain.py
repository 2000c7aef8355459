"""Limits for the plain values of a recipe, wherever they come from: what no recipe needs is refused at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmcompress.errors import RecipeError
from llmcompress.recipe.yaml import BITS, DEEPEST, MOST_ENTRIES, UNPRINTABLE, Path, Places, at, shortened

LONGEST = 4096  # characters of a text; that of a path
LONGEST_KEY = 200
MOST_PATTERNS = 10_000  # in `match:`
MOST_EXPRESSIONS = 200  # of them regular expressions


def check_plain(values: Any, places: Places) -> None:
    """Raise RecipeError for values that are nested too deeply, too many or too large, and for unprintable text."""
    patterns = expressions = 0
    for number, (path, value) in enumerate(_walk(values, ())):
        if number > MOST_ENTRIES or len(path) > DEEPEST:
            limit = f"{MOST_ENTRIES} entries" if number > MOST_ENTRIES else f"{DEEPEST} levels"
            raise RecipeError(f"{at(path[:1], places)}this is more than a recipe needs (at most {limit})")
        if complaint := _complaint(value, path):
            raise RecipeError(f"{at(path, places)}{complaint}")
        patterns += "match" in path and isinstance(value, str)
        expressions += "match" in path and isinstance(value, str) and value.startswith("re:")
    for count, most, what in (
        (patterns, MOST_PATTERNS, "patterns"),
        (expressions, MOST_EXPRESSIONS, "regular expressions"),
    ):
        if count > most:
            raise RecipeError(
                f"{at((), places)}the recipe matches layers by {count} {what}, and {most} is the most; "
                "write globs such as '*.mlp.*' that match several layers"
            )


def _complaint(value: Any, path: Path) -> str:
    """Return what is wrong with one value, or with its key; nothing for one that can be."""
    key = path[-1] if path else None
    if isinstance(key, str) and (len(key) > LONGEST_KEY or UNPRINTABLE.search(key)):
        return f'the key "{shortened(key)}" is too long or not printable; write a key that recipes have'
    if isinstance(value, int) and value.bit_length() > BITS:
        return f"{_named(path)} has {value.bit_length()} bits; write a number of at most {BITS}"
    if isinstance(value, str) and len(value) > LONGEST:
        return f"{_named(path)} is a text of {len(value)} characters; {LONGEST} is the most"
    if isinstance(value, str) and (found := UNPRINTABLE.search(value)):
        return f"{_named(path)} has the character {found[0]!a}, which is no text; remove it"
    return ""


def _named(path: Path) -> str:
    if path and isinstance(path[-1], int):
        return f"item {path[-1] + 1} of {_named(path[:-1])}"
    return str(path[-1]) if path else "the recipe"


def _walk(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """Yield every value with its path, an outer one before what is inside it."""
    yield path, value
    if isinstance(value, dict):
        entries = value.items()
    elif isinstance(value, list | tuple):
        entries = dict(enumerate(value)).items()
    else:
        return
    for key, inside in entries:
        yield from _walk(inside, (*path, key))
