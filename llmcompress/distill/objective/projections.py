"""Linears between hidden states of two models that are not as wide: they train along with the student, and are let go.

One for each pair of matched blocks, float32, from the student's width to the teacher's, without a bias. It starts as a
random rotation into the wider space, or onto a part of the narrower one, which stretches nothing. It serves the losses
alone: it is in a run's state, and not in what the run writes. Every phase starts with new ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from llmcompress.runtime.seeding import generator

Pair = tuple[int, int]  # the student's block, the teacher's


def projections(widths: Mapping[Pair, tuple[int, int]], seed: int, like: torch.Tensor) -> nn.ModuleDict:
    """By `projection_name`, a linear from the first width to the second; where `like` is, float64 if it is that."""
    found = nn.ModuleDict()
    for pair, (given, wanted) in widths.items():
        dtype = torch.promote_types(like.dtype, torch.float32)
        linear = nn.utils.skip_init(nn.Linear, given, wanted, bias=False, dtype=dtype)
        nn.init.orthogonal_(linear.weight, generator=generator(seed, "projection", *pair))
        found[projection_name(pair)] = linear.to(like.device)
    return found


def projection_name(pair: Pair) -> str:
    """In a run's state."""
    return f"projection_{pair[0]}_to_{pair[1]}"
