"""The kernels as operators of torch: for CUDA devices, with shapes for `torch.compile` and for CUDA graphs.

They allocate their result alone and never wait for the device. Triton is imported at the first call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from llmcompress.kernels.gpu.layouts import Branch, GridRows, InputChange, LowRankRows, SalientRows, StreamRows

LIBRARY = torch.library.Library("llmcompress", "FRAGMENT")
LIBRARY.define("gpu_turn(Tensor x, Tensor factors, int block) -> Tensor")
LIBRARY.define(
    "gpu_grid(Tensor x, Tensor[] planes, Tensor scale, Tensor? zero, Tensor[] salient, Tensor[] low_rank, "
    "Tensor? onto, int[] sizes, int[] salient_sizes, ScalarType dtype) -> Tensor"
)
LIBRARY.define(
    "gpu_streams(Tensor x, Tensor words, Tensor units, Tensor scale, Tensor numbers, Tensor[] low_rank, "
    "Tensor? onto, int[] sizes, ScalarType dtype) -> Tensor"
)


@dataclass(frozen=True)
class _GridSizes:
    """The numbers of `GridRows`, as an operator takes them."""

    out: int
    width: int
    bits: int
    levels: int
    group: int
    span: int


@dataclass(frozen=True)
class _SalientSizes:
    """The numbers of `SalientRows`."""

    levels: int
    group: int
    shared: int
    most: int


@dataclass(frozen=True)
class _StreamSizes:
    """The numbers of `StreamRows`."""

    out: int
    width: int
    bits: int
    values: int
    memory: int


# --- calls ----------------------------------------------------------------------------------------------------------


def call_turn(x: Tensor, change: InputChange) -> Tensor:
    """Return the changed inputs, see `launches.launch_turn`."""
    found: Tensor = torch.ops.llmcompress.gpu_turn(x, change.factors, change.block)
    return found


def call_branch(
    x: Tensor, branch: Branch, term: LowRankRows | None, low: Tensor | None, onto: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the product of a branch; `low` `[tokens, ranks]` is that of the right factor of `term`."""
    ranks = [] if term is None or low is None else [term.left, low, term.starts]
    found: Tensor
    match branch.rows:
        case GridRows() as rows:
            salient = branch.salient
            sizes = _GridSizes(*rows.size, rows.bits, rows.levels, rows.group, rows.span)
            inner: tuple[int, ...] = ()
            tensors: list[Tensor] = []
            if salient is not None:
                inner = astuple(_SalientSizes(salient.levels, salient.group, int(salient.shared), salient.most))
                scale = [] if salient.scale is None else [salient.scale]
                tensors = [salient.starts, salient.columns, salient.numbers, *scale]
            found = torch.ops.llmcompress.gpu_grid(
                x, rows.planes, rows.scale, rows.zero, tensors, ranks, onto, astuple(sizes), inner, dtype
            )
        case StreamRows() as rows:
            lengths = astuple(_StreamSizes(*rows.size, rows.bits, rows.values, rows.memory))
            found = torch.ops.llmcompress.gpu_streams(
                x, rows.words, rows.units, rows.scale, rows.numbers, ranks, onto, lengths, dtype
            )
    return found


# --- implementations ------------------------------------------------------------------------------------------------


def _turn(x: Tensor, factors: Tensor, block: int) -> Tensor:
    from llmcompress.kernels.gpu.launches import launch_turn

    return launch_turn(x, InputChange(factors, block))


def _grid(
    x: Tensor,
    planes: Sequence[Tensor],
    scale: Tensor,
    zero: Tensor | None,
    salient: Sequence[Tensor],
    low_rank: Sequence[Tensor],
    onto: Tensor | None,
    sizes: Sequence[int],
    salient_sizes: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    from llmcompress.kernels.gpu.launches import LowRankInputs, launch_grid

    own = _GridSizes(*sizes)
    size = (own.out, own.width)
    rows = GridRows(tuple(planes), scale, zero, size, own.bits, own.levels, own.group, own.span)
    entries = None
    if salient:
        inner = _SalientSizes(*salient_sizes)
        starts, columns, numbers, *steps = salient
        step = steps[0] if steps else None
        entries = SalientRows(starts, columns, numbers, step, inner.levels, inner.group, bool(inner.shared), inner.most)
    return launch_grid(x, rows, entries, LowRankInputs(*low_rank) if low_rank else None, onto, dtype)


def _streams(
    x: Tensor,
    words: Tensor,
    units: Tensor,
    scale: Tensor,
    numbers: Tensor,
    low_rank: Sequence[Tensor],
    onto: Tensor | None,
    sizes: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    from llmcompress.kernels.gpu.launches import LowRankInputs, launch_streams

    own = _StreamSizes(*sizes)
    size = (own.out, own.width)
    rows = StreamRows(words, units, scale, numbers, size, own.bits, own.values, own.memory)
    return launch_streams(x, rows, LowRankInputs(*low_rank) if low_rank else None, onto, dtype)


def _turn_shape(x: Tensor, factors: Tensor, block: int) -> Tensor:
    return torch.empty_like(x)


def _grid_shape(
    x: Tensor,
    planes: Sequence[Tensor],
    scale: Tensor,
    zero: Tensor | None,
    salient: Sequence[Tensor],
    low_rank: Sequence[Tensor],
    onto: Tensor | None,
    sizes: Sequence[int],
    salient_sizes: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(len(x), sizes[0], dtype=dtype)


def _streams_shape(
    x: Tensor,
    words: Tensor,
    units: Tensor,
    scale: Tensor,
    numbers: Tensor,
    low_rank: Sequence[Tensor],
    onto: Tensor | None,
    sizes: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(len(x), sizes[0], dtype=dtype)


for name, made, shaped in (
    ("gpu_turn", _turn, _turn_shape),
    ("gpu_grid", _grid, _grid_shape),
    ("gpu_streams", _streams, _streams_shape),
):
    LIBRARY.impl(name, made, "CUDA")
    torch.library.register_fake(f"llmcompress::{name}", shaped, lib=LIBRARY)
