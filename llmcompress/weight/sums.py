"""Sums of expressions."""

from __future__ import annotations

from llmcompress.weight.nodes import LowRank, Sum, Weight, Zero


def add_to_base(base: Weight, own: Weight) -> Weight:
    """A weight that several layers have, and what one of them adds to it."""
    match own:
        case Zero():
            return base
        case Sum(parts):
            return Sum((base, *parts))
    return Sum((base, own))


def add_term(w: Weight, term: LowRank) -> Weight:
    """A weight and one more term, which is the last."""
    match w:
        case Zero():
            return term
        case Sum(parts):
            return Sum((*parts, term))
    return Sum((w, term))
