"""Moves of codes against all moves tried in float64, and what they must never do: raise the loss."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.errors import RecipeError
from llmcompress.methods.layer import apply, relative_error, step
from llmcompress.methods.solvers import vectors as engine
from llmcompress.methods.solvers.vectors import books_of, change_vectors, move_codebooks, visit_vectors
from llmcompress.weight.expression import bits, dense
from llmcompress.weight.nodes import Codebook, Dense, Grid, Sum, Weight, Where
from tests.builders import codebook, compressed, correlated, gaussian, layer, moments
from tests.methods.conformance.cases import ROTATE, SIZE, assert_sound, refusal, spelled
from tests.methods.oracles.slow import damped_moment
from tests.tiers import first_of_each, tiered

PV: dict[str, Any] = {"method": "pv", "steps": 3}
REFINE: dict[str, Any] = {"method": "refine", "passes": 2}
BASES: list[dict[str, Any]] = [
    {"method": "vq", "entries": [16]},
    {"method": "vq", "entries": [16, 4], "length": 2},
    {"method": "vq", "entries": [8], "length": 5, "outliers": 0.06},
    {"method": "vq", "entries": [4], "length": 1, "outliers": 0.1},
    {"method": "kmeans"},
    {"method": "kmeans", "bits": 3, "feedback": False},
]
is_first = first_of_each(BASES, lambda base: base["method"])
every_base = pytest.mark.parametrize("base", tiered(BASES, is_first, spelled))


def problem(out: int, width: int) -> tuple[Tensor, Tensor]:
    """A weight, and a damped Hessian in float64."""
    return gaussian(out, width), damped_moment(correlated(16 * width, width), 0.1)


def losses(weight: Tensor, w: Weight, hessian: Tensor) -> Tensor:
    """Of each row, float64."""
    error = weight.double() - dense(w).double()
    return ((error @ hessian) * error).sum(1)


def loss(weight: Tensor, w: Weight, hessian: Tensor) -> float:
    return float(losses(weight, w, hessian).sum())


def slow_visits(book: Codebook, weight: Tensor, hessian: Tensor) -> Tensor:
    """Each vector in turn to the entry with the least loss, all entries tried."""
    values, length = dense(book).double(), book.centroids.shape[1]
    for row, start in itertools.product(range(len(values)), range(0, values.shape[1], length)):
        width = min(length, values.shape[1] - start)
        tried = []
        for entry in book.centroids.double():
            trial = values[row].clone()
            trial[start : start + width] = entry[:width] * float(book.scale[row])
            error = weight[row].double() - trial
            tried.append((float(error @ hessian @ error), trial))
        values[row] = min(tried, key=lambda pair: pair[0])[1]
    return values


@pytest.mark.parametrize("length, width", [(1, 12), (3, 20), (4, 70)])
def test_one_visit_is_the_best_move_of_every_vector_in_turn(length: int, width: int) -> None:
    weight, hessian = problem(4, width)
    book = codebook((4, width), 7, length, 0)
    found = visit_vectors(book, weight, hessian.float(), None)
    torch.testing.assert_close(dense(found).double(), slow_visits(book, weight, hessian), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", [1, 7, 16])
def test_the_block_changes_speed_never_the_result(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(8, 90)
    book = codebook((8, 90), 16, 4, 0)
    expected = visit_vectors(book, weight, hessian.float(), None)
    monkeypatch.setattr(engine, "BLOCK", block)
    mine = visit_vectors(book, weight, hessian.float(), None)
    assert float((dense(mine) - dense(expected)).abs().gt(1e-5).float().mean()) < 0.02, "more than ties differ"


@every_base
@pytest.mark.parametrize("polish", [PV, REFINE], ids=spelled)
def test_the_damped_loss_never_rises_and_the_bits_stay(base: dict[str, Any], polish: dict[str, Any]) -> None:
    weight, inputs = gaussian(*SIZE), correlated(1024, SIZE[1])
    hessian = damped_moment(inputs, 0.1)
    before = compressed(weight, inputs, base)
    reached = [loss(weight, before.approx, hessian)]
    done = before
    for _ in range(3):
        done = apply(done, [step(polish)])
        reached.append(loss(weight, done.approx, hessian))
        assert_sound(done, SIZE, base, polish)
        assert bits(done.approx) == bits(before.approx)
    assert all(after <= first * (1 + 1e-6) for first, after in itertools.pairwise(reached)), reached
    assert reached[1] < 0.97 * reached[0], "nothing was gained"


@every_base
@pytest.mark.parametrize("polish", [PV, REFINE], ids=spelled)
def test_it_pays_on_tokens_not_seen(base: dict[str, Any], polish: dict[str, Any]) -> None:
    ratios = []
    for seed in range(2):
        weight, inputs = gaussian(*SIZE, seed), correlated(1024, SIZE[1], seed=2 * seed)
        unseen = moments(correlated(1024, SIZE[1], seed=2 * seed + 1))
        done = [compressed(weight, inputs, ROTATE, base, *more).expression() for more in ([], [polish])]
        plain, better = (relative_error(weight, w, unseen) for w in done)
        ratios.append(better / plain)
    assert sum(ratios) / 2 < 1.0, ratios


def books_in(w: Weight) -> tuple[Codebook, ...]:
    return books_of(w.outside if isinstance(w, Where) else w)


@every_base
@pytest.mark.parametrize("share", [0.01, 0.1, 1.0])
def test_few_codes_change_and_no_row_gets_worse(base: dict[str, Any], share: float) -> None:
    weight, inputs = gaussian(*SIZE), correlated(1024, SIZE[1])
    hessian = damped_moment(inputs, 0.1)
    w = compressed(weight, inputs, base).approx
    for _ in range(4):
        after = move_codebooks(
            w, weight, lambda own, target, shown: change_vectors(own, target, hessian.float(), shown, share)
        )
        one, other = books_in(w), books_in(after)
        vectors = torch.stack([a.codes != b.codes for a, b in zip(one, other, strict=True)]).any(0)
        assert int(vectors.sum(1).max()) <= math.ceil(share * vectors.shape[1])
        first, last = losses(weight, w, hessian), losses(weight, after, hessian)
        assert bool((last <= first * (1 + 1e-6)).all())
        assert bool((last < first)[vectors.any(1)].all()), "a row changed for nothing"
        assert all(a.centroids is b.centroids and a.scale is b.scale for a, b in zip(one, other, strict=True))
        w = after


def test_it_stops_where_no_single_code_gains() -> None:
    weight, hessian = problem(5, 14)
    w: Weight = codebook((5, 14), 6, 4, 1)
    for _ in range(60):
        w = change_vectors(w, weight, hessian.float(), None, 0.3)
    assert isinstance(w, Codebook)
    reached = losses(weight, w, hessian)
    for vector, entry in itertools.product(range(4), range(6)):
        codes = w.codes.clone()
        codes[:, vector] = entry
        other = losses(weight, Codebook(codes, w.centroids, w.scale, w.width), hessian)
        assert bool((other >= reached * (1 - 1e-5)).all()), "a better code was left"


def test_the_vector_that_gains_most_changes_first() -> None:
    weight, hessian = problem(5, 14)
    w = codebook((5, 14), 6, 4, 1)
    found = change_vectors(w, weight, hessian.float(), None, 0.01)
    best = losses(weight, w, hessian)
    for vector, entry in itertools.product(range(4), range(6)):
        codes = w.codes.clone()
        codes[:, vector] = entry
        best = torch.minimum(best, losses(weight, Codebook(codes, w.centroids, w.scale, w.width), hessian))
    torch.testing.assert_close(losses(weight, found, hessian), best, rtol=1e-5, atol=0)


def test_columns_beside_a_codebook_stay_in_pv_and_move_in_refine() -> None:
    weight, inputs = gaussian(*SIZE), correlated(1024, SIZE[1])
    done = [compressed(weight, inputs, BASES[2], *more).approx for more in ([], [PV], [REFINE])]
    kept = []
    for w in done:
        assert isinstance(w, Where) and isinstance(w.inside, Grid)
        kept.append(w.inside.codes[:, w.index.inside])
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])


def test_a_base_without_codebooks_is_left_or_refused() -> None:
    weight, hessian = problem(4, 8)
    w = Sum((Dense(weight), Dense(weight)))
    assert move_codebooks(w, weight, lambda *_: Dense(weight)) is w
    assert "there are no codebooks in" in str(refusal(SIZE, PV))
    assert "there are no codebooks in" in str(refusal(SIZE, {"method": "gptq"}, PV))
    with pytest.raises(RecipeError, match="make them before"):
        apply(layer(gaussian(*SIZE), correlated(100, SIZE[1])), [step(PV)])
