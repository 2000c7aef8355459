"""Sequences that the student continues itself (on-policy distillation: GKD, arXiv 2306.13649).

A student that reads nothing but text never meets what follows from its own mistakes. So it keeps the beginning of some
sequences, samples the rest, and learns from what the teacher predicts at every token of it. Writing goes token by
token, so many sequences are written side by side: those of the next `every` steps at once, by the student of that
moment, which is a little older than the one that learns from them.

No gradient passes the sampling. The written sequences are part of a run's state, so that a resumed run reads the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from llmcompress.data.batch import Batch
from llmcompress.data.generate import NOTHING, continue_sequences, end_tokens
from llmcompress.distillation.context import DistillationJob, TrainContext
from llmcompress.distillation.parallel.launch import is_sharded
from llmcompress.distillation.resume import Progress
from llmcompress.errors import RecipeError
from llmcompress.recipe.sections import OnPolicy

SIDE_BY_SIDE = 64  # sequences that are written at once; changes no result, but for the rounding of logits


def check_on_policy(job: DistillationJob) -> None:
    """Raise RecipeError for a sharded student, for several documents in one sequence, and for too long a prompt."""
    settings, length = job.recipe.on_policy, job.data.sequences.ids.shape[1]
    if settings is None:
        return
    if settings.prompt >= length:
        raise RecipeError(f"on_policy: a prompt of {settings.prompt} leaves nothing of {length} tokens; set it lower")
    if is_sharded(job.accelerator):
        raise RecipeError("on_policy: a student that is sharded cannot write; run it under ddp, or leave on_policy out")
    if job.data.sequences.documents is not None:
        raise RecipeError(
            "on_policy: sequences of several documents have no end to go on from; set packing: false, or boundaries: "
            "false"
        )


def with_own_text(
    run: TrainContext,
    settings: OnPolicy,
    progress: Progress,
    step: int,
    draw: Callable[[range], list[tuple[Batch, list[int]]]],
) -> Batch:
    """Return the batch of `step` with some of its sequences written by the student; `progress` keeps them.

    `draw`: gives the batches of steps, from `step` on, each with its cursors.
    """
    ahead = [batch for batch, _ in draw(writing_window(settings, step, run.steps))]
    batch = ahead[0]
    rows = settings.rows(len(batch))
    names = _names(settings, step, batch, rows)
    if any(name not in progress.written for name in names):
        progress.written = dict(_write_sequences(run, settings, step, ahead))
    texts = [progress.written[name] for name in names]
    return replace_text(batch, rows, texts, prompt_lengths(batch, settings.prompt))


def writing_window(settings: OnPolicy, step: int, steps: int) -> range:
    """Return the steps from `step` on, of `steps`, whose sequences are written at the same time."""
    return range(step, min(steps, (step // settings.every + 1) * settings.every))


def _names(settings: OnPolicy, step: int, batch: Batch, rows: Iterable[int]) -> list[str]:
    """Return the names of a step's written sequences: the time of writing, and their numbers in the data."""
    numbers = cast(Tensor, batch.numbers)  # as all have that a step reads
    return [f"{step // settings.every}/{int(numbers[row])}" for row in rows]


def _write_sequences(
    run: TrainContext, settings: OnPolicy, step: int, ahead: Sequence[Batch]
) -> Iterable[tuple[str, list[int]]]:
    """Yield by name the sequences of `step` and those after it; every process writes its share of them."""
    model, parts, names = run.student.model, [], []
    for batch in ahead:
        rows = settings.rows(len(batch))
        parts.append(batch[torch.tensor(rows, dtype=torch.int64)])
        names += _names(settings, step, batch, rows)
    whole = Batch.join(parts)
    lengths, order = prompt_lengths(whole, settings.prompt), torch.arange(len(whole))
    own = run.ranks.share(order)
    todo = own if len(own) else order[:1]  # of more processes than sequences, some write for nothing
    texts: list[list[int]] = []
    for part in todo.split(SIDE_BY_SIDE):
        seeds = [f"{run.recipe.seed}/on-policy/{step}/{names[row]}" for row in part]
        with run.autocast():
            text = continue_sequences(
                model, whole.ids[part], lengths[part], end_tokens(model), settings.temperature, seeds
            )
        texts += text.tolist()
    return zip(names, run.ranks.gather_items(texts[: len(own)]), strict=True)


def prompt_lengths(batch: Batch, least: int) -> Tensor:
    """Return how many tokens of each sequence stay, int64 [sequences]: `least`, or up to its first target if that is
    more, and never its last, behind which there may be padding."""
    first, last = batch.counted.int().argmax(1), batch.read.sum(1) - 1
    return first.clamp(min=least).minimum(last).clamp(min=1)


def replace_text(batch: Batch, rows: Sequence[int], texts: Sequence[Sequence[int]], lengths: Tensor) -> Batch:
    """Return `batch` with the sequences at `rows` replaced by `texts`, in which the tokens after the first `lengths`
    count."""
    ids, counted = batch.ids.clone(), batch.counted.clone()
    positions = torch.arange(ids.shape[1])
    for row, text in zip(rows, texts, strict=True):
        tokens = torch.tensor(text)
        inside = tokens != NOTHING
        ids[row] = tokens.where(inside, 0)
        counted[row] = inside & (positions >= lengths[row])
    return replace(batch, ids=ids, counted=counted)
