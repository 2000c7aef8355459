"""The sequences that a step reads, and its learning rate: functions of the step alone, so that resuming is exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from llmcompress.runtime.seeding import generator


def rows(step: int, batch: int, sequences: int, seed: int | str) -> list[int]:
    """The numbers of the `batch` sequences that step `step` (from 0) reads, where every step reads as many."""
    return span(step * batch, batch, sequences, seed)


def span(start: int, count: int, sequences: int, seed: int | str) -> list[int]:
    """The numbers of the `count` sequences that follow the first `start` ones read: every epoch is a new permutation of
    all `sequences`."""
    wanted = range(start, start + count)
    return [int(_permutation(position // sequences, sequences, seed)[position % sequences]) for position in wanted]


@lru_cache(maxsize=16)
def _permutation(epoch: int, sequences: int, seed: int | str) -> Tensor:
    return torch.randperm(sequences, generator=generator(seed, "epoch", epoch))


def rate(step: int, steps: int, warmup: float, final: float) -> float:
    """The share of the learning rate at `step` (from 0) of `steps`: a linear rise, then a cosine down to `final`."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising - 1)
    return final + (1 - final) * (1 + math.cos(math.pi * min(1.0, done))) / 2


SMOOTHING = 0.5
MOST = 20.0


def normalize(weights: Sequence[float]) -> list[float]:
    """Shares, which sum to 1, from weights."""
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def reweight(shares: Sequence[float], student: Sequence[float], teacher: Sequence[float]) -> list[float]:
    """The next shares of the domains, from the perplexities of both models on each."""
    ratios = [min(one / other, MOST) for one, other in zip(student, teacher, strict=True)]
    most = max(ratios)
    psi = normalize([share * math.exp(ratio - most) for share, ratio in zip(shares, ratios, strict=True)])
    return [SMOOTHING * part + (1 - SMOOTHING) / len(psi) for part in psi]


def quotas(shares: Sequence[float], batch: int, step: int, seed: int) -> list[int]:
    """Return each domain's number of the `batch` sequences of `step`: batch * share, rounded down or up at random so
    that this is its mean (systematic sampling)."""
    shift = float(torch.rand((), generator=generator(seed, "domains", step), dtype=torch.float64))
    ends = [min(batch, math.ceil(batch * bound - shift)) for bound in accumulate(shares)]
    return [last - first for first, last in pairwise([0, *ends[:-1], batch])]


def draw(cursors: Sequence[int], counts: Sequence[int], sizes: Sequence[int], seed: int) -> list[int]:
    """The numbers of the next `counts[i]` sequences of each domain i, of which `cursors[i]` were read before.

    `sizes[i]` sequences of the domains lie one behind the other; each domain is read in a new order every time round.
    """
    starts = [0, *accumulate(sizes)]
    return [
        start + number
        for start, cursor, count, size in zip(starts, cursors, counts, sizes)
        for number in span(cursor, count, size, seed)
    ]
