"""Widths of each block in the bytes of equal ones: more units where predictions lose more by their absence.

Each block is narrowed alone to a few widths, its layer refitted, and the KL of the dense model's predictions to those
of the changed model is measured by forward passes. Widths with as many weights in all as equal ones are then chosen so
that the sum of these damages is least; between neurons and heads weights move too. CHEX (arXiv 2203.15794) moves its
budget across layers as well, by gradients; here damage is measured, as for every budget of this project.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import isfinite

from llmcompress.allocation.sensitivity import Probe, probe_windows
from llmcompress.allocation.solve import monotone, solve
from llmcompress.errors import NumericsError
from llmcompress.methods.solvers.hessian import add_damping, second_moment
from llmcompress.surgery.judged_walk import JudgedWalk
from llmcompress.surgery.unit_choice import DAMPING, UnitScore, choose_units
from llmcompress.surgery.units import Part, UnitCut, Widths

TRIED = (11 / 12, 5 / 6, 3 / 4, 2 / 3, 1 / 2, 1 / 3, 1 / 6)  # of a block's units


@dataclass(frozen=True, eq=False)
class WidthPrices:
    """The damage of narrower blocks, each alone. `widths`: units of each kind that were tried, all of them first;
    `weights`: of one such unit; `damages[block][part]`: KL in nats per token at each width."""

    widths: Mapping[Part, tuple[int, ...]]
    weights: Widths
    damages: tuple[Mapping[Part, tuple[float, ...]], ...]

    def choose_widths(self, means: Widths) -> tuple[tuple[Widths, ...], float]:
        """Return the widths of all blocks with the least sum of damages, and that sum.

        They have at most the weights of blocks that all have `means`, which are among the widths.
        """
        places = [(block, part) for block in range(len(self.damages)) for part in self.widths]
        values = [monotone(self.damages[block][part], self.widths[part]) for block, part in places]
        costs = [[width * self.weights[part] for width in self.widths[part]] for _, part in places]
        equal = tuple(self.widths[part].index(means[part]) for _, part in places)
        options = solve(values, costs, sum(row[option] for row, option in zip(costs, equal, strict=True))) or equal
        chosen: list[dict[Part, int]] = [{} for _ in self.damages]
        for (block, part), option in zip(places, options, strict=True):
            chosen[block][part] = self.widths[part][option]
        return tuple(chosen), sum(row[option] for row, option in zip(values, options, strict=True))


def widths_to_try(total: int, mean: int, step: int) -> tuple[int, ...]:
    """Return the numbers of units to try of `total`, multiples of `step`, all of them and `mean` among these."""
    widths = {max(step, round(share * total / step) * step) for share in TRIED}
    return tuple(sorted(widths | {mean, total}, reverse=True))


def measure_widths(
    judged: JudgedWalk, cuts: Sequence[Sequence[UnitCut]], widths: Mapping[Part, tuple[int, ...]], score: UnitScore
) -> WidthPrices:
    """Measure the damage of every block at each of `widths`, the first being the dense model's.

    `cuts`: the parts of each block, for any width. Layers are refitted on the text to choose by, damage is measured on
    the text to judge on. Raises NumericsError for a damage that is not finite.
    """
    source, tokens = judged.source, judged.tokens
    windows = probe_windows(tokens)
    probe = Probe(source, judged.arch, windows, str(judged.device))
    needs = {cut.consumer.name: frozenset({"outer"}) for parts in cuts for cut in parts}
    for visit in judged.visits(needs, prefix="dense"):
        block = visit.block
        for cut in cuts[block.index]:
            name = cut.consumer.name
            inputs = next(group.inputs for group in block.groups if name in group.names)
            weight, hessian = block.weight(name), add_damping(second_moment(inputs), DAMPING)
            for width in widths[cut.part][1:]:
                probe.exchange(block, name, choose_units(weight, hessian, width, cut.size, score).weight)
        probe.leave(block)
    damages = probe.divergences()
    if not all(map(isfinite, damages)):
        raise NumericsError(f"{source.name}: predictions hold NaN or Inf; use an undamaged checkpoint")
    measured = (max(value, 0.0) for value in damages)
    rows = [{cut.part: (0.0, *islice(measured, len(widths[cut.part]) - 1)) for cut in parts} for parts in cuts]
    return WidthPrices(widths, {cut.part: cut.weights for cut in cuts[0]}, tuple(rows))
