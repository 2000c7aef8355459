"""Rows below each other are those of both, or the form is refused; components of terms are cut, not offsets."""

from __future__ import annotations

import pytest
import torch

from llmcompress.methods.layer import base_and_term
from llmcompress.weight.algebra import add_term, join_rows, term_ends, truncate_low_rank
from llmcompress.weight.encoding import decode, encode
from llmcompress.weight.expression import dense, describe
from llmcompress.weight.nodes import (
    Columns,
    LowRank,
    ScaledInputs,
    Tiles,
    Transpose,
    TrellisCodes,
    Weight,
    Where,
    children,
    shape,
)
from tests.builders import compressed, correlated, every_node, factors, gaussian, random_nestings, seeded


def nodes(w: Weight) -> list[Weight]:
    return [w, *(found for _, child, _ in children(w) for found in nodes(child))]


def of_whole_runs(w: Weight) -> bool:
    """False if a stream of a trellis ends within its run of rows: what lies below would lengthen it."""
    return all(shape(node)[0] % node.run == 0 for node in nodes(w) if isinstance(node, TrellisCodes))


CASES = [w for w in every_node() + random_nestings(seed=6, count=30) if of_whole_runs(w)]


@pytest.mark.parametrize("w", CASES, ids=lambda w: describe(w)[:50])
def test_joined_rows_lie_below_each_other(w: Weight) -> None:
    if any(isinstance(node, LowRank | Tiles | Transpose) for node in nodes(w)):
        with pytest.raises(TypeError, match="join_rows has no rule"):
            join_rows([w, w])
        return
    for parts in ([w], [w, w, w]):
        whole = join_rows(parts)
        assert torch.equal(dense(whole), torch.cat([dense(part) for part in parts]))
        assert torch.equal(dense(decode(*encode(whole))), dense(whole))


@pytest.mark.parametrize("kind", ["Q4_1", "Q2_K"])
def test_the_offsets_of_a_grid_are_no_components(kind: str) -> None:
    weight, inputs = gaussian(48, 256), correlated(600, 256)
    grid = compressed(weight, inputs, {"method": "gguf", "type": kind}).approx
    assert truncate_low_rank(grid, 1) is grid and list(term_ends(grid)) == []
    eora = {"method": "eora", "rank": 4, "factor_bits": 16}
    both = compressed(weight, inputs, {"method": "gguf", "type": kind}, eora).approx
    base, term = base_and_term(both)
    assert term is not None
    cut = dense(base) + dense(term.left)[:, :1] @ dense(term.right)[:1]
    torch.testing.assert_close(dense(truncate_low_rank(both, 1)), cut)
    flat = add_term(grid, term)
    torch.testing.assert_close(dense(truncate_low_rank(flat, 1)), cut)
    assert [end for _, end in term_ends(flat)] == [4]


def test_parts_must_share_what_belongs_to_all_rows() -> None:
    [w] = [w for w in every_node() if isinstance(w, ScaledInputs) and isinstance(w.inner, TrellisCodes)]
    with pytest.raises(ValueError, match="other columns each"):
        join_rows([w, ScaledInputs(w.inner, factors(24, 8))])
    inside = torch.rand(24, generator=seeded(1)) < 0.5
    one, other = Where(Columns(inside), w, w), Where(Columns(~inside), w, w)
    with pytest.raises(ValueError, match="other columns each"):
        join_rows([one, other])
