"""Rarely used experts replaced by factors of low rank; routers and the number of experts stay.

After LightMoE (arXiv 2603.12645), which replaces experts of little use by a base that several share plus a low-rank
part of their own. A weight of the checkpoint format stores all that it needs, so a base would be stored once for every
expert that shares it, and nothing would be saved: an expert is stored as factors alone. There is no annealing, since
the factors come from a truncated SVD on the expert's own inputs; `distill` mends their losses.

The result is a compressed checkpoint: a recipe with one rule for the experts that go, the step `low_rank`, and another
that leaves everything else dense.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from llmcompress.calibration.gather import HiddenStreams, Statistics, gather, wanted_of
from llmcompress.calibration.walk import Progress
from llmcompress.compression import run
from llmcompress.compression.block import swap
from llmcompress.compression.job import Job, prepare
from llmcompress.compression.plan import plan_of
from llmcompress.errors import RecipeError
from llmcompress.methods.layer import Layer
from llmcompress.methods.low_rank.factors import Factors
from llmcompress.methods.row_chunks import apply_in_runs
from llmcompress.models.dense.experts import DOWN
from llmcompress.models.dense.families import BlockLayout
from llmcompress.models.files import file_names
from llmcompress.models.files.checkpoint import add_file, has_file
from llmcompress.pipeline.compress import completed_result
from llmcompress.pipeline.quality_check import judge
from llmcompress.recipe.calibration import Calibration
from llmcompress.recipe.compression import Recipe
from llmcompress.recipe.rules import Rule
from llmcompress.reporting import report as reports
from llmcompress.reporting.report import Report
from llmcompress.runtime.precision import fast_float32
from llmcompress.surgery.experts.job import (
    SAMPLES,
    BlockFate,
    ExpertsOutcome,
    ExpertsReport,
    Fate,
    expert_fates,
    open_job,
    unused_experts,
)
from llmcompress.surgery.experts.mixture import ExpertBlock, ExpertMixture, ExpertScore
from llmcompress.weight.layout import pack_weight
from llmcompress.weight.nodes import Dense

SHARE = 0.25  # of its dense size that a replaced expert takes
LONGEST = 40  # experts in one pattern of a recipe
NAME = "replaced experts"  # of the recipe


@fast_float32()
def replace_experts(
    model: str | Path,
    output: str | Path | None = None,
    *,
    count: float,
    share: float | None = None,
    rank: int | None = None,
    by: str = "reap",
    text: str = "stdlib",
    samples: int = SAMPLES,
    seed: int = 0,
    revision: str | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> ExpertsReport:
    """Write a mixture whose least useful experts are stored as factors of low rank: a compressed checkpoint.

    Args:
        model: a folder or a Hub id (`org/name` or `org/name@revision`).
        output: a new or empty folder; None to look at the plan and write nothing.
        count: experts that are replaced in each block, or their share below 1.
        share: share of their size in bfloat16 that they take then, 0.25 by default; or
        rank: rank of the factors.
        by: `reap`, `frequency`, or `random` as a control; see `surgery/experts/mixture.py`. The experts that score
            least go.
        text: the text to read, as `dataset` of a recipe's calibration.
        samples: sequences of 512 tokens to read, a fifth of them to judge on.
        seed: random seed of `by="random"`.
        revision: a branch, tag or commit of a Hub model.
        device: where to compute: `cpu`, `cuda` or `cuda:1`.
        progress: receives (blocks walked, blocks, tokens per second), of the look and of the compression.

    Returns:
        The fate of every expert, the predicted damage to each block, and the bytes before and after.

    Raises:
        RecipeError: for a number of experts that there are not, or a rank that their matrices do not have.
        InputError: for a model that is no mixture or is damaged, and for text that cannot serve.
        DiskError: for an output that cannot be written; then nothing is left behind but finished blocks, which the same
            call resumes after; or all but the gates, which it measures.
    """
    score = ExpertScore(by, seed)
    place = None if output is None else Path(output)
    new = None if place is None or _ended_in_gates(place) else place  # a new output has to be free
    job = replace(open_job(model, new, text, samples, revision, device, progress), output=place)
    mixture, going = job.mixture, job.count_of(count, "count")
    step = _factors_step(mixture, share, rank)
    blocks = [_replace_in_block(mixture, block, step, going, score) for block in job.blocks()]
    compression = prepare(mixture.source, _recipe(blocks, step, job.calibration))
    planned = plan_of(compression)
    settings = {"count": going, "rank": _rank(mixture, step), "by": by, "seed": seed}
    warnings = (*planned.warnings, *job.tokens.notes, *unused_experts(blocks))
    outcome = ExpertsOutcome("replace", settings, mixture.experts, blocks)
    report = job.report(outcome, planned.bytes, tuple(dict.fromkeys(warnings)))
    if place is not None:
        judged = _compress_and_judge(compression, place, device, progress)
        missed = () if judged.gates is None or judged.gates.held is not False else (f"gates {judged.gates.sentence()}",)
        report = replace(report, warnings=(*judged.warnings, *missed, *unused_experts(blocks)))
        add_file(place, file_names.EXPERTS, json.dumps(report.to_json() | {"output": None}, indent=1))
    return report


def _ended_in_gates(output: Path) -> bool:
    """True if an earlier call has compressed into `output`, and was interrupted before it wrote the fates there."""
    if not (output / file_names.REPORT).is_file() or has_file(output, file_names.EXPERTS):
        return False
    return reports.read(output).recipe == NAME


def _compress_and_judge(job: Job, output: Path, device: str, progress: Progress | None) -> Report:
    """Compress into `output`, unless this very job has done so, and measure its gates; return the report."""
    done = completed_result(output, job, device) or run.compress(job, output, device=device, progress=progress)
    return judge(job, done.folder, device)


def _factors_step(mixture: ExpertMixture, share: float | None, rank: int | None) -> Factors:
    """Return the step for experts. Raises RecipeError for a share or rank that no factors have."""
    if share is not None and rank is not None:
        raise RecipeError("share and rank say the same of factors; give one of them")
    if share is not None and not 0 < share < 1:
        raise RecipeError(f"share is {share:g}; give more than 0 and less than 1 of the size of an expert")
    if rank is not None and rank < 1:
        raise RecipeError(f"rank is {rank}; give at least 1")
    step = Factors(rank=rank) if rank is not None else Factors(share=SHARE if share is None else share)
    _rank(mixture, step)
    return step


def _rank(mixture: ExpertMixture, step: Factors) -> int:
    """Return the rank of an expert's factors. Raises RecipeError for one that is too large."""
    path = next(iter(mixture.layers.values()))
    size = mixture.source.tensors[f"{path}.0.{DOWN}.weight"].shape
    return step.rank_for(Dense(torch.empty(size, dtype=torch.bfloat16, device="meta")))


