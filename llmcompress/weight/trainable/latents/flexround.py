"""Latents that are weights divided by learned numbers, as in FlexRound (arXiv 2306.00317).

    code = round(weight / (scale * element * row) + zero)        element: one for each weight; row: one for each row

Divisors are 1 at first, and held by their logarithms, which keeps them positive. A latent's derivative by the logarithm
of its divisor is minus the quotient itself: large weights, which matter more, move more, and may cross several cells,
while a weight of zero stays where it is.

Differs from FlexRound: latents are in units of the first scale, so a scale that learns multiplies codes and is no
divisor; `row` takes that part. Weights start within the cells of their stored codes, which need not be the nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmcompress.weight.trainable.latents import Cells, TensorForm
from llmcompress.weight.trainable.masters import MARGIN


class DividedWeights(TensorForm):
    """The latents of one grid that start at `start`, flat float32."""

    weights: Tensor  # in units of their scales, flat float32
    zero: Tensor
    row: Tensor  # int32, of each weight; empty where all are stored

    def __init__(self, start: Tensor, cells: Cells) -> None:
        super().__init__()
        out, width = self.size = cells.size
        numbers = torch.arange(out, dtype=torch.int32, device=start.device)[:, None].expand(out, width)
        self.levels = cells.levels
        self.register_buffer("weights", start - cells.zero)
        self.register_buffer("zero", cells.zero)
        self.register_buffer("row", numbers[:0, 0] if cells.shown is None else cells.take_stored(numbers))
        self.elements = nn.Parameter(torch.zeros_like(start))
        self.rows = nn.Parameter(torch.zeros(out, device=start.device))

    def forward(self) -> Tensor:
        """Return the latents, flat float32."""
        return self.zero + self.weights * torch.exp(-self.elements - self._row_of_each())

    @torch.no_grad()
    def settle(self) -> None:
        """Limit the divisors of elements from below, so that no latent leaves the range of the codes."""
        room = torch.where(self.weights > 0, self.levels - 0.5 - self.zero, 0.5 + self.zero) - MARGIN
        self.elements.clamp_(min=(self.weights.abs() / room).log() - self._row_of_each())

    def _row_of_each(self) -> Tensor:
        """Return the logarithm of its row's divisor for each weight, flat."""
        if len(self.row):
            return self.rows[self.row]
        return self.rows[:, None].expand(self.size).reshape(-1)
