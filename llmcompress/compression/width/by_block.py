"""Neurons of each block where there is one number for all: more where predictions lose more by their absence.

Each block is narrowed alone to a few widths, its layer refitted, and the KL of the dense model's predictions to those
of the changed model is measured by forward passes. Widths whose sum is that of equal ones are then chosen so that the
sum of these damages is least. CHEX (arXiv 2203.15794) moves its budget across layers as well, by gradients; here damage
is measured, as for every budget of this project.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch

from llmcompress.calibrate.walk import Progress, walk
from llmcompress.compression.allocate.sensitivity import Probe, probe_windows
from llmcompress.compression.allocate.solve import monotone, solve
from llmcompress.compression.width.select import DAMPING, chosen_subset
from llmcompress.data.calibration import CalibrationTokens
from llmcompress.errors import NumericsError
from llmcompress.methods.engines.hessian import damped, second_moment
from llmcompress.models.dense import DenseModel
from llmcompress.models.families import Architecture

TRIED = (11 / 12, 5 / 6, 3 / 4, 2 / 3, 1 / 2, 1 / 3, 1 / 6)  # of a block's neurons


@dataclass(frozen=True, eq=False)
class WidthPrices:
    """The KL in nats per token `damages[block][option]` of each block with `widths[option]` neurons, alone."""

    widths: tuple[int, ...]
    damages: tuple[tuple[float, ...], ...]

    def chosen(self, mean: int) -> tuple[tuple[int, ...], float]:
        """Return the widths of all blocks, at most `mean`, one of them, on average, with the least sum of damages; and
        that sum."""
        values, count = [monotone(row, self.widths) for row in self.damages], len(self.damages)
        options = solve(values, [self.widths] * count, mean * count) or (self.widths.index(mean),) * count
        return (
            tuple(self.widths[option] for option in options),
            sum(row[option] for row, option in zip(values, options, strict=True)),
        )


def tried_widths(total: int, mean: int, step: int) -> tuple[int, ...]:
    """Return the numbers of neurons to try of `total`, multiples of `step`, all of them and `mean` among these."""
    found = {max(step, round(share * total / step) * step) for share in TRIED}
    return tuple(sorted(found | {mean, total}, reverse=True))


def width_prices(
    source: DenseModel,
    arch: Architecture,
    tokens: CalibrationTokens,
    widths: Sequence[int],
    *,
    by: str,
    seed: int,
    device: torch.device,
    progress: Progress | None = None,
) -> WidthPrices:
    """Measure the damage of every block at every one of `widths`, the first of which is that of the dense model.

    `by`, `seed`: see `chosen_subset`. Layers are refitted on the text to choose by, damage is measured on the text to
    judge on. Raises NumericsError for a damage that is not finite.
    """
    consumers = {block.groups[-1][0].name for block in arch.blocks}
    probe = Probe(source, arch, probe_windows(tokens.sequences[len(tokens.sequences) - tokens.held_out :]), str(device))
    needs = dict.fromkeys(consumers, frozenset({"outer"}))
    walked = walk(
        source,
        arch,
        tokens.sequences,
        held_out=tokens.held_out,
        needs=needs,
        prefix="dense",
        device=device,
        progress=progress,
    )
    for block in walked:
        for group in block.groups:
            [name] = [name for name in group.names if name in consumers]
            weight, hessian = block.weight(name), damped(second_moment(group.inputs), DAMPING)
            for width in widths[1:]:
                probe.exchange(block, name, chosen_subset(weight, hessian, width, by=by, seed=seed).weight)
        probe.leave(block)
    found, count = probe.divergences(), len(widths) - 1
    if not all(map(isfinite, found)):
        raise NumericsError(f"{source.name}: predictions hold NaN or Inf; use an undamaged checkpoint")
    rows = (found[start : start + count] for start in range(0, len(found), count))
    return WidthPrices(tuple(widths), tuple((0.0, *(max(value, 0.0) for value in row)) for row in rows))
