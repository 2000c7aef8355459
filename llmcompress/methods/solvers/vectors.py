"""Codebooks of vectors: their entries fitted, and the codes of vectors chosen, in error feedback and afterwards.

Entries come from weighted k-means before a layer is coded, and from least squares under its Hessian after. An error e
of the columns of one vector costs |e A|^2, where A says what couples them, and the nearest entry under A is chosen.
Columns of a vector that are stored elsewhere do not count. Once all is chosen, codes move again where that lowers
tr(E H E^T): the best entry for a vector is the one nearest to `q + (E H)_v inverse(H_vv)`, under H_vv, where v are its
columns and q is what they store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmcompress.methods.solvers.feedback import few_threads
from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import Codebook, Columns, Sum, Weight, Where

TURNS = 2  # of codebooks that are added up, where all are chosen again
SAMPLE = 1 << 15  # vectors that k-means looks at, at most
PART = 1 << 10  # vectors whose distances to all entries are in memory at a time
ROUNDS = 10  # of k-means; least squares under the Hessian goes on from there
STEPS = 3  # of conjugate gradients: few, since codes move again and entries are near already
BLOCK = 64  # columns whose moves are gathered into one product; changes speed, never the result
Move = Callable[[Weight, Tensor, Tensor | None], Weight]  # codebooks, their target [out, in], their columns [in]


class Vectors:
    """A `Side`: vectors of columns as entries of codebooks, added up.

    Entries are fitted before. Codes are chosen when the loop reaches the first column of a vector; storing its columns
    one by one then feeds back what a triangular solve over all of them would.
    """

    def __init__(
        self, books: Sequence[Codebook], factor: Tensor | None = None, importance: Tensor | None = None
    ) -> None:
        """Take `books` of one length. Codes are chosen under the `factor [in, in]` of the feedback; without one, by the
        `importance [in]` of a squared error in a column."""
        self.books, self.factor, self.importance = tuple(books), factor, importance
        self.length, self.width = books[0].centroids.shape[1], books[0].width
        self.strides: tuple[int, ...] = (self.length,)
        self.scales = [book.scale.float() for book in books]  # each [out, 1]
        self.codes = torch.stack([book.codes for book in books])  # [books, out, vectors]
        self.stored = torch.zeros(self.length, self.codes.shape[1], device=self.codes.device)

    def begin(self, column: int, current: Tensor, shown: Tensor | None = None) -> None:
        """Choose the codes of a vector at its first column; `shown [in, out]` is the same for all rows."""
        if column % self.length:
            return
        places = self.places(column // self.length, None if shown is None else shown[:, 0])
        if len(places):
            codes, values = self.nearest(places, current[places], self._root(places))
            self.codes[:, :, column // self.length] = codes
            self.stored[places - column] = values

    def project(self, column: int, values: Tensor) -> Tensor:
        """Return the chosen values."""
        return self.stored[column % self.length]

    def weight(self, values: Tensor) -> Weight:
        """Return the expression for the codes as they are now."""
        return sum_of_books(
            [replace(book, codes=codes) for book, codes in zip(self.books, self.codes.clone(), strict=True)]
        )

    def places(self, vector: int, shown: Tensor | None = None) -> Tensor:
        """Return the columns of a vector that are `shown [in]`."""
        start, stop = vector * self.length, min((vector + 1) * self.length, self.width)
        inside = torch.arange(start, stop, device=self.codes.device)
        return inside if shown is None else inside[shown[start:stop]]

    def nearest(
        self, places: Tensor, wanted: Tensor, root: Tensor, codes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the codes uint8 `[books, out]` nearest to `wanted [columns, out]` and their values `[columns, out]`.

        `places`: the columns of one vector. `root [columns, columns]`: A of the module. Codebooks are searched in turn,
        each for what the others leave, from `codes [books, out]`, so that nothing gets worse, or from nothing.
        """
        entries = [book.centroids.float()[:, places % self.length] for book in self.books]
        points = [each @ root for each in entries]
        chosen_codes = torch.zeros_like(self.codes[:, :, 0]) if codes is None else codes.clone()
        values = [torch.zeros_like(wanted.T) for _ in entries]
        if codes is not None:
            values = [each[code.long()] * scale for each, code, scale in zip(entries, codes, self.scales, strict=True)]
        for _ in range(1 if codes is not None or len(entries) == 1 else TURNS):
            for book, scale in enumerate(self.scales):
                others = [value for other, value in enumerate(values) if other != book]
                left = sum((-value for value in others), wanted.T)
                left = torch.where(scale > 0, left / scale, 0.0) @ root
                nearness = torch.addmm(points[book].square().sum(1), left, points[book].T, alpha=2, beta=-1)
                chosen = nearness.argmax(1)
                chosen_codes[book], values[book] = chosen, entries[book][chosen] * scale
        return chosen_codes, torch.stack(values).sum(0).T

    def _root(self, places: Tensor) -> Tensor:
        """Return A for the loop: with feedback inverse(U) of the columns `places`, since e inverse(U) is fed back."""
        if self.factor is not None:
            block = self.factor[places][:, places]
            return torch.linalg.solve_triangular(block, torch.eye(len(block), device=block.device), upper=True)
        weights = torch.ones(self.width, device=self.codes.device) if self.importance is None else self.importance
        return weights[places].sqrt().diag()


