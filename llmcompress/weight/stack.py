"""Matrices of the same form, one below the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmcompress.weight.nodes import (
    Columns,
    LowRank,
    Tiles,
    Transpose,
    Weight,
    Where,
    Zero,
    children,
    rebuild,
    shape,
    stored_tensors,
    unknown,
    with_fields,
)


def join_rows(parts: Sequence[Weight]) -> Weight:
    """The parts, all of one form, below each other.

    Raises TypeError for a form whose rows do not lie below each other, ValueError for parts that do not share what
    belongs to all rows.
    """
    first = parts[0]
    match first:
        case Zero((_, width)):
            return Zero((sum(shape(part)[0] for part in parts), width))
        case LowRank() | Transpose() | Tiles():
            raise unknown("joined", first)
    own: dict[str, Any] = {}
    for same in zip(*map(stored_tensors, parts), strict=True):
        tensors = [part.tensor for part in same]
        shared = same[0].per == "node" or (same[0].per == "row" and len(tensors[0]) < shape(first)[0])
        own[same[0].name] = _common_tensor(tensors, same[0].name) if shared else torch.cat(tensors)
    if isinstance(first, Where):
        insides = [part.index.inside for part in parts if isinstance(part, Where)]
        inside = _common_tensor(insides, "columns") if isinstance(first.index, Columns) else torch.cat(insides)
        own["index"] = replace(first.index, inside=inside)
    levels = zip(*([node for _, node, _ in children(part)] for part in parts), strict=True)
    below = iter([join_rows(level) for level in levels])
    return with_fields(rebuild(first, lambda path, node, shown: next(below)), own)


def _common_tensor(tensors: Sequence[Tensor], name: str) -> Tensor:
    """Return the tensor that all parts have."""
    if not all(torch.equal(tensor, tensors[0]) for tensor in tensors):
        raise ValueError(f"parts with other {name} each cannot be joined; compress the matrix in one piece")
    return tensors[0]
