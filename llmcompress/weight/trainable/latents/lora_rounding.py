"""Latents with low-rank offsets, the LoRA-Rounding of CBQ (arXiv 2312.07950): rounding moves with few numbers.

    latent = start + left right        left [out, rank], right [rank, in], in units of a cell

A rank of 4 trains 4 (out + in) numbers where latents of their own are out x in, so codes change together, in patterns
of rows and columns, and a short text cannot teach each code its own noise. `right` is zero at first, so nothing
changes; `left` is drawn with size 1 / sqrt(rank), so that a step moves latents as much at every rank.

Differs from CBQ: its factors make the variable of AdaRound, whose sigmoid and penalty choose between the two codes
beside a weight. Here latents are rounded in every step, with straight-through gradients, and may cross several cells.

Made for plain rounding, where the code beside a weight's own is about as good. After error feedback codes make up for
each other, and a pattern that moves many at once undoes that.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmcompress.weight.trainable.latents import Cells, TensorForm


class Offsets(TensorForm):
    """The latents of one grid that start at `start`, flat float32; the rank is at most that of the grid's matrix."""

    start: Tensor

    def __init__(self, start: Tensor, cells: Cells, rank: int) -> None:
        super().__init__()
        (out, width), self.cells = cells.size, cells
        rank = min(rank, out, width)
        drawn = torch.randn(out, rank, dtype=torch.float32, generator=torch.Generator().manual_seed(0)) / rank**0.5
        self.register_buffer("start", start)
        self.left = nn.Parameter(drawn.to(start.device))
        self.right = nn.Parameter(torch.zeros(rank, width, dtype=torch.float32, device=start.device))

    def forward(self) -> Tensor:
        """Return the latents, flat float32."""
        return self.start + self.cells.take_stored(self.left @ self.right)
