"""Compressed weights as GPUs multiply by them: repacked once, several that share their inputs in one product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, reduce
from importlib.util import find_spec

import torch
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.kernels.gpu.layouts import (
    Branch,
    GpuWeight,
    GridRows,
    InputChange,
    LowRankRows,
    SalientRows,
    StreamRows,
)
from llmcompress.kernels.gpu.packing import (
    grid_rows,
    low_rank_rows,
    salient_rows,
    sign_factors,
    stream_rows,
    turned,
)
from llmcompress.weight.nodes import (
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
FEW = 16  # inputs that kernels multiply at once; a matrix is decoded once for more of them
WIDEST_TURN = 1 << 15  # columns of a Hadamard transform, which a program holds in registers


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
        dtype: of the numbers that are not packed, factors of low rank and salient floats; best that of the inputs.

    Returns:
        The weight for `product`, or None for an expression that no kernel multiplies by.
    """
    changes: list[tuple[InputChange, ...]] = []
    parts = _parts(w, (), dtype, changes)
    if parts is None:
        return None
    branches = tuple(part for part in parts if isinstance(part, Branch))
    terms = [part for part in parts if isinstance(part, LowRankRows)]
    if not branches or len(terms) > 1:
        return None
    return GpuWeight(tuple(changes), branches, terms[0] if terms else None, (shape(w)[0],), shape(w)[1])


def _parts(
    w: Weight, turns: tuple[InputChange, ...], dtype: torch.dtype, changes: list[tuple[InputChange, ...]]
) -> list[Branch | LowRankRows] | None:
    """Return what is to be added, of a weight whose inputs are changed before; None where a kernel is missing.

    New changes of inputs are appended to `changes`.
    """
    match w:
        case Zero():
            return []
        case Sum(parts):
            found = [_parts(part, turns, dtype, changes) for part in parts]
            return None if None in found else [each for part in found for each in part or ()]
        case RotatedInputs(inner, signs, block) if block <= WIDEST_TURN:
            return _parts(inner, turned(turns, sign_factors(signs, block), block), dtype, changes)
        case ScaledInputs(inner, columns):
            return _parts(inner, turned(turns, columns.float(), 1), dtype, changes)
        case LowRank():
            return [low_rank_rows(w, _number(turns, changes), dtype)]
        case Grid(codes) if not codes.is_floating_point():
            return [Branch(_number(turns, changes), grid_rows(w))]
        case TrellisCodes():
            return [Branch(_number(turns, changes), stream_rows(w))]
        case Where():
            packed = salient_rows(w, dtype)
            return None if packed is None else [Branch(_number(turns, changes), *packed)]
        case _:
            return None


def _number(turns: tuple[InputChange, ...], changes: list[tuple[InputChange, ...]]) -> int:
    """Return the number of these changes of inputs, a new one if nobody had them before."""
    known = next((place for place, other in enumerate(changes) if other is turns), None)
    if known is None:
        changes.append(turns)
        return len(changes) - 1
    return known


# --- several matrices -----------------------------------------------------------------------------------------------


def stacked(weights: Sequence[GpuWeight]) -> GpuWeight | None:
    """Put weights that share their inputs below each other, for one product; None for weights of unlike forms.

    The product has the columns of the first, then those of the second, and so on: split it by `heights`.
    """
    first = weights[0]
    branches = [_stacked_branch(level) for level in zip(*(weight.branches for weight in weights))]
    terms = [weight.low_rank for weight in weights if weight.low_rank is not None]
    alike = all(len(weight.branches) == len(branches) and _same_changes(weight, first) for weight in weights)
    if not alike or None in branches or len(terms) not in (0, len(weights)):
        return None
    if any(term.inputs != terms[0].inputs for term in terms):
        return None
    heights = tuple(height for weight in weights for height in weight.heights)
    found = tuple(branch for branch in branches if branch is not None)
    return GpuWeight(first.changes, found, _stacked_low_rank(terms) if terms else None, heights, first.width)


def _same_changes(one: GpuWeight, other: GpuWeight) -> bool:
    """True if weights are given the same inputs."""
    turns = [[turn for chain in weight.changes for turn in chain] for weight in (one, other)]
    return (
        one.width == other.width
        and list(map(len, one.changes)) == list(map(len, other.changes))
        and all(a.block == b.block and torch.equal(a.factors, b.factors) for a, b in zip(*turns))
    )


def _stacked_branch(level: tuple[Branch, ...]) -> Branch | None:
    """Return branches below each other."""
    inputs = level[0].inputs
    if any(branch.inputs != inputs for branch in level):
        return None
    grids = [branch.rows for branch in level if isinstance(branch.rows, GridRows)]
    streams = [branch.rows for branch in level if isinstance(branch.rows, StreamRows)]
    if len(streams) == len(level):
        joined = _stacked_streams(streams)
        return None if joined is None else Branch(inputs, joined)
    salient = [branch.salient for branch in level if branch.salient is not None]
    if len(grids) < len(level) or len(salient) not in (0, len(level)):
        return None
    rows = _stacked_grids(grids)
    entries = _stacked_salient(salient) if salient else None
    if rows is None or (salient and entries is None):
        return None
    return Branch(inputs, rows, entries)


