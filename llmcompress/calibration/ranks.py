"""Calibration shared by processes: each carries sequences of its own, and all get the sums over all of them.

Sums in another order differ in the last bits of float32, but every process has the same ones.
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
Form = tuple[float, dict[str, tuple[int, ...]]]  # of moments: tokens, and the shape of each statistic


def own_share(sequences: Tensor, held_out: int, ranks: Ranks) -> tuple[Tensor, int]:
    """Return a process's part of `sequences [sequences, length]`, and how many at its end are held out.

    Raises RecipeError if a process would have nothing to calibrate on.
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


def sum_over_ranks(moments: Mapping[Key, Moments], ranks: Ranks, device: torch.device) -> dict[Key, Moments]:
    """Return the moments of all processes' tokens. A process may lack some, such as those of an expert."""
    if ranks.count == 1:
        return dict(moments)
    forms = ranks.gather({key: _form(each) for key, each in moments.items()})
    keys = dict.fromkeys(key for form in forms for key in form)  # in an order that is the same in every process
    return {key: _sum(moments.get(key), [form[key] for form in forms if key in form], ranks, device) for key in keys}


def _form(moments: Moments) -> Form:
    values = {name: getattr(moments, name) for name in sorted(STATISTICS)}
    return moments.tokens, {name: tuple(value.shape) for name, value in values.items() if value is not None}


def _sum(own: Moments | None, forms: list[Form], ranks: Ranks, device: torch.device) -> Moments:
    shapes = {name: shape for _, form in forms for name, shape in form.items()}
    sums: dict[str, Tensor] = {}
    for name in sorted(shapes):
        value: Tensor | None = None if own is None else getattr(own, name)
        value = torch.zeros(shapes[name], device=device) if value is None else value
        if name == "outer":
            _sum_symmetric(value, ranks)
        else:
            ranks.add(value)
        sums[name] = value
    tokens = sum(tokens for tokens, _ in forms)
    return Moments(tokens, sums.get("square"), sums.get("outer"), sums.get("cross"))


def _sum_symmetric(outer: Tensor, ranks: Ranks) -> None:
    """Sum a symmetric matrix over processes, of which only the upper half is sent."""
    width = len(outer)
    for start in range(0, width, TILE):
        stop = min(start + TILE, width)
        rows = outer[start:stop, start:].contiguous()
        ranks.add(rows)
        outer[start:stop, start:] = rows
    mirror(outer)  # more than two numbers may be added in another order below the diagonal
