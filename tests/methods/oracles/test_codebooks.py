"""Codebooks against slow float64: k-means, the nearest entries, feedback by vectors, and entries by least squares."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmcompress.methods.codebooks.vq import fit_codebooks
from llmcompress.methods.layer import relative_error
from llmcompress.methods.solvers import vectors as engine
from llmcompress.methods.solvers.feedback import feedback
from llmcompress.methods.solvers.hessian import inverse_factor
from llmcompress.methods.solvers.vectors import Vectors, books_of, k_means, refit_entries
from llmcompress.weight.expression import bits, dense
from llmcompress.weight.nodes import Codebook, Columns, Dense, Sum, Weight, Where
from tests.builders import codebook, compressed, correlated, gaussian, moments, seeded
from tests.methods.conformance.cases import ROTATE
from tests.methods.oracles.slow import damped_moment


def loss(weight: Tensor, stored: Tensor, hessian: Tensor) -> float:
    error = weight.double() - stored.double()
    return float(((error @ hessian) * error).sum())


# --- k-means --------------------------------------------------------------------------------------------------------


def cost(vectors: Tensor, importance: Tensor, centroids: Tensor) -> float:
    """Weighted squared error of the nearest entries, all tried, float64."""
    away = (vectors[:, None].double() - centroids[None].double()).square() * importance[:, None].double()
    return float(away.sum(2).amin(1).sum())


def best_split(values: Tensor, importance: Tensor, entries: int) -> float:
    """The least cost of any `entries` points for single numbers: dynamic programming over the sorted ones."""
    order = values.argsort()
    x, w = values[order].double(), importance[order].double()

    def within(first: int, last: int) -> float:
        part, weight = x[first:last], w[first:last]
        return float((weight * (part - (weight * part).sum() / weight.sum()).square()).sum())

    costs = {(0, 0): 0.0}
    for used, stop in itertools.product(range(1, entries + 1), range(1, len(x) + 1)):
        starts = [start for start in range(stop) if (used - 1, start) in costs]
        if starts:
            costs[used, stop] = min(costs[used - 1, start] + within(start, stop) for start in starts)
    return costs[entries, len(x)]


@pytest.mark.parametrize("entries", [2, 4])
def test_points_of_single_weights_are_near_the_best_there_are(entries: int) -> None:
    values, importance = torch.randn(40, generator=seeded(0)), torch.rand(40, generator=seeded(1)) + 0.1
    found = [k_means(values[:, None], importance[:, None], entries, seeded(seed)) for seed in range(8)]
    costs = [cost(values[:, None], importance[:, None], each) for each in found]
    best = best_split(values, importance, entries)
    assert best * (1 - 1e-6) <= min(costs) <= 1.02 * best
    assert sum(costs) / 8 <= 1.5 * best


def test_rounds_are_those_of_lloyd() -> None:
    vectors, importance = torch.randn(200, 3, generator=seeded(0)), torch.rand(200, 3, generator=seeded(1)) + 0.1
    start = engine._spread_out(vectors, importance, 8, seeded(2))
    assert all(bool((vectors == each).all(1).any()) for each in start), "entries begin as vectors"
    centroids = start.double()
    for _ in range(engine.ROUNDS):
        members: list[list[int]] = [[] for _ in centroids]
        for i, (vector, weight) in enumerate(zip(vectors.double(), importance.double(), strict=True)):
            members[int((weight * (vector - centroids).square()).sum(1).argmin())].append(i)
        for entry, own in enumerate(members):
            if own:
                weight = importance[own].double()
                centroids[entry] = (weight * vectors[own]).sum(0) / weight.sum(0)
    found = k_means(vectors, importance, 8, seeded(2))
    torch.testing.assert_close(found.double(), centroids, rtol=1e-4, atol=1e-5)
    assert cost(vectors, importance, found) <= cost(vectors, importance, start)


def test_as_many_entries_as_vectors_lose_nothing() -> None:
    distinct = torch.randn(6, 4, generator=seeded(0))
    vectors = distinct[torch.arange(60) % 6]
    found = k_means(vectors, torch.ones(60, 4), 16, seeded(1))
    assert cost(vectors, torch.ones(60, 4), found) < 1e-9
    assert int(found.any(1).sum()) == 6, "what is left over is zero"


def test_vectors_of_no_importance_do_not_pull() -> None:
    vectors = torch.tensor([[1.0, 50.0], [3.0, -70.0]])
    found = k_means(vectors, torch.tensor([[1.0, 0.0], [3.0, 0.0]]), 1, seeded(0))
    assert float(found[0, 0]) == pytest.approx(2.5)


@pytest.mark.parametrize("entries, limit", [(16, 0.38), (64, 0.19), (256, 0.1)])
def test_how_near_a_gaussian_comes(entries: int, limit: float) -> None:
    """Vectors of four at 1, 1.5 and 2 bits a weight; 1/4, 1/8 and 1/16 are the limits of any code (Shannon)."""
    vectors = torch.randn(16384, 4, generator=seeded(5))
    unseen = torch.randn(4096, 4, generator=seeded(6))
    found = k_means(vectors, torch.ones_like(vectors), entries, seeded(0))
    error = cost(unseen, torch.ones_like(unseen), found) / unseen.numel()
    assert entries**-0.5 < error < limit


# --- the nearest entries --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shown", [None, [True, True, False, True, False, True, True, True, True, False]])
def test_no_entry_is_nearer_than_the_one_found(shown: list[bool] | None) -> None:
    book = codebook((5, 10), 20, 4, 0)
    vectors = Vectors([book])
    wanted = torch.randn(10, 5, generator=seeded(1))
    for vector in range(3):
        places = vectors.places(vector, None if shown is None else torch.tensor(shown))
        expected = [c for c in range(4 * vector, min(4 * vector + 4, 10)) if shown is None or shown[c]]
        assert places.tolist() == expected
        root = torch.randn(len(places), len(places), generator=seeded(2))
        codes, values = vectors.nearest(places, wanted[places], root)
        for row in range(5):
            points = book.centroids.double()[:, places % 4] * float(book.scale[row])
            costs = ((wanted[places, row].double() - points) @ root.double()).square().sum(1)
            assert float(costs[int(codes[0, row])]) == pytest.approx(float(costs.min()), rel=1e-4)
            torch.testing.assert_close(values[:, row].double(), points[int(codes[0, row])], rtol=1e-6, atol=1e-6)


def test_added_codebooks_take_turns_and_never_get_worse() -> None:
    books = [codebook((30, 4), 16, 4, seed) for seed in (0, 1)]
    vectors, places = Vectors(books), torch.arange(4)
    wanted, root = torch.randn(4, 30, generator=seeded(2)), torch.randn(4, 4, generator=seeded(3))

    def away(values: Tensor) -> Tensor:
        return ((wanted - values).T.double() @ root.double()).square().sum(1)

    before = away(dense(Sum(tuple(books))).T)
    codes, values = vectors.nearest(places, wanted, root, vectors.codes[:, :, 0])
    again = Sum(tuple(replace(book, codes=code[:, None]) for book, code in zip(books, codes, strict=True)))
    torch.testing.assert_close(dense(again), values.T)
    assert bool((away(values) <= before * (1 + 1e-5)).all())
    fresh = away(vectors.nearest(places, wanted, root)[1])
    single = away(Vectors(books[:1]).nearest(places, wanted, root)[1])
    assert float(fresh.sum()) < float(single.sum()), "a second codebook codes what the first one left"


# --- feedback -------------------------------------------------------------------------------------------------------


def slow_vectors(weight: Tensor, hessian: Tensor, book: Codebook) -> Tensor:
    """OBS by vectors, in float64: with F the columns not stored yet, v the vector's, and P = inverse(H_FF), storing c
    costs `(w_v - c) inverse(P_vv) (w_v - c)^T` and moves the others by `-(w_v - c) inverse(P_vv) P_vF`."""
    current, length = weight.double().clone(), book.centroids.shape[1]
    for start in range(0, current.shape[1], length):
        left = torch.linalg.inv(hessian[start:, start:])
        width = min(length, current.shape[1] - start)
        price = torch.linalg.inv(left[:width, :width])
        for row in range(len(current)):
            points = book.centroids[:, :width].double() * float(book.scale[row])
            away = current[row, start : start + width] - points
            best = int(((away @ price) * away).sum(1).argmin())
            current[row, start:] -= away[best] @ price @ left[:width]
            current[row, start : start + width] = points[best]
    return current


@pytest.mark.parametrize("length, width", [(1, 20), (2, 20), (4, 40), (3, 70), (5, 133)])
def test_feedback_by_vectors_is_that_of_the_whole_triangular_block(length: int, width: int) -> None:
    weight, inputs = gaussian(6, width), correlated(8 * width, width)
    factor, _ = inverse_factor(moments(inputs), 0.1)
    hessian = damped_moment(inputs, 0.1)
    [book] = fit_codebooks(weight, 1 / factor.diagonal().square(), [12], length, seeded(0))
    found = dense(feedback(weight, factor, Vectors([book], factor)))
    torch.testing.assert_close(found.double(), slow_vectors(weight, hessian, book), rtol=1e-4, atol=1e-5)


def test_the_entry_chosen_costs_least_where_other_columns_are_stored_exactly() -> None:
    """Columns of a vector that are stored elsewhere take no error on, whatever the entry."""
    weight, inputs = gaussian(7, 8), correlated(100, 8)
    factor, _ = inverse_factor(moments(inputs), 0.1)
    [book] = fit_codebooks(weight, torch.ones(8), [9], 4, seeded(0))
    shown = torch.tensor([True, False, True, True, True, True, True, True])
    vectors = Vectors([book], factor)
    vectors.begin(0, weight.T, shown[:, None].expand(-1, 7))
    upper, coordinates = factor.double(), [0, 2, 3]
    for row in range(7):
        costs = []
        for entry in book.centroids.double():
            current, total = weight[row].double().clone(), 0.0
            for column in coordinates:
                error = (current[column] - entry[column] * float(book.scale[row])) / upper[column, column]
                current[column:] -= error * upper[column, column:]
                total += float(error**2)
            costs.append(total)
        assert costs[int(vectors.codes[0, row, 0])] == pytest.approx(min(costs), rel=1e-4)


def test_without_feedback_every_weight_goes_to_its_nearest_point() -> None:
    weight, inputs = gaussian(12, 30), correlated(400, 30)
    done = compressed(weight, inputs, {"method": "kmeans", "bits": 3, "feedback": False}).approx
    assert isinstance(done, Codebook)
    books = fit_codebooks(weight, damped_moment(inputs, 0).diagonal().float(), [8], 1, seeded(0))
    found = dense(feedback(weight, None, Vectors(books, None, torch.ones(30))))
    points = books[0].centroids[:, 0].float() * books[0].scale.float()
    expected = points.gather(1, (weight[:, :, None] - points[:, None]).abs().argmin(2))
    torch.testing.assert_close(found, expected)


# --- entries by least squares ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [False, True])
def test_entries_reach_the_normal_equations(hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = gaussian(6, 18), correlated(300, 18)
    hessian = damped_moment(inputs, 0.1)
    w = codebook((6, 18), 5, 4, 3)
    shown = (torch.arange(18) % 7 != 0).expand(6, -1) if hidden else None
    seen = torch.ones(6, 18) if shown is None else shown
    columns = []
    for entry, place in itertools.product(range(5), range(4)):
        one = torch.zeros(5, 4)
        one[entry, place] = 1
        columns.append((dense(replace(w, centroids=one)) * seen).double())
    root = torch.linalg.cholesky(hessian)
    design = torch.stack([(column @ root).flatten() for column in columns], 1)
    best = torch.linalg.lstsq(design, (weight.double() @ root).flatten()[:, None], driver="gelsd").solution[:, 0]
    least = loss(weight, sum(c * float(b) for c, b in zip(columns, best, strict=True)), hessian)
    monkeypatch.setattr(engine, "STEPS", 200)
    found = refit_entries(w, weight, hessian.float(), shown)
    assert least <= loss(weight, dense(found) * seen, hessian) <= 1.0001 * least


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_a_few_steps_never_raise_the_loss(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "STEPS", steps)
    weight, inputs = gaussian(16, 30), correlated(300, 30)
    hessian = damped_moment(inputs, 0.1)
    w = codebook((16, 30), 16, 4, 0)
    losses = [loss(weight, dense(w), hessian)]
    for _ in range(4):
        w = refit_entries(w, weight, hessian.float(), None)
        losses.append(loss(weight, dense(w), hessian))
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(losses)) and losses[-1] < losses[0]


# --- what is stored -------------------------------------------------------------------------------------------------


def test_every_bit_is_counted() -> None:
    size = (48, 64)
    weight, inputs = gaussian(*size), correlated(512, 64)

    def stored(**arguments: object) -> Weight:
        return compressed(weight, inputs, {"method": "vq", **arguments}).approx

    one = 48 * 16 * 4 + 16 * 4 * 16 + 48 * 16  # codes, entries, scales
    assert bits(stored(entries=[16])) == one
    assert bits(stored(entries=[16, 16])) == 2 * one
    assert bits(stored(entries=[16], length=5)) == 48 * 13 * 4 + 16 * 5 * 16 + 48 * 16
    outliers = stored(entries=[16], outliers=0.1)
    assert isinstance(outliers, Where) and isinstance(outliers.index, Columns)
    assert int(outliers.index.inside.sum()) == 6
    assert bits(outliers) == one + 64 + 48 * (6 * 8 + 16)


def test_books_are_recognized() -> None:
    book, other = codebook((4, 8), 4, 2, 0), codebook((4, 8), 4, 4, 0)
    assert books_of(book) == (book,) and books_of(Sum((book, book))) == (book, book)
    for w in (Sum((book, other)), Sum((book, Dense(torch.ones(4, 8)))), Dense(torch.ones(4, 8)), Sum(())):
        assert books_of(w) == ()


@pytest.mark.parametrize("arguments", [{}, {"entries": [16], "length": 2}], ids=str)
def test_vectors_are_better_than_a_grid_of_as_many_bits(arguments: dict[str, object]) -> None:
    """On tokens not seen, in a rotated basis."""
    errors = []
    for kind in ({"method": "vq", **arguments}, {"method": "gptq", "bits": 2}):
        weight, inputs, unseen = gaussian(96, 128), correlated(2048, 128, seed=1), correlated(2048, 128, seed=2)
        done = compressed(weight, inputs, ROTATE, kind)
        errors.append(relative_error(weight, done.expression(), moments(unseen)))
    assert errors[0] < 0.93 * errors[1]


def test_points_fit_weights_that_are_not_spread_evenly() -> None:
    """A grid wastes its points where most weights are small."""
    weight, inputs = gaussian(48, 64) ** 3 * 400, correlated(1024, 64, seed=1)
    errors = [
        relative_error(weight, compressed(weight, inputs, kind).expression(), moments(inputs))
        for kind in ({"method": "kmeans", "bits": 3}, {"method": "gptq", "bits": 3})
    ]
    assert errors[0] < 0.9 * errors[1]


def test_columns_that_stand_out_are_kept() -> None:
    weight, inputs = gaussian(48, 64), correlated(1024, 64, seed=1)
    loud = torch.tensor([3, 17, 40])
    inputs[:, loud] *= 30
    done = compressed(weight, inputs, {"method": "vq", "entries": [16], "outliers": 3 / 64})
    assert isinstance(done.approx, Where)
    assert done.approx.index.inside.nonzero().flatten().tolist() == loud.tolist()
    plain = compressed(weight, inputs, {"method": "vq", "entries": [16]})
    errors = [relative_error(weight, w.expression(), moments(inputs)) for w in (done, plain)]
    assert errors[0] < 0.7 * errors[1]
