"""Linears between hidden states of two models of unequal widths: they train along with the student and are dropped.

There is one for each pair of matched blocks, float32, from the student's width to the teacher's, without a bias. It
starts as a random orthogonal map, which stretches nothing: into the wider space, or onto the narrower one. It serves
the losses alone: it is in a run's state, but not in the run's output. Every phase starts with new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from llmcompress.runtime.seeding import generator

Pair = tuple[int, int]  # the student's block, the teacher's


def projections(widths: Mapping[Pair, tuple[int, int]], seed: int, like: torch.Tensor) -> nn.ModuleDict:
    """Return by `projection_name` a linear from the first width to the second, on the device of `like` and in float32,
    or float64 if `like` is."""
    found = nn.ModuleDict()
    for pair, (given, wanted) in widths.items():
        start = partial(nn.init.orthogonal_, generator=generator(seed, "projection", *pair))
        found[projection_name(pair)] = started_linear(given, wanted, like, start)
    return found


def started_linear(given: int, wanted: int, like: torch.Tensor, start: Callable[[torch.Tensor], object]) -> nn.Linear:
    """Return a linear from the first width to the second without a bias, whose weight `start` has filled, on the device
    of `like` and in float32, or float64 if `like` is."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    linear = nn.utils.skip_init(nn.Linear, given, wanted, bias=False, dtype=dtype)
    start(linear.weight)
    return linear.to(like.device)


def projection_name(pair: Pair) -> str:
    """Return the name of a projection in a run's state."""
    return f"projection_{pair[0]}_to_{pair[1]}"