def sum_of_books(books: Sequence[Codebook]) -> Weight:
    """Return codebooks added up."""
    return books[0] if len(books) == 1 else Sum(tuple(books))


def books_of(w: Weight) -> tuple[Codebook, ...]:
    """Return the codebook that `w` is, or those of one length that it adds up; none for anything else."""
    parts = w.parts if isinstance(w, Sum) else (w,)
    books = tuple(part for part in parts if isinstance(part, Codebook))
    alike = len({book.centroids.shape[1] for book in books}) == 1
    return books if alike and len(books) == len(parts) else ()


# --- entries ----------------------------------------------------------------------------------------------------------


def k_means(vectors: Tensor, importance: Tensor, entries: int, random: torch.Generator) -> Tensor:
    """Return centroids float32 `[entries, length]` of `vectors [count, length]`; squared errors count by `importance`.

    k-means++ and then Lloyd's rounds, on a random sample of many vectors. If there are fewer different vectors than
    entries, each is a centroid, and the other centroids are zero.
    """
    if len(vectors) > SAMPLE:
        chosen = torch.randperm(len(vectors), generator=random)[:SAMPLE].to(vectors.device)
        vectors, importance = vectors[chosen], importance[chosen]
    centroids = _spread_out(vectors, importance, entries, random)
    pulled = importance * vectors
    for _ in range(ROUNDS):
        nearest = nearest_entries(vectors, importance, centroids)
        total = torch.zeros_like(centroids).index_add_(0, nearest, importance)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, pulled)
        centroids = torch.where(total > 0, sums / total.clamp_min(1e-30), centroids)
    return centroids


def nearest_entries(vectors: Tensor, importance: Tensor, centroids: Tensor) -> Tensor:
    """Return the number of the entry with the least weighted squared error for each of `vectors`, int64 `[count]`."""
    inputs = torch.cat([importance * vectors, importance], 1)
    table = torch.cat([centroids, -0.5 * centroids.square()], 1).T
    return torch.cat([(part @ table).argmax(1) for part in inputs.split(PART)])


def _spread_out(vectors: Tensor, importance: Tensor, entries: int, random: torch.Generator) -> Tensor:
    """Return the start of k-means++: each entry is a vector drawn by its distance from the entries before."""
    centroids = vectors.new_zeros(entries, vectors.shape[1])
    draws = torch.rand(entries, generator=random, dtype=torch.float64).tolist()
    distance = importance.sum(1)  # of the first, all that counts
    for entry, draw in enumerate(draws):
        reach = distance.double().cumsum(0)
        if float(reach[-1]) <= 0:
            break
        place = min(int(torch.searchsorted(reach, draw * float(reach[-1]), right=True)), len(vectors) - 1)
        centroids[entry] = vectors[place]
        away = (importance * (vectors - vectors[place]).square()).sum(1)
        distance = away if entry == 0 else torch.minimum(distance, away)
    return centroids


def refit_entries(w: Codebook, target: Tensor, hessian: Tensor, shown: Tensor | None) -> Codebook:
    """Return `w` with entries nearer to least squares of tr(E H E^T), for its codes and scales.

    E is `target [out, in]` less the `shown` part of `w`. The normal equations are solved by a few conjugate gradients,
    scaled by their diagonal. If rounding to float16 leaves no gain, `w` stays as it is.
    """
    scale = w.scale.float() if shown is None else w.scale.float() * shown
    codes, (entries, length) = w.codes.long().flatten(), w.centroids.shape
    fill = -w.width % length

    def matrix(centroids: Tensor) -> Tensor:
        return centroids[codes].reshape(len(w.codes), -1)[:, : w.width] * scale

    def gather(slopes: Tensor) -> Tensor:
        vectors = torch.nn.functional.pad(slopes * scale, (0, fill)).reshape(-1, length)
        return torch.zeros(entries, length, device=vectors.device).index_add_(0, codes, vectors)

    stored = dense(w) if shown is None else dense(w) * shown
    missing = target - stored
    weight = gather(hessian.diagonal() * scale.expand_as(target))
    weight = torch.where(weight > 0, weight, 1.0)
    residual = gather(missing @ hessian)
    moved, direction = torch.zeros_like(residual), residual / weight
    energy = (residual * direction).double().sum()
    for _ in range(STEPS):
        if not bool(energy > 0):
            break
        answer = gather(matrix(direction) @ hessian)
        curvature = (direction * answer).double().sum()
        if not bool(curvature > 0):
            break
        share = (energy / curvature).float()
        moved = moved + share * direction
        residual = residual - share * answer
        energy, before = (residual * residual / weight).double().sum(), energy
        direction = residual / weight + (energy / before).float() * direction
    most = torch.finfo(torch.float16).max
    found = replace(w, centroids=(w.centroids.float() + moved).clamp(-most, most).to(torch.float16))
    change = matrix(found.centroids.float() - w.centroids.float())
    gain = (change * ((2 * missing - change) @ hessian)).double().sum()
    return found if bool(gain > 0) else w


