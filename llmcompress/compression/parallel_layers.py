"""The layers of a block, shared out over processes: each compresses some of them, and every process gets all results.

A share is what one process compresses in one piece too: a layer, or a run of rows of a long one. Statistics are the
same in every process. So the weights are bit for bit those of one process with these statistics.

Shares go to processes by their estimated time, the longest first, each to where it would be done earliest. Layers that
read the same input use one factor of its second moments, so it is cheaper to keep them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from llmcompress.calibration.walk import Block, InputGroup
from llmcompress.compression.job import Job
from llmcompress.compression.layer import finished, layer_of
from llmcompress.compression.memory_estimate import SEARCHED
from llmcompress.methods.layer import Layer
from llmcompress.methods.row_chunks import Outcome, apply_to_run, join_runs, runs
from llmcompress.reporting.report import LayerReport
from llmcompress.runtime.ranks import Ranks
from llmcompress.runtime.side_by_side import side_by_side
from llmcompress.weight.modules import PackedWeight

# Seconds of one core; only their proportions count here.
FEEDBACK, FEEDBACK_WIDTH = 1.4e-7, 2e-11  # for each weight, and each weight and column: feedback and errors
SEARCH = 5e-7  # for each weight, of a trellis search
FACTOR, AIM = 6e-11, 3e-11  # for each cube of a width: a factor of H; the target at the dense model's outputs

Solved = tuple[PackedWeight, LayerReport]
Pieces = dict[tuple[str, int], Outcome]  # by the name of the layer and the first row


@dataclass(frozen=True)
class Share:
    """Rows of a linear that are compressed in one piece. `group`: the number of its input group."""

    name: str
    group: int
    rows: slice
    seconds: float  # as estimated, without the factor that its group shares


def solved(
    job: Job, block: Block, groups: Sequence[InputGroup], ranks: Ranks, workers: int = 1
) -> tuple[dict[str, PackedWeight], list[LayerReport]]:
    """Compress the linears of input groups that have steps and are not tied, `workers` at once: return their packed
    weights by name, and their rows of the report, in their order."""
    shares = _shares(job, block, groups)
    owners = placed(shares, [_factor_seconds(group) for group in groups], ranks.count)
    homes: dict[str, list[int]] = {}
    for share, owner in zip(shares, owners, strict=True):
        homes.setdefault(share.name, []).append(owner)
    scattered = [name for name, there in homes.items() if len(set(there)) > 1]
    mine = [share for share, owner in zip(shares, owners, strict=True) if owner == ranks.rank]
    with ranks.agree_on_errors():
        done, pieces = _compressed(job, block, groups, mine, scattered, workers)
    if scattered:
        everything = {place: piece for each in ranks.gather(pieces) for place, piece in each.items()}
        with ranks.agree_on_errors():
            for name in (name for name in scattered if homes[name][0] == ranks.rank):
                parts = [everything[share.name, share.rows.start] for share in shares if share.name == name]
                group = next(group for group in groups if name in group.names)
                done[name] = finished(job, layer_of(job, block, name, group), join_runs(parts), group)
    for group in groups:
        group.inputs.derived.clear()  # factors that only its linears could share
    found = {name: one for each in ranks.gather(done) for name, one in each.items()}
    return {name: found[name][0] for name in homes}, [found[name][1] for name in homes]


def _compressed(
    job: Job,
    block: Block,
    groups: Sequence[InputGroup],
    mine: Sequence[Share],
    scattered: Sequence[str],
    workers: int,
) -> tuple[dict[str, Solved], Pieces]:
    """Compress a process's shares: return its finished layers, and the runs of layers that others have runs of."""
    done: dict[str, Solved] = {}
    pieces: Pieces = {}
    names = list(dict.fromkeys((share.group, share.name) for share in mine))

    def outcomes(name: str, group: InputGroup) -> tuple[Layer, dict[int, Outcome]]:
        """A layer, and its runs of rows."""
        layer, steps = layer_of(job, block, name, group), (job.steps | job.tables)[name]
        return layer, {s.rows.start: apply_to_run(layer, steps, s.rows) for s in mine if s.name == name}

    tasks = [partial(outcomes, name, groups[number]) for number, name in names]
    found = side_by_side(tasks, workers, next(block.module.parameters()).device)
    for place, (number, name) in enumerate(names, 1):
        group, (layer, parts) = groups[number], next(found)
        if name in scattered:
            pieces |= {(name, start): part for start, part in parts.items()}
        else:
            done[name] = finished(job, layer, join_runs(list(parts.values())), group)
        del layer, parts  # before the next one is made
        last = place == len(names) or names[place][0] != number
        if last and not set(scattered).intersection(group.names):
            group.inputs.derived.clear()
    return done, pieces


def placed(shares: Sequence[Share], factors: Sequence[float], count: int) -> list[int]:
    """Return the process of each share; `factors`: the seconds that the first share of each group takes beside its
    own, in each process that has one."""
    owners = [0] * len(shares)
    loads, there = [0.0] * count, [set[int]() for _ in range(count)]

    def then(rank: int, share: Share) -> float:
        """The load of a process that takes a share."""
        return loads[rank] + share.seconds + (0.0 if share.group in there[rank] else factors[share.group])

    for number in sorted(range(len(shares)), key=lambda number: (-shares[number].seconds, number)):
        share = shares[number]
        owners[number] = best = min(range(count), key=lambda rank: (then(rank, share), rank))
        loads[best] = then(best, share)
        there[best].add(share.group)
    return owners


def _shares(job: Job, block: Block, groups: Sequence[InputGroup]) -> list[Share]:
    found, steps = [], job.steps | job.tables
    for number, group in enumerate(groups):
        for name in (name for name in group.names if name in steps and name not in job.ties):
            rows, width = block.linears[name].shape
            each = FEEDBACK + FEEDBACK_WIDTH * width + SEARCH * sum(s.method in SEARCHED for s in steps[name])
            for run in runs(rows, steps[name]):
                found.append(Share(name, number, run, (run.stop - run.start) * width * each))
    return found


def _factor_seconds(group: InputGroup) -> float:
    outer, cross = group.inputs.outer, group.inputs.cross
    if outer is None:
        return 0.0
    return float(len(outer) ** 3 * (FACTOR + (0.0 if cross is None else AIM)))
