"""Sums of expressions."""

from __future__ import annotations

from llmcompress.weight.nodes import LowRank, Sum, Weight


def plus(w: Weight, term: LowRank) -> Weight:
    """A weight and one more term, which is the last."""
    return Sum((*w.parts, term)) if isinstance(w, Sum) else Sum((w, term))
