"""The sizes of a sweep, all of one kind: bits per weight of the decoder's linears, or bytes of all weight files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from llmcompress.errors import RecipeError
from llmcompress.recipe.target import Target, parse_size

MOST_BPW = 16.0


@dataclass(frozen=True)
class Budget:
    """One size. `name`: the folder of its checkpoint, "bpw-1.25" or "size-30MB"."""

    name: str
    target: Target


def budgets(bpw: str | None, sizes: str | None) -> tuple[Budget, ...]:
    """Return the sizes in "1.25,1.6,2" bits per weight or in "30MB,40MB", smallest first.

    Raises RecipeError for both or neither, for anything that is not a size, and for a size given twice.
    """
    if (bpw is None) == (sizes is None):
        raise RecipeError("give the budgets either as --bpw 1.25,1.6,2 or as --sizes 30MB,40MB")
    found = _parsed(bpw, _of_bits) if bpw is not None else _parsed(sizes or "", _of_bytes)
    for before, after in pairwise(found):
        if before.name == after.name:
            raise RecipeError(f"the budget {before.name} is given twice; give each budget once")
    return found


def _parsed(text: str, read: Callable[[str], tuple[float, Budget]]) -> tuple[Budget, ...]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise RecipeError("there are no budgets; give some, such as --bpw 1.25,1.6,2 or --sizes 30MB,40MB")
    return tuple(budget for _, budget in sorted(map(read, words), key=lambda one: one[0]))


def _of_bits(word: str) -> tuple[float, Budget]:
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if not 0 < value <= MOST_BPW:
        raise RecipeError(f"--bpw: {word!r} is not a number of bits per weight, above 0 and at most {MOST_BPW:g}")
    return value, Budget(f"bpw-{_plain(value)}", Target(bpw=value))


def _of_bytes(word: str) -> tuple[float, Budget]:
    try:
        count = int(parse_size(word))
    except ValueError as error:
        raise RecipeError(f"--sizes: {error}") from error
    if count < 1:
        raise RecipeError(f"--sizes: {word!r} is not the size of a model; give more than 0 bytes")
    return count, Budget(f"size-{_plain(count / 1e6)}MB", Target(bytes=count))


def _plain(value: float) -> str:
    """Return a number without an exponent or trailing zeros, to a millionth (one byte of a megabyte)."""
    return f"{value:.6f}".rstrip("0").rstrip(".")
