"""Several domains in one distillation: the share of a step that each has, and which of its sequences come next.

Shares can follow the student: DDK (arXiv 2407.16154) gives more to a domain the further the student is behind its
teacher there. Of N domains with shares r and perplexities of student and teacher on sequences held out, every so often

    psi_i = r_i exp(student_i / teacher_i)        r_i <- SMOOTHING psi_i / sum psi + (1 - SMOOTHING) / N

so that no domain vanishes. The first r, before a first step, come from the weights that a recipe gives the domains.
Differs from the paper: the ratio is cut at MOST, because that of a student in ruins is thousands, and the sequences
looked at are some of those that are reported, not a third set. What is drawn is a function of the seed, the step, the
shares and how far each domain was read; all of it is kept with a run's state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from llmcompress.data.schedule import span
from llmcompress.runtime.seeding import generator

SMOOTHING = 0.5
MOST = 20.0


def normalized(weights: Sequence[float]) -> list[float]:
    """Shares, which sum to 1, from weights."""
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def reweighted(shares: Sequence[float], student: Sequence[float], teacher: Sequence[float]) -> list[float]:
    """The next shares of the domains, from the perplexities of both models on each."""
    ratios = [min(one / other, MOST) for one, other in zip(student, teacher, strict=True)]
    most = max(ratios)
    psi = normalized([share * math.exp(ratio - most) for share, ratio in zip(shares, ratios, strict=True)])
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
