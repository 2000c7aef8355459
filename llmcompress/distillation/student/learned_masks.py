"""Masks that learn while pruned matrices are dense (PST, arXiv 2205.11005).

A weight's score is its size times the norm of its input, as in Wanda, plus a low-rank matrix and a number for each row
and column, which learn. The best scores are the mask, in every step. The gradient of a score is that of its weight
times the weight, straight through the mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.distillation.student.regrow import Masks, mask_like
from llmcompress.weight.nodes import Bitmap, Pattern
from llmcompress.weight.trainable.latents import TensorForm, ValuesForm


def learned_masks(masks: Masks, norms: Mapping[str, Tensor], rank: int) -> dict[str, ValuesForm]:
    """Return the form in which the values of each grown linear train, by name.

    `norms`: squared norms of inputs `[in]` by name; `rank`: of the scores that learn.
    """
    return {name: partial(LearnedMask, mask=mask, norms=norms[name], rank=rank) for name, mask in masks.items()}


class LearnedMask(TensorForm):
    """The values of a matrix `[out, in]` under a mask with as many weights as `mask` has, by scores that learn.

    `norms`: squared norms of inputs `[in]`. Scores are in units of the mean of sizes times norms.
    """

    kind = "values"
    columns_norm: Tensor

    def __init__(self, values: Tensor, *, mask: Bitmap | Pattern, norms: Tensor, rank: int) -> None:
        super().__init__()
        out, width = self.size = mask.inside.shape[0], mask.inside.shape[1]
        rank, device = min(rank, out, width), values.device
        drawn = torch.randn(out, rank, dtype=torch.float32, generator=torch.Generator().manual_seed(0)) / rank**0.5
        self.like = mask
        self.register_buffer("columns_norm", norms.sqrt().to(device))
        self.unit = float((values.view(self.size).abs() * self.columns_norm).mean()) or 1.0
        self.values = nn.Parameter(values)
        self.left, self.right = nn.Parameter(drawn.to(device)), nn.Parameter(torch.zeros(rank, width, device=device))
        self.rows = nn.Parameter(torch.zeros(out, 1, device=device))
        self.columns = nn.Parameter(torch.zeros(width, device=device))
        self._chosen: tuple[tuple[int, ...], Tensor] | None = None  # versions of the parameters, and their mask

    def kinds(self) -> dict[str, str]:
        """Return the kind of each parameter: the values themselves, and the scores of the mask."""
        return {name: "values" if name == "values" else "masks" for name, _ in self.named_parameters()}

    def forward(self) -> Tensor:
        """The values that the mask lets through, flat float32, and zeros."""
        matrix = self.values.view(self.size)
        learned = self.left @ self.right + self.rows + self.columns
        gated: Tensor = _Gate.apply(matrix, learned, self.inside(learned))
        return gated.reshape(-1)

    @torch.no_grad()
    def inside(self, learned: Tensor) -> Tensor:
        """Return the mask, bool `[out, in]`, given the part of the scores that learns; new after each step."""
        versions = tuple(parameter._version for parameter in self.parameters())
        if self._chosen is None or self._chosen[0] != versions:
            scores = self.values.view(self.size).abs() * (self.columns_norm / self.unit) + learned
            self._chosen = versions, mask_like(self.like, scores).inside
        return self._chosen[1]


class _Gate(torch.autograd.Function):
    """A matrix under a mask: its gradient is the mask's part, that of the scores is straight through the mask."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, scores: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(matrix, inside)
        return matrix * inside

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        matrix, inside = ctx.saved_tensors
        [gradient] = gradients
        return gradient * inside, gradient * matrix, None
