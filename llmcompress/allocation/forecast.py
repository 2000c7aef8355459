"""The plan of a recipe with a target, before anything is measured: as if all weights mattered alike.

    job with a target -> choices -> the options that spend its bits evenly -> plan of that job, and the cost of prices

Prices move bits between matrices, not the size of all. So sizes, memory and time are those of a run, and the options of
single matrices are not. For a quality, prices decide about the size too, and a warning says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from math import prod

from llmcompress.allocation.allocate import reachable_choices, target_of, text_of, with_steps
from llmcompress.allocation.choices import Choices
from llmcompress.allocation.cost import pricing_bytes, pricing_seconds, probing_tokens
from llmcompress.allocation.file_sizes import OurSizes, file_sizes, plan_in_files
from llmcompress.compression.job import Job
from llmcompress.compression.plan import Plan, plan_of
from llmcompress.compression.time_estimate import estimate_time
from llmcompress.errors import format_bytes
from llmcompress.recipe.target import Target

TABLE_SHARE = 0.4  # of a model's weights in tables: with more, bits per weight say little about its size


def forecast(job: Job) -> Plan:
    """Return the plan of a job with a target. Raises RecipeError for a target that no choice reaches."""
    target, text = target_of(job), text_of(job)
    choices = reachable_choices(job, (target,))
    settled = job.with_recipe(with_steps(job, choices, spread_evenly(choices, target)))
    planned, pricing = plan_of(settled), pricing_bytes(job, choices, probing_tokens(text))
    if not isinstance(sizes := file_sizes(job), OurSizes):
        planned = plan_in_files(planned, settled, sizes)
    return replace(
        planned,
        warnings=(*planned.warnings, *_table_warnings(job, target), *_quality_warnings(choices, target)),
        peak_memory_bytes=max(planned.peak_memory_bytes, pricing),
        target=target.model_dump(mode="json", exclude_none=True),
        timed=lambda: estimate_time(settled, lambda: pricing_seconds(job, choices, text)),
    )


def _table_warnings(job: Job, target: Target) -> Iterator[str]:
    """Yield a sentence for a target in bits per weight that leaves out TABLE_SHARE of the weights, those of tables."""
    source, tables = job.source, (job.arch.embedding, job.arch.head)
    weights = sum(prod(source.tensors[f"{name}.weight"].shape) for name in tables if f"{name}.weight" in source.tensors)
    if target.bpw is not None and weights > TABLE_SHARE * source.parameters and not job.tables:
        yield (
            f"{weights / source.parameters:.0%} of the weights are in token tables, which bits per weight leave out; "
            f"a target in bytes (--size) counts all of them, and chooses for the table too"
        )


def _quality_warnings(choices: Choices, target: Target) -> Iterator[str]:
    """Yield a sentence for a target in KL: that the size is not known, and its bounds."""
    if target.kl is None:
        return
    costs = [matrix.bytes for matrix in choices.matrices]
    least, most = (choices.size(choices.cheapest([[sign * cost for cost in row] for row in costs])) for sign in (1, -1))
    yield (
        f"the size that a KL takes is known once options are measured; the sizes here are of middle options, of "
        f"{format_bytes(least)} to {format_bytes(most)} that are possible"
    )


def spread_evenly(choices: Choices, target: Target) -> tuple[int, ...]:
    """Return an option for each matrix, so that all have about as many bits a weight and meet the target.

    For a quality, whose size is unknown beforehand, every matrix has a middle option.
    """
    ladders = []
    for matrix in choices.matrices:
        by_bits = {count: number for number, count in reversed([*enumerate(matrix.bits)])}
        ladders.append([by_bits[count] for count in sorted(by_bits)])  # from least to most bits, one of each size
    if target.kl is not None:
        return tuple(ladder[len(ladder) // 2] for ladder in ladders)
    chosen = [ladder[0] for ladder in ladders]
    sizes = [matrix.costs(target) for matrix in choices.matrices]
    room = choices.room(target) - sum(row[option] for row, option in zip(sizes, chosen, strict=True))
    rungs = [
        (matrix.bits[before] / prod(matrix.shape), place, before, after)
        for place, (matrix, ladder) in enumerate(zip(choices.matrices, ladders, strict=True))
        for before, after in pairwise(ladder)
    ]
    for _, place, before, after in sorted(rungs):
        cost = sizes[place][after] - sizes[place][before]
        if chosen[place] == before and cost <= room:
            chosen[place], room = after, room - cost
    return tuple(chosen)
