"""Masks that move in every step while pruned matrices are dense.

- Learned masks (PST, arXiv 2205.11005): a weight's score is its size times the norm of its input, as in Wanda, plus a
  low-rank matrix and a number for each row and column, which learn. The best scores are the mask. What a weight would
  add to the loss is the gradient of its score, straight through the mask.
- A reweighted penalty (arXiv 2004.05531): weights shrink in every step, each by a share that falls with its own size,
  so that small ones end near zero and large ones stay as they are. Pruning then changes little.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.distill.student.regrow import Masks, mask_like
from llmcompress.recipe.regrowth import Regrowth
from llmcompress.weight.nodes import Bitmap, Pattern
from llmcompress.weight.trainable.latents.form import Formed, ValuesForm

RANK = 4


def moving(asked: Regrowth, masks: Masks, norms: Mapping[str, Tensor] | None) -> dict[str, ValuesForm]:
    """Return the form in which the values of each grown linear train, by name; none if masks change at the end alone.

    `norms`: squared norms of inputs `[in]` by name; None if the size alone decides.
    """
    if not asked.moves:
        return {}
    found: dict[str, ValuesForm] = {}
    for name, mask in masks.items():
        sizes = torch.ones(mask.inside.shape[1]) if norms is None else norms[name]
        if asked.penalty is None:
            found[name] = partial(LearnedMask, mask=mask, norms=sizes, rank=asked.rank or RANK)
        else:
            found[name] = partial(Penalized, mask=mask, norms=sizes, penalty=asked.penalty)
    return found


class LearnedMask(Formed):
    """The values of a matrix `[out, in]` under a mask with as many weights as `mask` has, by scores that learn.

    `norms`: squared norms of inputs `[in]`. Scores are in units of the mean of sizes times norms.
    """

    kind = "values"
    columns_norm: Tensor

    def __init__(self, values: Tensor, *, mask: Bitmap | Pattern, norms: Tensor, rank: int) -> None:
        super().__init__()
        out, width = self.size = mask.inside.shape[0], mask.inside.shape[1]
        rank, device = min(rank, out, width), values.device
        drawn = torch.randn(out, rank, generator=torch.Generator().manual_seed(0)) / rank**0.5
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
        found: Tensor = _Gate.apply(matrix, learned, self.inside(learned))
        return found.reshape(-1)

    @torch.no_grad()
    def inside(self, learned: Tensor) -> Tensor:
        """Return the mask, bool `[out, in]`, given the part of the scores that learns; found once after each step."""
        versions = tuple(parameter._version for parameter in self.parameters())
        if self._chosen is None or self._chosen[0] != versions:
            scores = self.values.view(self.size).abs() * (self.columns_norm / self.unit) + learned
            self._chosen = versions, mask_like(self.like, scores).inside
        return self._chosen[1]


class Penalized(Formed):
    """The values of a matrix `[out, in]`, all there, of which the small ones shrink after every step.

    A weight w of squared score s = w^2 norm loses the share `penalty` t / (s + t), where t is the largest squared score
    of those that `mask_like` would leave out, in the whole matrix or in the weight's group: the gradient of log(s + t),
    whose weights follow w in every step where the paper's do in every round. As t falls, what stays loses less.
    """

    kind = "values"
    norms: Tensor

    def __init__(self, values: Tensor, *, mask: Bitmap | Pattern, norms: Tensor, penalty: float) -> None:
        super().__init__()
        self.like, self.penalty = mask, penalty
        self.register_buffer("norms", norms.to(values.device))
        self.values = nn.Parameter(values)

    def forward(self) -> Tensor:
        """The values, flat float32."""
        return self.values

    @torch.no_grad()
    def settle(self) -> None:
        """Shrink the values."""
        matrix = self.values.view(self.like.inside.shape)
        scores = matrix.square() * self.norms
        last = _largest_left_out(self.like, scores)
        share = last / (scores + last)
        matrix.mul_(1 - self.penalty * share.nan_to_num(nan=0.0))  # 0 / 0: nothing to shrink


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


def _largest_left_out(mask: Bitmap | Pattern, scores: Tensor) -> Tensor:
    """Return the largest score that goes, broadcast to `scores [out, in]`: of all, or of every group of columns."""
    kept = mask_like(mask, scores).inside
    out = scores.masked_fill(kept, 0.0)
    if isinstance(mask, Pattern):
        groups = out.view(len(scores), -1, mask.group).amax(2, keepdim=True)
        return groups.expand(-1, -1, mask.group).reshape(scores.shape)
    return out.max()
