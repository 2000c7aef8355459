"""The sequences that a training step reads, and its learning rate: functions of the step, so that resuming is exact.

Several domains share the sequences of a step. Their shares can follow the student: DDK (arXiv 2407.16154) gives a
domain more, the further the student is behind its teacher there. Of N domains with shares r and perplexities of both
models on held-out sequences, every few steps

    psi_i = r_i exp(student_i / teacher_i)        r_i <- SMOOTHING psi_i / sum psi + (1 - SMOOTHING) / N

so that no domain vanishes. The first r come from the weights in the recipe. Differs from the paper: the ratio is cut at
MOST, since that of a ruined student is thousands, and the held-out sequences are some of the reported ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from llmcompress.runtime.seeding import generator

SMOOTHING = 0.5
MOST = 20.0


def rows(step: int, batch: int, sequences: int, seed: int | str) -> list[int]:
    """Return the numbers of the `batch` sequences of `step` (from 0), if every step reads as many."""
    return span(step * batch, batch, sequences, seed)


def span(start: int, count: int, sequences: int, seed: int | str) -> list[int]:
    """Return the numbers of the `count` sequences after the first `start`; each epoch is a new order of `sequences`."""
    wanted = range(start, start + count)
    return [int(_permutation(position // sequences, sequences, seed)[position % sequences]) for position in wanted]


@lru_cache(maxsize=16)
def _permutation(epoch: int, sequences: int, seed: int | str) -> Tensor:
    return torch.randperm(sequences, generator=generator(seed, "epoch", epoch))


def rate(step: int, steps: int, warmup: float, final: float) -> float:
    """Return the share of the learning rate at `step` (from 0): a linear rise, then a cosine down to `final`."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising - 1)
    return final + (1 - final) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def normalize(weights: Sequence[float]) -> list[float]:
    """Return shares, which sum to 1."""
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def reweight(shares: Sequence[float], student: Sequence[float], teacher: Sequence[float]) -> list[float]:
    """Return the next shares of the domains from the perplexities of both models on each."""
    ratios = [min(own / target, MOST) for own, target in zip(student, teacher, strict=True)]
    most = max(ratios)
    psi = normalize([share * math.exp(ratio - most) for share, ratio in zip(shares, ratios, strict=True)])
    return [SMOOTHING * part + (1 - SMOOTHING) / len(psi) for part in psi]


def quotas(shares: Sequence[float], batch: int, step: int, seed: int) -> list[int]:
    """Return each domain's number of the `batch` sequences of `step`.

    It is batch * share rounded down or up at random, with this mean (systematic sampling).
    """
    shift = float(torch.rand((), generator=generator(seed, "domains", step), dtype=torch.float64))
    ends = [min(batch, math.ceil(batch * bound - shift)) for bound in accumulate(shares)]
    return [last - first for first, last in pairwise([0, *ends[:-1], batch])]


def draw(cursors: Sequence[int], counts: Sequence[int], sizes: Sequence[int], seed: int) -> list[int]:
    """Return the numbers of the next `counts[i]` sequences of each domain i, `cursors[i]` of which were read before.

    The domains' `sizes[i]` sequences lie one behind the other.
    """
    starts = [0, *accumulate(sizes)]
    return [
        start + number
        for start, cursor, count, size in zip(starts, cursors, counts, sizes)
        for number in span(cursor, count, size, seed)
    ]
