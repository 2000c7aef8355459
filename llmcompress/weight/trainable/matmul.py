"""Product with a weight that trains: its frozen parts are decoded once, its trained numbers put in at every use.

    ready = by_rows(decode_frozen(decode(...), "", codes), "", dtype)
    product(x, insert_numbers(ready, "", None, numbers))

A grid with frozen codes and one scale a row is multiplied as (x codes^T) * scale: the gradient of the scale comes from
the product, and no matrix is built. In a rotated basis its codes are turned back once, instead of `x` at every use. For
other nodes autograd keeps the float32 matrices of a forward until its backward; checkpoint activations to limit these
to one block. Paths are those of stored tensors (`encoding`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmcompress.weight import expression
from llmcompress.weight.hadamard import unrotate
from llmcompress.weight.nodes import (
    Grid,
    RotatedInputs,
    Transpose,
    TrellisCodes,
    Weight,
    Where,
    rebuild,
    stored_tensors,
    with_fields,
)
from llmcompress.weight.trellis import matrix, table


@dataclass(frozen=True, eq=False)
class _ScaledRows(Grid):
    """Frozen codes in the basis and dtype of the inputs, and one scale a row, which is stored as `name`."""

    name: str


def decode_frozen(w: Weight, path: str, trained: frozenset[str]) -> Weight:
    """Return `w` with the codes of frozen grids as bfloat16, less their zero points: whole and half numbers, exact."""
    match w:
        case Grid(scale=scale) if path + "codes" not in trained:
            whole = expression.dense(replace(w, scale=torch.ones_like(scale)))
            return replace(w, codes=whole.bfloat16(), zero=torch.zeros_like(scale))
        case TrellisCodes(codes, scale, trellis, run):
            numbers = matrix(codes, len(scale), trellis, run).bfloat16()  # which its tables are made for
            return Grid(numbers, scale, torch.zeros_like(scale), len(table(trellis)), numbers.shape[1])
    return rebuild(w, lambda place, node, _: decode_frozen(node, path + place, trained))


def by_rows(w: Weight, path: str, dtype: torch.dtype) -> Weight:
    """Return `w`, a result of `decode_frozen`, for products in `dtype`: with `_ScaledRows` where they fit.

    Codes that are turned back are rounded to `dtype`, as a decoded weight would be.
    """
    match w:
        case Grid(codes, scale, zero, levels, group_size) if codes.dtype == torch.bfloat16 and scale.shape[1] == 1:
            return _ScaledRows(codes.to(dtype), scale, zero, levels, group_size, path + "scale")
        case RotatedInputs(Grid() as grid, signs, block):
            inner = by_rows(grid, path + "inner_", torch.promote_types(dtype, torch.float32))
            if isinstance(inner, _ScaledRows):
                return replace(inner, codes=unrotate(inner.codes, signs, block).to(dtype))
            return w
        case Where() | Transpose():  # multiplied as a matrix
            return w
    return rebuild(w, lambda place, node, _: by_rows(node, path + place, dtype))


def insert_numbers(w: Weight, path: str, shown: Tensor | None, numbers: dict[str, Tensor]) -> Weight:
    """Return `w` with the numbers that train, each flat under its path, in their places."""
    if isinstance(w, _ScaledRows):
        return replace(w, scale=_insert(numbers.get(w.name), w.scale, None))
    own = {
        part.name: _insert(numbers[path + part.name], part.tensor, shown if part.per == "element" else None)
        for part in stored_tensors(w)
        if path + part.name in numbers
    }
    return with_fields(
        rebuild(w, lambda place, node, here: insert_numbers(node, path + place, here, numbers), shown), own
    )


def _insert(given: Tensor | None, leaf: Tensor, shown: Tensor | None) -> Tensor:
    """Return a leaf with the stored elements `given`, flat; without them as it is."""
    if given is None:
        return leaf
    if shown is None:
        return given.reshape(leaf.shape)
    return torch.zeros(leaf.shape, dtype=given.dtype, device=given.device).masked_scatter(shown, given)


def product(x: Tensor, w: Weight) -> Tensor:
    """Return `expression.matmul` with a result of `by_rows`."""
    return expression.matmul(x, w, _leaf_product)


def _leaf_product(x: Tensor, w: Weight) -> Tensor:
    match w:
        case _ScaledRows(codes, scale):
            output: Tensor = _ScaleColumns.apply(nn.functional.linear(x, codes), scale[:, 0].expand(len(codes)))
            return output
    return expression.by_dense(x, w)


class _ScaleColumns(torch.autograd.Function):
    """Columns of a product `[..., out]` times float32 scales `[out]`, in the product's dtype; gradients in that dtype,
    summed in float32."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(product, scale)
        exact = torch.promote_types(product.dtype, torch.float32)
        return (product.to(exact) * scale.to(exact)).to(product.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, Tensor | None]:
        product, scale = ctx.saved_tensors
        of_product = incoming * scale.to(incoming.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_product, None
        exact = torch.promote_types(product.dtype, torch.float32)
        return of_product, (incoming * product).flatten(0, -2).sum(0, dtype=exact).to(scale.dtype)
