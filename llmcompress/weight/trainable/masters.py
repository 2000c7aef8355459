"""Float32 master weights of the stored numbers that train: their starting values, leaf by leaf."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from llmcompress.weight.expression import dense
from llmcompress.weight.hadamard import rotate
from llmcompress.weight.nodes import (
    Codebook,
    Dense,
    Grid,
    LowRank,
    RotatedInputs,
    ScaledInputs,
    Sum,
    Transpose,
    TrellisCodes,
    Weight,
    children,
    stored_tensors,
)

Outside = Literal["code", "edge"]  # start of a latent whose target is in another code's cell: the code, or the edge

MARGIN = 2.0**-9  # codes: how far inside its code's cell a latent starts; float32 resolves it at 255


@dataclass(frozen=True)
class Leaf:
    """A node that stores numbers, with its path, selection and target."""

    node: Weight
    path: str  # of its tensors in `encode`
    shown: Tensor | None  # true = stored, as there
    target: Tensor | None  # in its own basis, float32 [out, in]
    factor: bool  # is it in a low-rank term?


@torch.no_grad()
def masters(
    w: Weight, trains: frozenset[str], target: Tensor | None, outside: Outside
) -> Iterator[tuple[str, str, Tensor, int]]:
    """Yield (name, kind, master, levels) of all tensors that train; masters are flat float32 copies."""
    for leaf in leaves(w, "", None, None if target is None else target.float(), False):
        kind = "factors" if leaf.factor else "values"
        match leaf.node:
            case Dense(values):
                if kind in trains:
                    yield leaf.path + "values", kind, _take_stored(values, leaf.shown).float().clone(), 0
            case Grid(scale=scale, levels=levels):
                if "codes" in trains:
                    yield leaf.path + "codes", "codes", _latents(leaf.node, leaf.target, leaf.shown, outside), levels
                if "scales" in trains:
                    yield leaf.path + "scale", "scales", scale.flatten().float(), levels
            case TrellisCodes(scale=scale) | Codebook(scale=scale):
                if isinstance(leaf.node, Codebook) and kind in trains:
                    yield leaf.path + "centroids", kind, leaf.node.centroids.flatten().float(), 0
                if "scales" in trains:
                    yield leaf.path + "scale", "scales", scale.flatten().float(), 0
            case ScaledInputs(columns=columns):
                if "scales" in trains:
                    yield leaf.path + "columns", "scales", columns.float(), 0


def leaves(w: Weight, path: str, shown: Tensor | None, target: Tensor | None, factor: bool) -> Iterator[Leaf]:
    """Yield the leaves below `w`, each with its part of the target: in its basis, less what is added to it."""
    if stored_tensors(w) and not isinstance(w, RotatedInputs):
        yield Leaf(w, path, shown, target, factor)
    for place, node, here in children(w, shown):
        own = None if target is None else _part_of(target, w, node)
        yield from leaves(node, path + place, here, own, factor or isinstance(w, LowRank))


def _part_of(target: Tensor, w: Weight, child: Weight) -> Tensor | None:
    """Return the target of a child of `w`, given that of `w`; None for a factor, whose target is unknown."""
    match w:
        case LowRank():
            return None
        case RotatedInputs(_, signs, block):
            return rotate(target, signs, block)
        case ScaledInputs(inner, columns):  # a column that is stored as zero stays what it is
            return torch.where(columns == 0, dense(inner).to(target.device), target / columns.float())
        case Transpose():
            return target.T
        case Sum():
            return target - dense(w).to(target.device) + dense(child).to(target.device)
    return target


def _latents(grid: Grid, target: Tensor | None, shown: Tensor | None, outside: Outside) -> Tensor:
    """Return the first latents of stored codes, flat float32.

    A latent starts at its target if that lies in the cell of its code; at the edge of the cell if the target lies
    beyond the range of all codes; elsewhere, where error feedback chose another code, as `outside` says. Small steps
    flip very many latents that start at edges.
    """
    codes, most = _take_stored(grid.codes, shown).float(), 0.5 - MARGIN
    if target is None:
        return codes
    steps = dense(replace(grid, codes=torch.ones_like(grid.codes), zero=torch.zeros_like(grid.scale)))
    away = _take_stored(torch.where(steps == 0, 0.0, (target - dense(grid)) / steps), shown)  # in code units
    if outside == "code":
        beyond = ((codes == 0) & (away < 0)) | ((codes == grid.levels - 1) & (away > 0))
        away = torch.where((away.abs() <= most) | beyond, away, 0.0)
    return codes + away.clamp(-most, most)


def _take_stored(leaf: Tensor, shown: Tensor | None) -> Tensor:
    """Return the stored elements of a leaf, flat, in the order of `encode`."""
    return leaf.reshape(-1) if shown is None else leaf[shown.expand(leaf.shape)]
