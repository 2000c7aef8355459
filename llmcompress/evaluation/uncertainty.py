"""Standard errors of scores, and differences beyond noise.

A score is a mean over independent items: those of a task, or windows of text. Tokens of one window depend on each
other, so KL and top-1 agreement are averaged in each window first. (Neighbouring windows of one document share its
topic, so the standard errors of text are a little too small.)

- Standard error of a score: s / sqrt(n), s the standard deviation of the items' values (n - 1 in its denominator). For
  a perplexity, exp(m), it is exp(m) times that of m, the mean negative log-probability (delta method).
- Difference of two models: taken item by item, with the standard error of the n differences. An item that is hard for
  both is no noise, so two models can differ beyond noise while their own error bars overlap.
- Beyond noise: |difference| > q * standard error, q the 97.5 % quantile of Student's t with n - 1 degrees of freedom:
  1.96 for many items, 2.78 for 5, 12.7 for 2. Differences that are all the same leave nothing to estimate noise from;
  then the sign test decides, which needs six. Fewer than two items: no standard error, no verdict.

One difference in twenty is marked by chance, so one mark among twenty columns means nothing. KL and top-1 agreement are
distances, which have no sign: they get a standard error and no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95  # two-sided


@dataclass(frozen=True)
class Difference:
    """`value`: mean over `items` of model minus reference. `stderr`, `beyond_noise`: None for fewer than two items."""

    value: float
    stderr: float | None
    items: int
    beyond_noise: bool | None


def mean(values: Sequence[float]) -> float:
    """Return the mean of one value or more."""
    return math.fsum(values) / len(values)


def stderr(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean of independent values; None for fewer than two."""
    count = len(values)
    if count < 2:
        return None
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (count - 1) / count)


def paired_difference(reference: Sequence[float], model: Sequence[float]) -> Difference:
    """Return `model` minus `reference`; both hold the values of the same items in the same order."""
    changes = [one - other for one, other in zip(model, reference, strict=True)]
    count, value, error = len(changes), mean(changes), stderr(changes)
    if error is None:
        beyond = None
    elif error == 0:
        beyond = value != 0 and 2 * 0.5**count < 1 - CONFIDENCE
    else:
        from scipy.special import stdtr  # light, unlike scipy.stats

        beyond = bool(2 * stdtr(count - 1, -abs(value) / error) < 1 - CONFIDENCE)
    return Difference(value, error, count, beyond)
