"""Calibration shared out over processes: each carries its sequences, and the sums over all of them are everyone's.

Adding in another order changes the last bits of float32 sums. Every process has the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from llmcompress.errors import RecipeError
from llmcompress.methods.moments import STATISTICS, TILE, Moments, mirror
from llmcompress.runtime.ranks import Ranks

Key = TypeVar("Key")
Form = tuple[float, dict[str, tuple[int, ...]]]  # of moments: tokens, and the shape of each statistic that is there


def own_share(sequences: Tensor, held_out: int, ranks: Ranks) -> tuple[Tensor, int]:
    """Return a process's part of `sequences [sequences, length]`, the last `held_out` of them held out, and how many
    of the part are.

    Raises RecipeError where a process would have nothing to calibrate on.
    """
    fitted = len(sequences) - held_out
    if ranks.count == 1:
        return sequences, held_out
    if fitted < ranks.count:
        raise RecipeError(
            f"{ranks.count} processes are more than the {fitted} calibration sequences; start fewer, or raise samples"
        )
    beside = ranks.share(sequences[fitted:])
    return torch.cat([ranks.share(sequences[:fitted]), beside]), len(beside)


def added(moments: Mapping[Key, Moments], ranks: Ranks, device: torch.device) -> dict[Key, Moments]:
    """Return the moments of all processes' tokens; one of them may lack some, such as those of an expert that none of
    its tokens reached."""
    if ranks.count == 1:
        return dict(moments)
    forms = ranks.gather({key: _form(found) for key, found in moments.items()})
    keys = dict.fromkeys(key for form in forms for key in form)  # in an order that is the same in every process
    return {key: _added(moments.get(key), [form[key] for form in forms if key in form], ranks, device) for key in keys}


def _form(found: Moments) -> Form:
    there = {name: getattr(found, name) for name in sorted(STATISTICS)}
    return found.tokens, {name: tuple(value.shape) for name, value in there.items() if value is not None}


def _added(own: Moments | None, forms: list[Form], ranks: Ranks, device: torch.device) -> Moments:
    shapes = {name: shape for _, form in forms for name, shape in form.items()}
    sums: dict[str, Tensor] = {}
    for name in sorted(shapes):
        value: Tensor | None = None if own is None else getattr(own, name)
        value = torch.zeros(shapes[name], device=device) if value is None else value
        if name == "outer":
            _add_symmetric(value, ranks)
        else:
            ranks.add(value)
        sums[name] = value
    tokens = sum(tokens for tokens, _ in forms)
    return Moments(tokens, sums.get("square"), sums.get("outer"), sums.get("cross"))


def _add_symmetric(outer: Tensor, ranks: Ranks) -> None:
    """Add up a symmetric matrix, of which only the upper half is sent."""
    width = len(outer)
    for start in range(0, width, TILE):
        stop = min(start + TILE, width)
        rows = outer[start:stop, start:].contiguous()
        ranks.add(rows)
        outer[start:stop, start:] = rows
    mirror(outer)  # more than two numbers may be added in another order below the diagonal