# --- moves of codes ---------------------------------------------------------------------------------------------------


def move_codebooks(base: Weight, target: Tensor, move: Move) -> Weight:
    """Return `base` with its codebooks moved; whole columns beside them stay, as does a base without codebooks."""
    match base:
        case Where(Columns(inside) as index, kept, outside) if books_of(outside):
            return Where(index, kept, move(outside, target - dense(kept) * inside, ~inside))
        case _ if books_of(base):
            return move(base, target, None)
    return base


def visit_vectors(w: Weight, target: Tensor, hessian: Tensor, shown: Tensor | None) -> Weight:
    """Return codebooks after one visit to every vector, left to right, each moved to its best entry.

    `target [out, in]`; `hessian [in, in]`; only columns that are `shown [in]` count.
    """
    vectors, values, pull = _start(w, target, hessian, shown)
    span = max(BLOCK // vectors.length, 1) * vectors.length
    for start in range(0, len(values), span):
        stop = min(start + span, len(values))
        moves = torch.zeros_like(values[start:stop])
        with few_threads(values.shape[1]):
            for first in range(start, stop, vectors.length):
                vector = first // vectors.length
                places, codes, move = _best(vectors, vector, shown, values, pull, hessian)
                vectors.codes[:, :, vector] = codes
                moves[places - start] = move
                after = min(first + vectors.length, stop)
                pull[after:stop].addmm_(hessian[after:stop][:, places], move, alpha=-1)
        # rows before `stop` are not read again in this visit
        pull[stop:].addmm_(hessian[stop:, start:stop], moves, alpha=-1)
    return vectors.weight(values.T)


def change_vectors(w: Weight, target: Tensor, hessian: Tensor, shown: Tensor | None, share: float) -> Weight:
    """Return codebooks after one step in which at most a `share` of the vectors of a row change, those that gain most.

    Gains are those of single changes. If all changes of a row together gain nothing, only the best one is made.
    Arguments as of `visit_vectors`.
    """
    vectors, values, pull = _start(w, target, hessian, shown)
    count = vectors.codes.shape[2]
    codes, moves = vectors.codes.clone(), torch.zeros_like(values)
    gains = values.new_zeros(count, values.shape[1])
    with few_threads(values.shape[1]):
        for vector in range(count):
            places, codes[:, :, vector], move = _best(vectors, vector, shown, values, pull, hessian)
            moves[places] = move
            gains[vector] = (move * (2 * pull[places] - hessian[places][:, places] @ move)).sum(0)
    few, best = (_largest(gains, number) & (gains > 0) for number in (math.ceil(share * count), 1))
    together = moves * few.repeat_interleave(vectors.length, 0)[: len(moves)]
    gained = (together * (2 * pull - hessian @ together)).sum(0) > 0
    vectors.codes = torch.where(torch.where(gained, few, best).T, codes, vectors.codes)
    return vectors.weight(values.T)


def _start(w: Weight, target: Tensor, hessian: Tensor, shown: Tensor | None) -> tuple[Vectors, Tensor, Tensor]:
    """Return the codebooks, the values that they store `[in, out]`, and `H E^T`."""
    values = dense(w).T.clone(memory_format=torch.contiguous_format)
    if shown is not None:
        values *= shown[:, None]
    return Vectors(books_of(w)), values, hessian @ (target.T - values)


def _largest(gains: Tensor, count: int) -> Tensor:
    """True at the `count` largest of each column."""
    return torch.zeros_like(gains, dtype=torch.bool).scatter_(0, gains.topk(count, dim=0).indices, True)


def _best(
    vectors: Vectors, vector: int, shown: Tensor | None, values: Tensor, pull: Tensor, hessian: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the columns of a vector, its best codes `[books, out]`, and the move to them `[columns, out]`."""
    places = vectors.places(vector, shown)
    root = torch.linalg.cholesky(hessian[places][:, places])
    wanted = values[places] + torch.cholesky_solve(pull[places], root)
    codes, stored = vectors.nearest(places, wanted, root, vectors.codes[:, :, vector])
    return places, codes, stored - values[places]
