"""Forms of what trains: modules that compute one stored tensor from parameters of their own.

The tensor is the latents of a grid's codes (`flexround`, `lora_rounding`), or the values of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import Grid, Weight
from llmcompress.weight.trainable.masters import leaves


@dataclass(frozen=True, eq=False)
class Cells:
    """The codes of one grid `[out, in]`, in [0, levels).

    `shown`: bool, broadcasts to `[out, in]`, true where a code is stored; None: everywhere. `zero`: a weight of zero in
    code units, float32, flat as the stored codes, or a single one for all.
    """

    size: tuple[int, int]
    shown: Tensor | None
    levels: int
    zero: Tensor

    def take_stored(self, matrix: Tensor) -> Tensor:
        """Return the elements of a matrix `[out, in]` that have a code, flat."""
        return matrix.reshape(-1) if self.shown is None else matrix[self.shown.expand(self.size).to(matrix.device)]


class TensorForm(nn.Module):
    """One stored tensor, flat float32, which `forward` computes from parameters."""

    kind = "codes"  # of `relax.KINDS`

    def kinds(self) -> dict[str, str]:
        """Return the name of each parameter, and its kind."""
        return {name: self.kind for name, _ in self.named_parameters()}

    def settle(self) -> None:
        """Adjust parameters after an optimizer step, such as to keep latents within the range of their codes."""


Form = Callable[[Tensor, Cells], TensorForm]  # of the first latents, flat float32, and their cells
ValuesForm = Callable[[Tensor], TensorForm]  # of the values of a matrix, flat float32


@torch.no_grad()
def cells(w: Weight) -> dict[str, Cells]:
    """Return the cells of all grids of `w` outside low-rank terms, by the names of their codes in `encode`.

    Latents in low-rank terms, whose target is unknown, stay numbers of their own.
    """
    grids = {}
    for leaf in leaves(w, "", None, None, False):
        match leaf.node:
            case Grid(codes, scale, zero, levels, group_size) if not leaf.factor:
                size = codes.shape[0], codes.shape[1]
                middle = torch.tensor((levels - 1) / 2, device=codes.device)
                here = Cells(size, leaf.shown, levels, middle)
                if zero is not None:
                    away = dense(Grid(torch.zeros_like(codes), torch.ones_like(scale), zero, levels, group_size))
                    here = Cells(size, leaf.shown, levels, here.take_stored(-away))
                grids[leaf.path + "codes"] = here
    return grids
