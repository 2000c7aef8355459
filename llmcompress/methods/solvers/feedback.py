"""Error feedback: project one input column after the other, and let the later columns make up for the error.

Optimal brain surgeon as in GPTQ (arXiv 2210.17323) and SparseGPT (arXiv 2301.00774): minimises tr(E H E^T) for
E = W - W_approx greedily. With `inverse(H) = U^T U` and `e = w_j - q_j`, each later column k gets
`w_k -= e U_jk / U_jj`. A `Projection` decides what a column may become; all methods share this loop.

Works on the transpose, `current [in, out]`, where a column of W is contiguous. Updates are applied at once within a
lazy block and as one product beyond it; a projection that fits parameters sees up-to-date weights to the end of its
stride.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from llmcompress.runtime.devices import alone
from llmcompress.runtime.phases import phase
from llmcompress.weight.nodes import Weight

LAZY = 64  # columns per lazy block; changes speed, never the result
PARALLEL_ROWS = 8192  # columns of at least this many rows are worth several threads


class Projection(Protocol):
    """The values that columns may become, with parameters fitted on the way."""

    strides: tuple[int, ...]  # runs of columns, each counted from 0, that must be up to date when the run starts

    def begin(self, column: int, current: Tensor) -> None:
        """Prepare for a column, such as by fitting a group; `current [in, out]`: the weights as compensated so far."""

    def project(self, column: int, values: Tensor) -> Tensor:
        """Return the stored values `[out]` nearest to `values [out]`."""

    def weight(self, values: Tensor) -> Weight:
        """Return the expression for the projected matrix `values [out, in]`."""


@runtime_checkable
class BlockProjection(Protocol):
    """Values that the columns of a lazy block become in one call."""

    strides: tuple[int, ...]  # as of `Projection`

    def project_block(self, columns: slice, current: Tensor, shares: Tensor | None) -> Tensor:
        """Overwrite some columns of `current [in, out]` with stored values; return the errors `[columns, out]`.

        An error of a column (first) takes `shares [columns, columns]` from later ones. Errors have no meaning without
        `shares`.
        """

    def weight(self, values: Tensor) -> Weight:
        """Return the expression for the projected matrix `values [out, in]`."""


@phase("search")
def feedback(
    weight: Tensor, factor: Tensor | None, projection: Projection | BlockProjection, order: Tensor | None = None
) -> Weight:
    """Return `weight [out, in]` projected column by column; without a `factor` (U, `[in, in]`) errors are not fed back.

    `order [in]`: the sequence of columns of the factor, in which the projection counts too.
    """
    start_from = weight if order is None else weight[:, order]
    current = start_from.T.clone(memory_format=torch.contiguous_format)
    for start, stop in _lazy_blocks(len(current), projection.strides):
        shares = None if factor is None else factor[start:stop, start:] / factor.diagonal()[start:stop, None]
        inside = None if shares is None else shares[:, : stop - start].contiguous()
        if isinstance(projection, BlockProjection):
            errors = projection.project_block(slice(start, stop), current, inside)
        else:
            errors = _project_columns(current, slice(start, stop), projection, inside)
        if shares is not None and stop < len(current):
            current[stop:].addmm_(shares[:, stop - start :].T, errors, alpha=-1)
    if order is not None:
        current = current[order.argsort()]
    return projection.weight(current.T.contiguous())


def _project_columns(current: Tensor, block: slice, projection: Projection, shares: Tensor | None) -> Tensor:
    """Store one column of a block after the other; return the errors, `[columns, out]`."""
    errors = current.new_empty(block.stop - block.start, current.shape[1])
    with few_threads(current.shape[1]):
        for column, error in enumerate(errors, block.start):
            projection.begin(column, current)
            wanted = current[column]
            stored = projection.project(column, wanted)
            if shares is not None:
                torch.sub(wanted, stored, out=error)
                row = shares[column - block.start, column - block.start + 1 :]
                current[column + 1 : block.stop].addr_(row, error, alpha=-1)
            wanted.copy_(stored)
    return errors


@contextmanager
def few_threads(rows: int) -> Iterator[None]:
    """Use one thread for columns of few `rows`, where waking others costs more than they save.

    The number belongs to the whole process, so it stays while other layers are compressed beside this one.
    """
    if not alone():
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if rows < PARALLEL_ROWS else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _lazy_blocks(width: int, strides: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield blocks of at most `LAZY` columns; a run of columns that starts inside a block also ends inside it."""
    start = 0
    while start < width:
        stop = min(start + LAZY, width)
        cuts = [stop]
        while cuts:  # back to the start of a run that would cross `stop`, until none does
            stop = cuts[0]
            runs = [((stop - 1) // stride * stride, stride) for stride in strides]
            cuts = [first for first, stride in runs if start < first and stop < min(first + stride, width)]
        yield start, stop
        start = stop
