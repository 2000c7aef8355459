"""Sequences that the student goes on with itself (on-policy distillation: GKD, arXiv 2306.13649).

A student that reads nothing but text never meets what follows from its own mistakes. So of some sequences it keeps the
beginning, samples the rest, and learns from what the teacher predicts at every word of it. Writing goes token by token,
so that many sequences are written side by side: those of the next `every` steps at once, by the student of that moment,
which is a little older than the one that learns from them.

No gradient passes the sampling. What was written is kept with a run's state, so that a resumed run reads the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from llmcompress.data.batch import Batch
from llmcompress.data.generate import NOTHING, continue_sequences, end_tokens
from llmcompress.distillation.context import TrainContext
from llmcompress.distillation.parallel.launch import sharded
from llmcompress.distillation.resume import Progress
from llmcompress.errors import RecipeError
from llmcompress.recipe.sections import OnPolicy

SIDE_BY_SIDE = 64  # sequences that are written at once; changes no result, but for the rounding of logits


def check_on_policy(run: TrainContext) -> None:
    """Raise RecipeError where the student cannot write: sharded, documents apart in one sequence, or no room."""
    asked, length = run.recipe.on_policy, run.data.sequences.ids.shape[1]
    if asked is None:
        return
    if asked.prompt >= length:
        raise RecipeError(f"on_policy: a prompt of {asked.prompt} leaves nothing of {length} tokens; set it lower")
    if sharded(run.accelerator):
        raise RecipeError("on_policy: a student that is sharded cannot write; run it under ddp, or leave on_policy out")
    if run.data.sequences.documents is not None:
        raise RecipeError(
            "on_policy: sequences of several documents have no end to go on from; set packing: false, or boundaries: "
            "false"
        )


def own_words(run: TrainContext, asked: OnPolicy, progress: Progress, step: int, ahead: Sequence[Batch]) -> Batch:
    """Return the batch of `step` with some of its sequences written by the student.

    `ahead`: the batches of this step and of those after it that are written at the same time. `progress` keeps what
    was written.
    """
    [batch, *_] = ahead
    rows = asked.rows(len(batch))
    if any(name not in progress.written for name in _names(asked, step, batch, rows)):
        progress.written = dict(_written(run, asked, step, ahead))
    texts = [progress.written[name] for name in _names(asked, step, batch, rows)]
    return rewritten(batch, rows, texts, prompts(batch, asked.prompt))


def window(asked: OnPolicy, step: int, steps: int) -> range:
    """Return the steps from `step` on, of `steps`, whose sequences are written at the same time."""
    return range(step, min(steps, (step // asked.every + 1) * asked.every))


def _names(asked: OnPolicy, step: int, batch: Batch, rows: Iterable[int]) -> list[str]:
    """Return what sequences of a step are kept under: the time of writing, and which of the data they are."""
    numbers = cast(Tensor, batch.numbers)  # as all have that a step reads
    return [f"{step // asked.every}/{int(numbers[row])}" for row in rows]


def _written(run: TrainContext, asked: OnPolicy, step: int, ahead: Sequence[Batch]) -> Iterable[tuple[str, list[int]]]:
    """Yield by name the sequences of `step` and those after it; every process writes its share of them."""
    model, parts, names = run.student.model, [], []
    for batch in ahead:
        rows = asked.rows(len(batch))
        parts.append(batch[torch.tensor(rows, dtype=torch.int64)])
        names += _names(asked, step, batch, rows)
    whole = Batch.join(parts)
    kept, order = prompts(whole, asked.prompt), torch.arange(len(whole))
    mine = run.ranks.share(order)
    todo = mine if len(mine) else order[:1]  # of more processes than sequences, some write for nothing
    texts: list[list[int]] = []
    for part in todo.split(SIDE_BY_SIDE):
        seeds = [f"{run.recipe.seed}/on-policy/{step}/{names[row]}" for row in part]
        with run.autocast():
            found = continue_sequences(model, whole.ids[part], kept[part], end_tokens(model), asked.temperature, seeds)
        texts += found.tolist()
    return zip(names, run.ranks.gather_items(texts[: len(mine)]), strict=True)


def prompts(batch: Batch, least: int) -> Tensor:
    """Return how many tokens of each sequence stay, int64 [sequences]: `least`, or up to its first target if that is
    more, and never all of them."""
    first = batch.counted.int().argmax(1)
    return first.clamp(min=least).clamp(max=batch.ids.shape[1] - 1)


def rewritten(batch: Batch, rows: Sequence[int], texts: Sequence[Sequence[int]], kept: Tensor) -> Batch:
    """Return `batch` with the sequences at `rows` replaced by what was written; its own tokens count in them."""
    ids, counted = batch.ids.clone(), batch.counted.clone()
    places = torch.arange(ids.shape[1])
    for row, text in zip(rows, texts, strict=True):
        found = torch.tensor(text)
        there = found != NOTHING
        ids[row] = found.where(there, 0)
        counted[row] = there & (places >= kept[row])
    return replace(batch, ids=ids, counted=counted)
