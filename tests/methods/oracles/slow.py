"""The papers' algorithms, slow and plain, in float64: one column at a time, the rest of H inverted again each time.

W `[out, in]`, H `[in, in]` damped. No Cholesky factor, no lazy block, no shared code with the package: an oracle
takes plain functions for what a column may become.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SHRINKS = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.5, 0.4, 0.3)
Begin = Callable[[int, Tensor, Tensor], None]  # column, weights so far [out, in], pivots [in] of what is left
Store = Callable[[int, Tensor], Tensor]  # column, wanted values [out] -> stored values [out]


def damped_moment(inputs: Tensor, damping: float) -> Tensor:
    """H = X^T X / tokens + damping * mean diagonal * I, float64, for inputs without dead channels."""
    hessian = inputs.double().T @ inputs.double() / len(inputs)
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def optimal_brain_surgeon(weight: Tensor, hessian: Tensor, begin: Begin, store: Store) -> Tensor:
    """OBS in the fixed order of GPTQ (arXiv 2210.17323, eq. 2): the stored `[out, in]`.

    With F the columns not stored yet and P = inverse(H_FF): storing column j = F[0] costs `(w_j - q_j)^2 / P_00` and
    moves the others by `-(w_j - q_j) / P_00 * P_0F`. P is inverted from scratch for every j: O(in^4).
    """
    current = weight.double().clone()
    width = len(hessian)
    pivots = torch.stack([torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(width)])
    for j in range(width):
        left = torch.linalg.inv(hessian[j:, j:])
        begin(j, current, pivots)
        stored = store(j, current[:, j])
        error = (current[:, j] - stored) / left[0, 0]
        current[:, j:] -= error[:, None] * left[0]
        current[:, j] = stored
    return current


def nearest(values: Tensor, scale: Tensor, zero: Tensor | None, levels: int) -> Tensor:
    """`values [out]` on each row's grid, by comparing with all of its levels."""
    centre = torch.full_like(scale, (levels - 1) / 2) if zero is None else zero
    points = (torch.arange(levels, dtype=torch.float64)[None] - centre[:, None]) * scale[:, None]  # [out, levels]
    return points.gather(1, (points - values[:, None]).abs().argmin(1, keepdim=True))[:, 0]


