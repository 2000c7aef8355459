"""Moves of stored codes, none of which raises tr(E H E^T): by visits in order, or the best few at once.

With all else as it is, the best entry for a vector is the one nearest to `q + (E H)_v inverse(H_vv)`, under H_vv, where
v are its columns and q is what they store.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from llmcompress.methods.solvers.feedback import few_threads
from llmcompress.methods.solvers.vectors import Vectors, books_of
from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import Columns, Weight, Where

BLOCK = 64  # columns whose moves are gathered into one product; changes speed, never the result
Move = Callable[[Weight, Tensor, Tensor | None], Weight]  # codebooks, their target [out, in], their columns [in]


def move_codebooks(base: Weight, target: Tensor, move: Move) -> Weight:
    """`base` with its codebooks moved, whole columns beside them as they are; without any as it is."""
    match base:
        case Where(Columns(inside) as index, kept, outside) if books_of(outside):
            return Where(index, kept, move(outside, target - dense(kept) * inside, ~inside))
        case _ if books_of(base):
            return move(base, target, None)
    return base


def visit_vectors(w: Weight, target: Tensor, hessian: Tensor, shown: Tensor | None) -> Weight:
    """Codebooks after one visit to every vector, left to right, each moved to its best entry.

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
    """Codebooks after one step in which at most a `share` of the vectors of a row change, those that gain most.

    The gain of each is known with all others as they are. Where all that change together gain nothing, only the best
    one of the row changes. Arguments as of `visited`.
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
    """The codebooks, what they store `[in, out]`, and `H E^T`."""
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
    """The columns of a vector, the codes `[books, out]` that are best for it, and the move to them `[columns, out]`."""
    places = vectors.places(vector, shown)
    root = torch.linalg.cholesky(hessian[places][:, places])
    wanted = values[places] + torch.cholesky_solve(pull[places], root)
    codes, stored = vectors.nearest(places, wanted, root, vectors.codes[:, :, vector])
    return places, codes, stored - values[places]