def _recipe(rows: Sequence[BlockFate], step: Factors, calibration: Calibration) -> Recipe:
    """Return the recipe that replaces the experts whose fate that is."""
    patterns = []
    for block in rows:
        numbers = [str(row.number) for row in block.experts if row.fate == "replaced"]
        for start in range(0, len(numbers), LONGEST):
            some = "|".join(numbers[start : start + LONGEST])
            patterns.append(f"re:{re.escape(block.path)}\\.(?:{some})\\..*")
    rules = (Rule(match=tuple(patterns), steps=(step,)), Rule(match=("*",), steps=()))
    return Recipe(name=NAME, calibration=calibration, rules=rules)


def _replace_in_block(
    mixture: ExpertMixture, block: ExpertBlock, step: Factors, going: int, score: ExpertScore
) -> BlockFate:
    """Replace the experts of a loaded block that score least, with which the walk goes on; return their fate."""
    scores = score.values(block)
    chosen = tuple(sorted(scores.argsort(stable=True)[:going].tolist()))
    fate: dict[int, Fate] = {number: "replaced" if number in chosen else "kept" for number in range(mixture.experts)}
    ranks, numbers = dict.fromkeys(chosen, _rank(mixture, step)), {number: number for number in fate}
    damage = _replace_and_judge(mixture.arch.blocks[block.number], block, chosen, step)
    rows = expert_fates(block.usage, fate, scores, becomes=numbers, rank=ranks)
    return BlockFate(block.number, block.path, damage, rows)


@torch.no_grad()
def _replace_and_judge(layout: BlockLayout, block: ExpertBlock, chosen: tuple[int, ...], step: Factors) -> float:
    """Replace the `chosen` experts of a loaded block, and return the damage to its outputs."""
    visit, loaded = block.visit, block.visit.block
    inside = tuple(f"{block.path}.{number}." for number in chosen)
    names = [linear.name for group in layout.groups for linear in group if linear.name.startswith(inside)]
    cap = Recipe.model_fields["cap"].default
    streams = HiddenStreams(visit.batches, loaded.hidden, Statistics(cap=cap))
    groups = gather(visit.run, wanted_of(layout, dict.fromkeys(names, frozenset({"outer"}))), streams)
    before = visit.outputs()
    for group in groups:
        for name in group.names:
            weight = loaded.weight(name)
            layer = Layer(name, weight, Dense(weight), group.inputs)
            swap(loaded, {name: pack_weight(apply_in_runs(layer, (step,)).weight)})
    return visit.damage(before)
