"""Compressed weights repacked for GPUs, and the products with them."""

from __future__ import annotations

from functools import lru_cache, reduce
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import linear

from llmcompress.errors import InputError
from llmcompress.kernels.gpu.layouts import (
    Branch,
    GpuWeight,
    GridRows,
    InputChange,
    LowRankRows,
    StreamRows,
    add_change,
    pack_grid,
    pack_low_rank,
    pack_salient,
    pack_streams,
    sign_factors,
)
from llmcompress.weight.nodes import (
    Dense,
    Grid,
    LowRank,
    RotatedInputs,
    ScaledInputs,
    Sum,
    TrellisCodes,
    Weight,
    Where,
    Zero,
    shape,
)

OLDEST_GPU = (8, 0)  # compute capability: the first with bfloat16
FEW = 16  # inputs that kernels multiply at once; for more a matrix is decoded once
WIDEST_TURN = 1 << 15  # columns of a Hadamard transform in the registers of a program


@lru_cache(maxsize=16)
def runs_on(device: torch.device) -> bool:
    """True if the kernels run on a device: NVIDIA GPUs from Ampere on, where Triton is installed."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST_GPU and find_spec("triton") is not None


def prepare(w: Weight, dtype: torch.dtype = torch.bfloat16) -> GpuWeight | None:
    """Repack a weight on the device where it is.

    Args:
        w: sums, rotations and column factors of grids, of grids with salient weights, and of trellises, and at most
            one low-rank term beside them.
        dtype: of factors of low rank and salient floats, which are not packed; best the dtype of the inputs.

    Returns:
        The weight for `multiply`, or None for an expression without a kernel.
    """
    changes: list[tuple[InputChange, ...]] = []
    parts = _parts(w, (), dtype, changes)
    if parts is None:
        return None
    branches = tuple(part for part in parts if isinstance(part, Branch))
    terms = [part for part in parts if isinstance(part, LowRankRows)]
    if not branches or len(terms) > 1:
        return None
    return GpuWeight(tuple(changes), branches, terms[0] if terms else None, shape(w)[1])


def is_supported(w: Weight) -> bool:
    """True if `prepare` would return a weight; the tensors of `w` may hold anything."""
    kinds = _kinds(w)
    return kinds is not None and Branch in kinds and kinds.count(LowRankRows) <= 1


def _kinds(w: Weight) -> list[type[Branch | LowRankRows]] | None:
    """Return the kinds of the terms of a weight; None if a kernel is missing."""
    match w:
        case Zero():
            return []
        case Sum(parts):
            kinds = [_kinds(part) for part in parts]
            return None if None in kinds else [each for part in kinds for each in part or ()]
        case RotatedInputs(inner, block=block):
            return _kinds(inner) if block <= WIDEST_TURN else None
        case ScaledInputs(inner):
            return _kinds(inner)
        case LowRank():
            return [LowRankRows]
        case Grid(codes) | Where(_, Grid() | Dense(), Grid(codes)):
            return None if codes.is_floating_point() else [Branch]
        case TrellisCodes():
            return [Branch]
    return None


def _parts(
    w: Weight, turns: tuple[InputChange, ...], dtype: torch.dtype, changes: list[tuple[InputChange, ...]]
) -> list[Branch | LowRankRows] | None:
    """Return the terms of a weight after the changes `turns` of its inputs; None if a kernel is missing.

    New changes of inputs are appended to `changes`.
    """
    match w:
        case Zero():
            return []
        case Sum(parts):
            terms = [_parts(part, turns, dtype, changes) for part in parts]
            return None if None in terms else [each for part in terms for each in part or ()]
        case RotatedInputs(inner, signs, block) if block <= WIDEST_TURN:
            return _parts(inner, add_change(turns, sign_factors(signs, block), block), dtype, changes)
        case ScaledInputs(inner, columns):
            return _parts(inner, add_change(turns, columns.float(), 1), dtype, changes)
        case LowRank():
            return [pack_low_rank(w, _number(turns, changes), dtype)]
        case Grid(codes) if not codes.is_floating_point():
            return [Branch(_number(turns, changes), pack_grid(w))]
        case TrellisCodes():
            return [Branch(_number(turns, changes), pack_streams(w))]
        case Where():
            packed = pack_salient(w, dtype)
            return None if packed is None else [Branch(_number(turns, changes), *packed)]
        case _:
            return None


def _number(turns: tuple[InputChange, ...], changes: list[tuple[InputChange, ...]]) -> int:
    """Return the number of these changes of inputs, a new one for new changes."""
    known = next((place for place, other in enumerate(changes) if other is turns), None)
    if known is None:
        changes.append(turns)
        return len(changes) - 1
    return known


# --- products -------------------------------------------------------------------------------------------------------


def multiply(w: GpuWeight, x: Tensor) -> Tensor:
    """Return `x [..., in] @ matrix.T` in the dtype of `x`, on a GPU where `runs_on`; see `multiply_few`."""
    return multiply_few(w, x) if x.numel() <= FEW * w.width else multiply_many(w, x)


def multiply_few(w: GpuWeight, x: Tensor) -> Tensor:
    """Multiply inputs by a weight, by kernels that sum in float32.

    Args:
        w: from `prepare`.
        x: `[..., in]`, made for up to 16 vectors; more are multiplied 16 at a time, each time reading the weight.

    Returns:
        `x @ matrix.T`, `[..., out]`, in the dtype of `x`.

    Raises:
        InputError: inputs that want a gradient, which the kernels do not give.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise InputError(
            "kernels for GPUs give no gradients; compute under torch.no_grad(), or multiply by the stored weight"
        )
    from llmcompress.kernels.gpu.grid_triton import LowRankInputs, launch_grid
    from llmcompress.kernels.gpu.trellis_triton import launch_streams

    flat = x.reshape(-1, w.width).contiguous()
    inputs = _change_inputs(w, flat)
    term, low, y = w.low_rank, None, None
    if term is not None:
        low = LowRankInputs(term.left, linear(inputs[term.inputs], term.right.to(x.dtype)))
    for place, branch in enumerate(w.branches):
        dtype = x.dtype if place == len(w.branches) - 1 else torch.float32
        own, branch_inputs = low if place == 0 else None, inputs[branch.inputs]
        if isinstance(branch.rows, GridRows):
            y = launch_grid(branch_inputs, branch.rows, branch.salient, own, y, dtype)
        else:
            y = launch_streams(branch_inputs, branch.rows, own, y, dtype)
    return flat if y is None else y.reshape(*x.shape[:-1], y.shape[-1])


