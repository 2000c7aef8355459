"""Products of a large output head that is held as it is stored: float32 takes a few of its rows at a time.

The head of 262,144 tokens and a width of 640 is 671 MB in float32, and a comparison of two models holds two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LARGE = 2**26  # weights of a head: 268 MB in float32
ROWS = 8192  # of a head that are multiplied at once


def is_large_head(module: nn.Module) -> bool:
    """True if a linear has so many weights that they stay as stored."""
    return isinstance(module, nn.Linear) and module.weight.numel() >= LARGE


@contextmanager
def multiply_by_rows(head: nn.Linear) -> Iterator[None]:
    """Multiply by `head`, of any dtype, in the dtype of its inputs while the context lasts.

    Its weight seems to be float32 to a model that casts inputs to that dtype, and is NaN to one that takes it itself.
    """
    weight = head.weight

    def forward(inputs: Tensor) -> Tensor:
        outputs: Tensor = _RowProducts.apply(inputs, weight)
        return outputs if head.bias is None else outputs + head.bias.to(outputs.dtype)

    head.forward = forward  # type: ignore[assignment, method-assign]
    head.weight = nn.Parameter(weight.new_full((1, 1), torch.nan, dtype=torch.float32).expand(weight.shape), False)
    try:
        yield
    finally:
        head.weight = weight
        del head.forward


class _RowProducts(torch.autograd.Function):
    """Products of inputs `[..., width]` and a frozen matrix `[out, width]`; its backward pass converts rows anew."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        first, *others = (slice(start, start + ROWS) for start in range(0, len(weight), ROWS))
        part = nn.functional.linear(inputs, weight[first].to(inputs.dtype))
        outputs = part.new_empty(*part.shape[:-1], len(weight))  # autocast decides on its dtype
        outputs[..., first] = part
        for rows in others:
            outputs[..., rows] = nn.functional.linear(inputs, weight[rows].to(inputs.dtype))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        total = gradient.new_zeros(*gradient.shape[:-1], weight.shape[1], dtype=torch.float32)
        for part, rows in zip(gradient.split(ROWS, -1), weight.split(ROWS), strict=True):
            total += part @ rows.to(part.dtype)
        return total, None
