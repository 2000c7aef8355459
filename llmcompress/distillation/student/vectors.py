"""How far the numbers of a vector move in a step: each in proportion to its own size.

The gains of one norm of Gemma 3 lie between 0.001 and 585, the biases of one layer of Qwen2 between 0.01 and 145. Steps
in proportion to their root mean square would multiply the smallest, which hold down channels of large values.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.func import functional_call

FLOOR = 1e-3  # of a vector's root mean square: a smaller number moves as one of this size


def number_sizes(vector: Tensor, offset: float) -> Tensor:
    """Return the size of each number of `vector + offset`, at least `FLOOR` of their root mean square; 1 for zeros."""
    sizes = (vector + offset).abs()
    mean = sizes.square().mean().sqrt()
    return torch.where(mean > 0, sizes.maximum(FLOOR * mean), torch.ones_like(sizes))


@torch.no_grad()
def find_offsets(model: nn.Module) -> dict[str, float]:
    """Return what norms add to their gains, by the gains' names, where that is not 0: Gemma's are stored less 1."""
    norms = {name: module for name, module in model.named_modules() if "Norm" in type(module).__name__}
    return {f"{name}.weight": 1.0 for name, module in norms.items() if _adds_one(module)}


def _adds_one(norm: nn.Module) -> bool:
    """True if a norm passes something on although its gains are zero."""
    gains = getattr(norm, "weight", None)
    if not isinstance(gains, Tensor) or gains.ndim != 1 or len(inspect.signature(norm.forward).parameters) != 1:
        return False
    zeros = {name: torch.zeros(value.shape) for name, value in norm.named_parameters()}  # its own may be on meta
    return bool(functional_call(norm, zeros, torch.arange(float(len(gains)))[None]).any())
