"""One optimizer step: micro-batches, the losses' sums and counts, and gradients, over all processes.

The objective is a sum over all tokens of a step divided by their number, whatever the micro-batches and the processes.
So every division of the work gives the same gradient. With `nested`, the sequences of a step go to the student's sizes
in turn (`student/nested.py`).

Losses on hidden states and on predictions are of unlike sizes, which change as a student learns; with fixed weights a
single loss may be all that is learned. With `balance: true` the gradient of each loss is measured alone at every look
at the held-out sequences, on the batch of the next step, and its weight scaled so that the norms are in the proportion
of the recipe's weights (after LAPTOP-Diff, arXiv 2404.11098, whose losses are divided by the size of the teacher's
states, as `hidden` is; GradNorm, arXiv 1711.02257, balances norms). The first loss keeps its own scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from llmcompress.data.batch import Batch
from llmcompress.data.schedule import rate
from llmcompress.distillation.context import TRAINING, TrainContext
from llmcompress.distillation.metrics import term_names
from llmcompress.distillation.parallel.strategy import Strategy
from llmcompress.distillation.resume import Progress
from llmcompress.distillation.student.nested import Size, at_size, deal
from llmcompress.errors import NumericsError
from llmcompress.recipe.distillation import Term

Part = tuple[Size, Batch]  # a micro-batch, and the size of the student that reads it
LARGEST_FACTOR = 1e6  # of a loss whose gradient is next to nothing


def take_step(
    run: TrainContext, strategy: Strategy, step: int, batch: Batch, weights: Sequence[float]
) -> tuple[list[float], float, dict[str, int]]:
    """Take one optimizer step on `batch`, shared by the processes. `weights`: of the losses.

    Returns the mean of each loss over its tokens, the norm of the gradient before it was clipped, and the counts of
    codes (`Strategy.update`). Raises NumericsError, naming the step, if a loss or the norm is not finite.
    """
    recipe, accelerator = run.recipe, run.accelerator
    share = rate(step, run.steps, recipe.warmup, recipe.final_rate)
    for group in strategy.optimizer.param_groups:
        group["lr"] = recipe.rates[group["kind"]] * share * group["size"]
    parts = _micro_batches(run, batch, step)
    counts = _counts(run, strategy, parts, batch.targets)
    factors = [weight / count for weight, count in zip(weights, counts, strict=True)]
    report = torch.zeros(len(counts), 2, device=accelerator.device)
    for number, (size, part) in enumerate(parts, start=1):
        with strategy.no_sync(last=number == len(parts)), at_size(run.student.model, size):
            with run.autocast():
                loss, sums_and_counts = strategy.measure(part, factors)
            strategy.backward(loss)
        report += sums_and_counts
    sums = accelerator.reduce(report, "sum")[:, 0]
    run.student.hold()
    norm = strategy.step(recipe.clip)
    means = [float(value) / count for value, count in zip(sums, counts, strict=True)]
    if not math.isfinite(sum(means)) or not math.isfinite(norm):
        raise NumericsError(
            f"step {step + 1}: the loss is {sum(means)} and the gradient's norm {norm}; lower the rates, and "
            f"remove {run.output.name}{TRAINING} or choose another output folder"
        )
    return means, norm, strategy.update((step + 1) / run.steps)


def _micro_batches(run: TrainContext, batch: Batch, step: int) -> list[Part]:
    """Return the micro-batches of this process's part of a batch."""
    accelerator, micro_batch = run.accelerator, run.recipe.micro_batch
    own = torch.arange(len(batch)).tensor_split(accelerator.num_processes)[accelerator.process_index]
    dealt = [(size, batch[rows]) for size, rows in deal(own, run.recipe.nested, step)]
    return [(size, part.trim().to(accelerator.device)) for size, rows in dealt for part in rows.chunks(micro_batch)]


def _counts(run: TrainContext, strategy: Strategy, parts: Sequence[Part], targets: int) -> list[float]:
    """Return the divisor of each loss's sum over a step, in all processes: the number of `targets`, which each knows,
    or a sum of weights, which this measures."""
    counts = [float(targets)] * len(run.recipe.losses)
    if all(term.of.counts_tokens for term in run.recipe.losses):
        return counts
    report = torch.zeros(len(counts), 2, device=run.accelerator.device)
    for size, part in parts:
        with torch.no_grad(), run.autocast(), at_size(run.student.model, size):
            report += strategy.measure(part, counts)[1]
    return [float(count) for count in run.accelerator.reduce(report, "sum")[:, 1]]


def loss_weights(run: TrainContext, progress: Progress, step: int) -> list[float]:
    """Return the weight of each loss at a step."""
    terms = run.recipe.losses
    factors = progress.factors or [1.0] * len(terms)
    return [term.weight_at(step, run.steps) * factor for term, factor in zip(terms, factors, strict=True)]


def balance_losses(
    run: TrainContext, strategy: Strategy, progress: Progress, step: int, batch: Batch
) -> dict[str, dict[str, float]]:
    """Balance the losses on `batch`, in `progress`, if the recipe asks for it and it is due at this step.

    Returns for the metrics the share of the gradient that each loss would have otherwise.
    """
    recipe = run.recipe
    if not recipe.balance or step % recipe.evaluate_every:
        return {}
    parts = _micro_batches(run, batch, step)
    norms = gradient_norms(run, strategy, parts, [1 / count for count in _counts(run, strategy, parts, batch.targets)])
    progress.factors = balance_factors(norms)
    weights = [term.weight_at(step, run.steps) for term in recipe.losses]
    return {"gradient_shares": gradient_shares(norms, weights, recipe.losses)}


def gradient_norms(
    run: TrainContext, strategy: Strategy, parts: Sequence[Part], factors: Sequence[float]
) -> list[float]:
    """Return the norm of the gradient of each loss alone, on a batch, and remove the gradients.

    `parts`: this process's micro-batches; `factors`: of the losses' sums. Every process has to call this.
    """
    norms = []
    for number, factor in enumerate(factors):
        alone = [factor if other == number else 0.0 for other in range(len(factors))]
        for done, (size, part) in enumerate(parts, start=1):
            with strategy.no_sync(last=done == len(parts)), at_size(run.student.model, size):
                with run.autocast():
                    total, _ = strategy.measure(part, alone)
                strategy.backward(total)
        norms.append(strategy.gradient_norm())
    return norms


def gradient_shares(norms: Sequence[float], weights: Sequence[float], terms: Sequence[Term]) -> dict[str, float]:
    """Return the part that each loss has of the sum of all norms, weighted, by its name."""
    sizes = [norm * weight for norm, weight in zip(norms, weights, strict=True)]
    total = math.fsum(sizes) or 1.0
    return {name: size / total for name, size in zip(term_names(terms), sizes, strict=True)}


def balance_factors(norms: Sequence[float]) -> list[float]:
    """Return the factor of each loss that gives its gradient the norm of the first one's; 1 without a gradient."""
    return [min(norms[0] / norm, LARGEST_FACTOR) if norm and norms[0] else 1.0 for norm in norms]
