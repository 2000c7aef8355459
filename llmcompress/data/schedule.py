"""The sequences that a step reads, and its learning rate: functions of the step alone, so that resuming is exact."""

from __future__ import annotations

import math
from functools import lru_cache

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
