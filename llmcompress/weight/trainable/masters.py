"""Where the numbers of an expression that train start: float32 masters of what is stored, leaf by leaf."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmcompress.weight.expression import dense
from llmcompress.weight.hadamard import rotate
from llmcompress.weight.nodes import (
    Codebook,
    Dense,
    Grid,
    LowRank,
    Rotated,
    Scaled,
    Sum,
    Transposed,
    TrellisCoded,
    Weight,
    Where,
    Zero,
    both,
    turned,
)

MARGIN = 2.0**-9  # codes: how far inside its code's cell a latent starts; float32 resolves it at 255


@dataclass(frozen=True)
class Leaf:
    """A node with numbers in it, and what its place in the expression says of them."""

    node: Dense | Grid | TrellisCoded | Codebook | Scaled
    path: str  # of its tensors in `encode`
    shown: Tensor | None  # true = stored, as there
    target: Tensor | None  # what it should be, in its own basis, float32 [out, in]
    factor: bool  # is it in a low-rank term?


@torch.no_grad()
def masters(w: Weight, trains: frozenset[str], target: Tensor | None) -> Iterator[tuple[str, str, Tensor, int]]:
    """(name, kind, master, levels) of all that trains; masters flat float32, memory of their own."""
    for leaf in leaves(w, "", None, None if target is None else target.float(), False):
        kind = "factors" if leaf.factor else "values"
        match leaf.node:
            case Dense(values):
                if kind in trains:
                    yield leaf.path + "values", kind, _stored(values, leaf.shown).float().clone(), 0
            case Grid(scale=scale, levels=levels):
                if "codes" in trains:
                    yield leaf.path + "codes", "codes", _latents(leaf.node, leaf.target, leaf.shown), levels
                if "scales" in trains:
                    yield leaf.path + "scale", "scales", scale.flatten().float(), levels
            case TrellisCoded(scale=scale) | Codebook(scale=scale):
                if isinstance(leaf.node, Codebook) and kind in trains:
                    yield leaf.path + "centroids", kind, leaf.node.centroids.flatten().float(), 0
                if "scales" in trains:
                    yield leaf.path + "scale", "scales", scale.flatten().float(), 0
            case Scaled(columns=columns):
                if "scales" in trains:
                    yield leaf.path + "columns", "scales", columns.float(), 0


def leaves(w: Weight, path: str, shown: Tensor | None, target: Tensor | None, factor: bool) -> Iterator[Leaf]:
    """The leaves below `w`, each with its own part of the target: turned into its basis, less what is added to it."""
    match w:
        case Zero():
            return
        case Dense() | Grid() | TrellisCoded() | Codebook():
            yield Leaf(w, path, shown, target, factor)
        case LowRank(left, right):
            yield from leaves(left, path + "left_", None, None, True)
            yield from leaves(right, path + "right_", None, None, True)
        case Where(index, inside, outside):
            here, rest = both(shown, index.inside), both(shown, ~index.inside)
            yield from leaves(inside, path + "inside_", here, target, factor)
            yield from leaves(outside, path + "outside_", rest, target, factor)
        case Rotated(inner, signs, block):
            own = None if target is None else rotate(target, signs, block)
            yield from leaves(inner, path + "inner_", None, own, factor)
        case Scaled(inner):
            yield Leaf(w, path, shown, target, factor)
            own = None if target is None else _unscaled(target, w)
            yield from leaves(inner, path + "inner_", shown, own, factor)
        case Transposed(inner):
            yield from leaves(
                inner, path + "inner_", turned(shown, inner), None if target is None else target.T, factor
            )
        case Sum(parts):
            missing = None if target is None else target - dense(w).to(target.device)
            for i, part in enumerate(parts):
                own = None if missing is None else missing + dense(part).to(missing.device)
                yield from leaves(part, f"{path}{i}_", shown, own, factor)
        case _:
            raise TypeError(f"relax has no rule for {type(w).__name__}; every node needs one")


def _unscaled(target: Tensor, w: Scaled) -> Tensor:
    """What the inner weight should be; what it is, where a column is stored as zero."""
    return torch.where(w.columns == 0, dense(w.inner).to(target.device), target / w.columns.float())


def _latents(grid: Grid, target: Tensor | None, shown: Tensor | None) -> Tensor:
    """Where the latents of stored codes start, flat float32: at the target, but inside the codes' own cells."""
    codes = _stored(grid.codes, shown).float()
    if target is None:
        return codes
    steps = dense(replace(grid, codes=torch.ones_like(grid.codes), zero=torch.zeros_like(grid.scale)))
    away = torch.where(steps == 0, 0.0, (target - dense(grid)) / steps)  # in code units
    return codes + _stored(away, shown).clamp(MARGIN - 0.5, 0.5 - MARGIN)


def _stored(leaf: Tensor, shown: Tensor | None) -> Tensor:
    """The elements of a leaf that are stored, flat, as `encode` orders them."""
    return leaf.reshape(-1) if shown is None else leaf[shown.expand(leaf.shape)]
