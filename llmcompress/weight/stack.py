"""Matrices of the same form, one below the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from llmcompress.weight.nodes import Dense, Grid, Rotated, Sum, TrellisCoded, Weight, Where, Zero


def joined(parts: Sequence[Weight]) -> Weight:
    """The parts, all of one form, below each other."""
    match parts[0]:
        case Zero((_, width)):
            return Zero((sum(part.shape[0] for part in parts if isinstance(part, Zero)), width))
        case Dense():
            return Dense(torch.cat([part.values for part in parts if isinstance(part, Dense)]))
        case Grid(zero=zero) as first:
            grids = [part for part in parts if isinstance(part, Grid)]
            codes, scale = torch.cat([grid.codes for grid in grids]), torch.cat([grid.scale for grid in grids])
            zeros = None if zero is None else torch.cat([grid.zero for grid in grids if grid.zero is not None])
            return replace(first, codes=codes, scale=scale, zero=zeros)
        case TrellisCoded() as first:
            coded = [part for part in parts if isinstance(part, TrellisCoded)]
            codes, scale = torch.cat([part.codes for part in coded]), torch.cat([part.scale for part in coded])
            return replace(first, codes=codes, scale=scale)
        case Where(index):
            choices = [part for part in parts if isinstance(part, Where)]
            if index.inside.ndim == 2:
                index = replace(index, inside=torch.cat([part.index.inside for part in choices]))
            inside, outside = joined([part.inside for part in choices]), joined([part.outside for part in choices])
            return Where(index, inside, outside)
        case Sum(terms):
            sums = [part.parts for part in parts if isinstance(part, Sum)]
            return Sum(tuple(joined([each[term] for each in sums]) for term in range(len(terms))))
        case Rotated() as first:
            return replace(first, inner=joined([part.inner for part in parts if isinstance(part, Rotated)]))
    raise TypeError(f"joined has no rule for {type(parts[0]).__name__}")
