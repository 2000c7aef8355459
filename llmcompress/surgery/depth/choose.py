"""The blocks that a command drops: those it names, or those that a search finds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from llmcompress.errors import RecipeError
from llmcompress.surgery.depth.block_search import Counting, least_damage
from llmcompress.surgery.depth.similarity import alike_blocks


class Chosen(NamedTuple):
    """Blocks to drop, and the KL in nats that dropping them was found to cost, if it was measured."""

    blocks: tuple[int, ...]
    damage: float | None


def chosen_blocks(
    model: str | Path,
    blocks: str | None,
    count: int | None,
    by: str = "similarity",
    progress: Counting | None = None,
    **how: Any,
) -> Chosen:
    """Return the numbers in a text such as "4,7-9", or without one the `count` blocks that `alike_blocks` finds, or by
    damage `least_damage`; `how` goes to these, `progress` to the second.

    Raises RecipeError for any other text or measure, and unless exactly one of `blocks` and `count` is given.
    """
    if by not in ("damage", "similarity"):
        raise RecipeError(f"blocks cannot be chosen by {by!r}; use damage or similarity")
    if (blocks is None) == (count is None):
        raise RecipeError("pass either --blocks or --count, exactly one of them")
    if count is None:
        return Chosen(block_numbers(blocks or ""), None)
    if by == "similarity":
        return Chosen(alike_blocks(model, count, **how).blocks, None)
    found = least_damage(model, count, progress=progress, **how)
    return Chosen(found.blocks, found.damage)


def block_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers in a text such as "4,7-9". Raises RecipeError for any other text."""
    found: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", part)
        if ends is None or int(ends[2] or ends[1]) < int(ends[1]):
            raise RecipeError(f"{part!r} names no blocks; write numbers and ranges of them, such as 4,7-9")
        found += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    return tuple(found)