def multiply_many(w: GpuWeight, x: Tensor) -> Tensor:
    """Multiply as `multiply_few` does, for many inputs, for which the weight is decoded once."""
    inputs = _change_inputs(w, x.reshape(-1, w.width).contiguous())
    parts = [linear(inputs[branch.inputs], _decode(branch, x.dtype)) for branch in w.branches]
    if (term := w.low_rank) is not None:
        low = linear(inputs[term.inputs], term.right.to(x.dtype))
        parts.append(linear(low, term.left.to(x.dtype)))
    y = reduce(Tensor.add_, parts)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _change_inputs(w: GpuWeight, x: Tensor) -> list[Tensor]:
    """Return inputs `[tokens, in]` after each of the changes that branches name by number."""
    from llmcompress.kernels.gpu.turn_triton import launch_turn

    return [reduce(launch_turn, changes, x) for changes in w.changes]


def _decode(branch: Branch, dtype: torch.dtype) -> Tensor:
    """Return the matrix `[out, in]` of a branch in a dtype."""
    from llmcompress.kernels.gpu.grid_triton import decode_grid
    from llmcompress.kernels.gpu.trellis_triton import decode_streams

    if isinstance(branch.rows, StreamRows):
        return decode_streams(branch.rows, dtype)
    y, salient = decode_grid(branch.rows, dtype), branch.salient
    if salient is None:
        return y
    count, out = len(salient.numbers), len(y)
    row = torch.repeat_interleave(torch.arange(out, device=y.device), salient.starts.diff(), output_size=count)
    column = salient.columns.long()
    column = column.repeat(out) if salient.shared else column
    numbers = salient.numbers.float()
    if salient.scale is not None:
        numbers = (numbers - (salient.levels - 1) / 2) * salient.scale[row, column // salient.group].float()
    y[row, column] = numbers.to(y.dtype)
    return y
