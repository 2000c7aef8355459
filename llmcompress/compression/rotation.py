"""A permanent rotation of the residual stream (QuaRot, arXiv 2404.00456; SliceGPT, arXiv 2401.15024).

A norm without a weight commutes with any orthogonal R. So the weight g of each norm goes into the linears after it,
W -> W diag(g) R. Linears that write to the stream become R^T W, and the token table becomes E R. Outputs stay the same,
and no linear that reads the stream needs signs or a transform at run time. R is that of the step `rotate`, which still
serves linears that read something else (o and down of a Llama).

The output head reads the last norm, whose weight is not constant, so a head tied to the token table becomes a matrix of
its own. Rotated weights are rounded to their stored dtype once more; in bfloat16 that alone moves the predictions of
SmolLM2-135M by 2e-4 nats. QuaRot's code also subtracts the mean from each row of the table, which is right only for
layer norms, and not done here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from llmcompress.compression.producers import feeds
from llmcompress.errors import RecipeError
from llmcompress.models.dense.families import Architecture, architecture
from llmcompress.models.dense.model import DenseModel, untie_config
from llmcompress.runtime.seeding import generator
from llmcompress.weight.hadamard import ROWS, rotate


@dataclass(frozen=True)
class Turn:
    """The change to a tensor.

    `fold`: the norm whose weight goes into its columns. `columns`, `rows`: True if these are in the stream's basis (the
    entries of a bias are rows). `ones`: True for a norm's weight that was folded away.
    """

    fold: str | None = None
    columns: bool = False
    rows: bool = False
    ones: bool = False


@dataclass(frozen=True, eq=False)
class RotatedSource(DenseModel):
    """A dense model whose tensors are rotated as they are read, in float64, and rounded to their stored dtypes.

    `parameters` and `bytes` are those of the model on disk, where its head may be tied.
    """

    dense: DenseModel = field(kw_only=True)
    turns: dict[str, Turn] = field(kw_only=True)
    signs: Tensor = field(kw_only=True)

    @property
    def parameters(self) -> int:
        """The number of weights that the model on disk has."""
        return self.dense.parameters

    @property
    def bytes(self) -> int:
        """The size of the model's weights on disk."""
        return self.dense.bytes

    def read(self, name: str) -> Tensor:
        """Read the tensor `name` in the rotated basis and its stored dtype. Raises what `DenseModel.read` raises."""
        value, turn = self.dense.read(name), self.turns.get(name)
        if turn is None:
            return value
        if turn.ones:
            return torch.ones_like(value)
        folded = None if turn.fold is None else self.dense.read(turn.fold).double()
        if turn.rows:
            turned = rotate(value.double().t().contiguous(), self.signs, self._block)  # a bias is its own transpose
            return turned.t().to(value.dtype).contiguous()
        for rows in value.split(ROWS):  # tables are long
            wide = rows.double() if folded is None else rows.double() * folded
            rows.copy_(rotate(wide, self.signs, self._block))
        return value

    @property
    def _block(self) -> int:
        """The largest power of two that divides the width of the stream."""
        return len(self.signs) & -len(self.signs)


def rotated_source(source: DenseModel, seed: int, untie: bool) -> DenseModel:
    """Return the model with its residual stream rotated; nothing is read yet.

    `untie`: True if a tied head may become a matrix of its own. Raises RecipeError for a family whose norms and linears
    are not known to allow it, and for a tied head that may not be untied.
    """
    arch = architecture(source.config, source.skeleton())
    turns = _turns(arch)
    head, table = f"{arch.head}.weight", source.tensors[f"{arch.embedding}.weight"]
    tied, size = head not in source.tensors, f"{table.bytes / 1e6:.1f} MB"
    if tied and not untie:
        raise RecipeError(
            f"fuse: the output head of {source.name} is its token table, and a rotation makes them differ; set "
            f"untie: true for a head of its own ({size} before it is compressed), or use the step rotate instead"
        )
    notes = ["the residual stream is in a random basis, so hidden states and adapters of the dense model do not fit"]
    if tied:
        notes.append(f"the output head is a matrix of its own since the rotation, {size} more before it is compressed")
    same: dict[str, Any] = {each.name: getattr(source, each.name) for each in fields(DenseModel)}
    changed = {
        "config": untie_config(source.config),
        "tensors": {**source.tensors, head: table} if tied else source.tensors,
        "tied": {alias: origin for alias, origin in source.tied.items() if alias != head},
        "notes": (*source.notes, *notes),
    }
    signs = torch.rand(table.shape[1], dtype=torch.float32, generator=generator("fused rotation", seed)) < 0.5
    return RotatedSource(**same | changed, dense=source, turns=turns, signs=signs)


def _turns(arch: Architecture) -> dict[str, Turn]:
    """Return the change to each tensor that changes, by name."""
    turns = {f"{arch.embedding}.weight": Turn(columns=True)}
    for block in arch.blocks:
        for feed in feeds(arch, block):
            if feed.is_norm:
                turns[f"{feed.producer}.weight"] = Turn(ones=True)
            for name in feed.names:
                norm = Turn(fold=f"{feed.producer}.weight", columns=True)
                turns[f"{name}.weight"] = norm if feed.is_norm else Turn(rows=True)
                if not feed.is_norm:
                    turns[f"{name}.bias"] = Turn(rows=True)
    if arch.family is not None:
        turns[f"{arch.family.norm}.weight"] = Turn(ones=True)
        turns[f"{arch.head}.weight"] = Turn(fold=f"{arch.family.norm}.weight", columns=True)
    return turns