def _stacked_grids(parts: Sequence[GridRows]) -> GridRows | None:
    kinds = {(part.bits, part.levels, part.group, part.size[1], part.zero is None) for part in parts}
    if len(kinds) > 1:
        return None
    first, height = parts[0], sum(part.size[0] for part in parts)
    planes = tuple(torch.cat(same) for same in zip(*(part.planes for part in parts)))
    zeros = [part.zero for part in parts if part.zero is not None]
    scale = torch.cat([part.scale for part in parts])
    zero = torch.cat(zeros) if zeros else None
    return replace(first, planes=planes, scale=scale, zero=zero, size=(height, first.size[1]))


def _stacked_salient(parts: Sequence[SalientRows]) -> SalientRows | None:
    kinds = {(part.levels, part.group, part.numbers.dtype, part.scale is None, part.shared) for part in parts}
    first = parts[0]
    if len(kinds) > 1 or (first.shared and not all(torch.equal(part.columns, first.columns) for part in parts)):
        return None
    above, starts = 0, [first.starts[:1]]
    for part in parts:
        starts.append(part.starts[1:] + above)
        above += len(part.numbers)
    scales = [part.scale for part in parts if part.scale is not None]
    return replace(
        first,
        starts=torch.cat(starts),
        columns=first.columns if first.shared else torch.cat([part.columns for part in parts]),
        numbers=torch.cat([part.numbers for part in parts]),
        scale=torch.cat(scales) if scales else None,
        most=max(part.most for part in parts),
    )


def _stacked_streams(parts: Sequence[StreamRows]) -> StreamRows | None:
    kinds = {(part.bits, part.values, part.memory, part.size[1]) for part in parts}
    first = parts[0]
    if len(kinds) > 1 or not all(torch.equal(part.numbers, first.numbers) for part in parts):
        return None
    units, words, rows = [], 0, 0
    for part in parts:
        units.append(part.units + part.units.new_tensor([words, rows, 0]))
        words, rows = words + len(part.words), rows + part.size[0]
    return replace(
        first,
        words=torch.cat([part.words for part in parts]),
        units=torch.cat(units),
        scale=torch.cat([part.scale for part in parts]),
        size=(rows, first.size[1]),
    )


def _stacked_low_rank(parts: Sequence[LowRankRows]) -> LowRankRows:
    """Return terms below each other, with zeros up to the largest rank."""
    rank = max(part.left.shape[1] for part in parts)
    left = [torch.nn.functional.pad(part.left, (0, rank - part.left.shape[1])) for part in parts]
    right = [torch.nn.functional.pad(part.right, (0, 0, 0, rank - len(part.right))) for part in parts]
    starts = [part.starts + rank * place for place, part in enumerate(parts)]
    return LowRankRows(torch.cat(left), torch.cat(right), torch.cat(starts), parts[0].inputs)


# --- products -------------------------------------------------------------------------------------------------------


def product(w: GpuWeight, x: Tensor) -> Tensor:
    """Multiply inputs by a weight, on a GPU where `runs_on`.

    Args:
        w: from `prepare` or `stacked`.
        x: `[..., in]`, made for up to 16 vectors; more are multiplied 16 at a time, each time reading the weight.

    Returns:
        `x @ matrix.T`, `[..., out]`, in the dtype of `x`; summed in float32.

    Raises:
        InputError: inputs that want a gradient, which the kernels do not give.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise InputError(
            "kernels for GPUs give no gradients; compute under torch.no_grad(), or multiply by the stored weight"
        )
    from llmcompress.kernels.gpu.launches import LowRankInputs, launch_grid, launch_streams

    flat = x.reshape(-1, w.width).contiguous()
    inputs = _changed(w, flat)
    term, low, y = w.low_rank, None, None
    if term is not None:
        given = torch.nn.functional.linear(inputs[term.inputs], term.right.to(x.dtype))
        low = LowRankInputs(term.left, given, term.starts)
    for place, branch in enumerate(w.branches):
        dtype = x.dtype if place == len(w.branches) - 1 else torch.float32
        own, given = low if place == 0 else None, inputs[branch.inputs]
        if isinstance(branch.rows, GridRows):
            y = launch_grid(given, branch.rows, branch.salient, own, y, dtype)
        else:
            y = launch_streams(given, branch.rows, own, y, dtype)
    return flat if y is None else y.reshape(*x.shape[:-1], -1)


def product_of_many(w: GpuWeight, x: Tensor) -> Tensor:
    """Multiply as `product` does, for many inputs: a weight of one matrix, which is decoded for them."""
    from llmcompress.kernels.gpu.launches import launch_matrix

    linear, inputs = torch.nn.functional.linear, _changed(w, x.reshape(-1, w.width).contiguous())
    parts = [linear(inputs[branch.inputs], launch_matrix(branch, x.dtype)) for branch in w.branches]
    if (term := w.low_rank) is not None:
        low = linear(inputs[term.inputs], term.right.to(x.dtype))
        parts.append(linear(low, term.left.to(x.dtype)))
    return reduce(Tensor.add_, parts).reshape(*x.shape[:-1], -1)


def _changed(w: GpuWeight, x: Tensor) -> list[Tensor]:
    """Return inputs `[tokens, in]` after each of the changes that branches name by number."""
    from llmcompress.kernels.gpu.launches import launch_turn

    found = []
    for chain in w.changes:
        given = x
        for change in chain:
            given = launch_turn(given, change)
        found.append(given)
    return found