def fit(
    columns: Tensor, levels: int, symmetric: bool, clip: bool, importance: Tensor, shown: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale `[out]` (rounded to float16) and zero `[out]` for `columns [out, group]`: row by row, share by share."""
    shown = torch.ones(columns.shape, dtype=torch.bool) if shown is None else shown
    scales, zeros = [], []
    for row, keep in zip(columns, shown):
        kept, weights = row[keep], importance[keep]
        if levels == 2:
            level = (kept.abs() * weights).sum() / weights.sum() if keep.any() else torch.zeros((), dtype=row.dtype)
            scales.append((2 * level).half().double())
            continue
        entries = torch.cat([kept, torch.zeros(1, dtype=row.dtype)])
        high, low = (entries.abs().max(), -entries.abs().max()) if symmetric else (entries.max(), entries.min())
        best = (torch.inf, torch.zeros((), dtype=row.dtype), torch.zeros((), dtype=row.dtype))
        for share in SHRINKS if clip else (1.0,):
            scale = ((high - low) * share / (levels - 1)).float().half().double()
            zero = (-low * share / scale).round().clamp(0, levels - 1) if scale > 0 else torch.zeros_like(scale)
            centre = torch.full_like(scale, (levels - 1) / 2) if symmetric else zero
            points = (torch.arange(levels, dtype=torch.float64) - centre) * scale
            lost = ((points[None] - kept[:, None]).abs().amin(1).square() * weights).sum()
            if lost < best[0]:
                best = (float(lost), scale, zero)
        scales.append(best[1])
        zeros.append(best[2])
    return torch.stack(scales), None if symmetric else torch.stack(zeros)


def slow_gptq(
    weight: Tensor,
    hessian: Tensor,
    energy: Tensor,
    levels: int,
    group_size: int,
    symmetric: bool = True,
    clip: bool = True,
    static: Tensor | None = None,
) -> Tensor:
    """GPTQ with groups fitted to the weights as updated so far.

    `static [in]`: the original column at each place when columns are reordered; groups are then the original ones,
    all fitted to the weights as given.
    """
    parameters: dict[int, tuple[Tensor, Tensor | None]] = {}
    width = weight.shape[1]
    given = weight.double()

    def begin(column: int, current: Tensor, pivots: Tensor) -> None:
        if static is None and column % group_size == 0:
            part = slice(column, column + group_size)
            parameters[column // group_size] = fit(current[:, part], levels, symmetric, clip, energy[part])
        elif static is not None and column == 0:
            original = given[:, static.argsort()]
            for start in range(0, width, group_size):
                part = slice(start, start + group_size)
                columns = original[:, part]
                parameters[start // group_size] = fit(columns, levels, symmetric, clip, energy[part])

    def store(column: int, wanted: Tensor) -> Tensor:
        place = column if static is None else int(static[column])
        scale, zero = parameters[place // group_size]
        return nearest(wanted, scale, zero, levels)

    return optimal_brain_surgeon(weight, hessian, begin, store)


def slow_sparsegpt(weight: Tensor, hessian: Tensor, sparsity: float | tuple[int, int], span: int) -> Tensor:
    """SparseGPT (arXiv 2301.00774, alg. 1): mask by w^2 / P_00 at the start of every `span` columns, values by OBS.

    A fraction is pruned over all rows of a span at once; `(kept, group)` keeps that many of a row's group, and the span
    is the group.
    """
    keep = torch.ones(weight.shape, dtype=torch.bool)

    def begin(column: int, current: Tensor, pivots: Tensor) -> None:
        if column % span:
            return
        part = slice(column, column + span)
        saliency = current[:, part].square() / pivots[part]
        if isinstance(sparsity, tuple):
            for row in range(len(weight)):
                worst = sorted(range(span), key=lambda k: float(saliency[row, k]))[: span - sparsity[0]]
                keep[row, [column + k for k in worst]] = False
            return
        entries = [(float(saliency[r, c]), r, c) for r in range(len(weight)) for c in range(saliency.shape[1])]
        for _, row, offset in sorted(entries)[: int(len(entries) * sparsity)]:
            keep[row, column + offset] = False

    return optimal_brain_surgeon(
        weight, hessian, begin, lambda j, wanted: torch.where(keep[:, j], wanted.bfloat16().double(), 0.0)
    )


def slow_pb_llm(
    weight: Tensor, hessian: Tensor, energy: Tensor, salient: float, salient_levels: int, group_size: int
) -> Tensor:
    """PB-LLM (arXiv 2310.00034, sec. 3): salient entries by w^2 / P_00 on a grid per row, the rest +-mean |w|.

    For widths of one span: the salient set and the salient grid are fitted to the weights as given, the binary scales
    of each group to the weights as updated so far, over the binarized entries alone.
    """
    chosen = torch.zeros(weight.shape, dtype=torch.bool)
    grids: dict[str, Tensor] = {}

    def begin(column: int, current: Tensor, pivots: Tensor) -> None:
        if column == 0:
            saliency = current.square() / pivots
            best = saliency.reshape(-1).argsort(descending=True)[: round(chosen.numel() * salient)]
            chosen.view(-1)[best] = True
            grids["salient"] = fit(current, salient_levels, True, True, energy, chosen)[0]
        if column % group_size == 0:
            part = slice(column, column + group_size)
            grids["binary"] = fit(current[:, part], 2, True, True, energy[part], ~chosen[:, part])[0]

    def store(column: int, wanted: Tensor) -> Tensor:
        precise = nearest(wanted, grids["salient"], None, salient_levels)
        return torch.where(chosen[:, column], precise, nearest(wanted, grids["binary"], None, 2))

    return optimal_brain_surgeon(weight, hessian, begin, store)
