"""The training loop: plain Accelerate, one process or several, no callbacks.

    for step in range(progress.step, steps):
        student reads, teacher reads, losses per token; gradients add over micro-batches and processes
        one AdamW step; now and then a look at the held-out sequences, and a state to resume from

The objective is a sum over all tokens of a step divided by their number, whatever the micro-batches and the processes.
So every division of the work gives the same gradient.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from llmcompress.data.batch import Batch
from llmcompress.data.schedule import draw, normalize, quotas, rate, reweight
from llmcompress.distillation.activation_checkpointing import recomputed
from llmcompress.distillation.balance import balanced, gradient_norms, gradient_shares
from llmcompress.distillation.context import Report, TrainContext
from llmcompress.distillation.held_out import evaluate_held_out, held_out_distances
from llmcompress.distillation.metrics import term_names
from llmcompress.distillation.objective.hidden_states import StateMatching
from llmcompress.distillation.objective.module import Objective
from llmcompress.distillation.on_policy import own_words, window
from llmcompress.distillation.optimizers import optimizer_of
from llmcompress.distillation.parallel.launch import is_given
from llmcompress.distillation.parallel.strategy import Engine, held_decoded
from llmcompress.distillation.resume import Progress, Saving
from llmcompress.errors import NumericsError, Termination
from llmcompress.runtime.signals import stop_requests


def train(run: TrainContext, report: Report | None = None) -> Progress:
    """Train what moves in `run.student`, from where the last state was left; returns what was measured.

    Raises NumericsError, naming the step, when the loss or a gradient is not finite; the last state stays. Asked to
    stop by a signal, it keeps the state after the step at hand, and then raises what the signal would have raised.
    """
    recipe, accelerator = run.recipe, run.accelerator
    states = [term.of.start() for term in recipe.losses]
    matching = StateMatching.of(run.student.model, run.reader, recipe.losses, recipe.seed)
    objective = Objective(run.student.model, run.teaching, matching, list(zip(recipe.losses, states, strict=True)))
    run.student.join(objective.projections)
    optimizer = optimizer_of(recipe, _groups(run))
    again = recomputed(run.student.model, not is_given(accelerator)) if recipe.checkpointing else nullcontext()
    with ExitStack() as stack:
        with run.ranks.agree_on_errors():
            stack.enter_context(again)
        stack.enter_context(held_decoded(accelerator, run.student.model, run.teacher))
        stopping = stack.enter_context(stop_requests())
        engine = Engine.of(accelerator, run.student, run.teacher, objective, optimizer, recipe.freezing)
        progress = _begun(run, engine, states)
        started, saving = time.monotonic() - progress.seconds, Saving(recipe)
        run.metrics.start(progress.step, begun=bool(progress.history))
        if not progress.history:
            progress.history.append(_seen(run, engine, progress))
            run.metrics.add(progress.history[-1])
        for step in range(progress.step, run.steps):
            began = time.monotonic()
            batch = _next(run, engine, progress, step)
            said = _balanced(run, engine, progress, step, batch)
            weights = _weights(run, progress, step)
            means, norm, codes = _step(run, engine, step, batch, weights)
            loss = math.fsum(weight * mean for weight, mean in zip(weights, means, strict=True))
            for state, mean in zip(states, means, strict=True):
                if state is not None:
                    state.update(mean, (step + 1) / run.steps)
            progress.step, progress.seconds = step + 1, time.monotonic() - started
            progress.targets += batch.targets
            progress.frozen = codes.get("frozen")
            progress.losses = [None if state is None else state.state_dict() for state in states]
            said |= {"codes": codes} if codes else {}
            said["tokens_per_second"] = batch.targets / (time.monotonic() - began)
            run.metrics.add({**_entry(run, progress, loss, means, norm), **said})
            last = progress.step == run.steps
            if last or progress.step % recipe.evaluate_every == 0:
                seen = {**_seen(run, engine, progress), "seconds": progress.seconds}
                progress.history.append({**seen, "loss": loss})
                run.metrics.add(seen)
            asked, late = _decided(accelerator, stopping, saving.is_late())
            if last or asked or late or saving.is_due(progress.step):
                with saving.timed():
                    engine.save(run.store, progress)
            if report is not None:
                read = progress.step * recipe.batch * run.data.sequences.ids.shape[1]
                report(progress.step, run.steps, loss, read / progress.seconds, progress.history[-1]["kl"])
            if asked:
                kept = f"step {progress.step} is kept in {run.store.folder}, from where the same command resumes"
                raise (KeyboardInterrupt if signal.SIGINT in stopping else Termination)(kept)
    engine.gather()
    return progress


def _begun(run: TrainContext, engine: Engine, states: Sequence[Any]) -> Progress:
    """Return the progress of an earlier run, with the `states` of its losses put back, or that of a start."""
    progress = engine.load(run.store)
    progress.shares = progress.shares or normalize(run.data.weights)
    progress.cursors = progress.cursors or [0] * len(run.data.sizes)
    for state, saved in zip(states, progress.losses):
        if state is not None and saved is not None:
            state.load_state_dict(saved)
    return progress


def _groups(run: TrainContext) -> list[dict[str, Any]]:
    """Return the optimizer's groups, with the sizes of the first process, which may be the only one with numbers."""
    groups = run.student.groups()
    sizes = run.ranks.first(lambda: [group["size"] for group in groups])
    return [group | {"size": size} for group, size in zip(groups, sizes, strict=True)]


def _decided(accelerator: Accelerator, stopping: list[int], late: bool) -> tuple[bool, bool]:
    """Return two flags: any process was asked to stop; the first one finds a state to be `late`.

    All then do the same, or some would wait for the others forever: clocks differ, and a signal may reach one alone.
    """
    if accelerator.num_processes == 1:
        return bool(stopping), late
    mine = [float(len(stopping)), float(late and accelerator.is_main_process)]
    asked, overdue = accelerator.reduce(torch.tensor(mine, device=accelerator.device), "sum").tolist()
    return asked > 0, overdue > 0


def _next(run: TrainContext, engine: Engine, progress: Progress, step: int) -> Batch:
    """Return the sequences of a step; update the domains' shares, if due, and their cursors in `progress`."""
    recipe, data = run.recipe, run.data
    if recipe.mixture.due(step):
        few = recipe.mixture.sequences
        gaps = engine.within(lambda: [held_out_distances(run, held_out[:few]).means() for held_out in data.held_out])
        perplexities = ([gap[key] for gap in gaps] for key in ("perplexity", "teacher_perplexity"))
        progress.shares = _agreed(run.accelerator, reweight(progress.shares, *perplexities))
    before = progress.cursors
    batch, progress.cursors = _drawn(run, progress.shares, before, step)
    if recipe.on_policy is None:
        return batch
    ahead: list[Batch] = []
    for coming in window(recipe.on_policy, step, run.steps):
        found, before = _drawn(run, progress.shares, before, coming)
        ahead.append(found)
    return own_words(run, recipe.on_policy, progress, step, ahead)


def _drawn(run: TrainContext, shares: list[float], cursors: list[int], step: int) -> tuple[Batch, list[int]]:
    """Return the sequences that a step reads where the domains have these shares, and the cursors behind them."""
    recipe, data = run.recipe, run.data
    counts = quotas(shares, recipe.batch, step, recipe.seed)
    numbers = torch.tensor(draw(cursors, counts, data.sizes, recipe.seed))
    batch = replace(data.sequences[numbers], numbers=numbers)
    return batch, [cursor + count for cursor, count in zip(cursors, counts, strict=True)]


def _agreed(accelerator: Accelerator, values: list[float]) -> list[float]:
    """Return the values of the first process: a last bit that differs would be another batch."""
    if accelerator.num_processes == 1:
        return values
    return [float(value) for value in broadcast(torch.tensor(values, dtype=torch.float64, device=accelerator.device))]


def _shares(run: TrainContext, progress: Progress) -> dict[str, dict[str, float]]:
    """Return the shares of several domains for the history; nothing for a single one."""
    names = run.data.names
    return {"shares": dict(zip(names, progress.shares, strict=True))} if len(names) > 1 else {}


def _seen(run: TrainContext, engine: Engine, progress: Progress) -> dict[str, Any]:
    """Look at the held-out sequences; return the result with the tokens predicted before it."""
    found = engine.within(lambda: evaluate_held_out(run, progress.step))
    return {**found, "tokens": progress.targets, **_shares(run, progress)}


def _entry(run: TrainContext, progress: Progress, loss: float, means: Sequence[float], norm: float) -> dict[str, Any]:
    """Return the metrics of the step that was just done."""
    recipe = run.recipe
    return {
        "step": progress.step,
        "loss": loss,
        "terms": dict(zip(term_names(recipe.losses), means, strict=True)),
        "rate": rate(progress.step - 1, run.steps, recipe.warmup, recipe.final_rate),
        "gradient_norm": norm,
        "tokens": progress.targets,
        "seconds": progress.seconds,
    }


def _weights(run: TrainContext, progress: Progress, step: int) -> list[float]:
    """Return the weight of each loss at a step."""
    terms = run.recipe.losses
    factors = progress.factors or [1.0] * len(terms)
    return [term.weight_at(step, run.steps) * factor for term, factor in zip(terms, factors, strict=True)]


def _balanced(run: TrainContext, engine: Engine, progress: Progress, step: int, batch: Batch) -> dict[str, Any]:
    """Balance the losses on `batch` if that is asked for and due; return for the metrics the shares of the gradient
    that they would have otherwise."""
    recipe = run.recipe
    if not recipe.balance or step % recipe.evaluate_every:
        return {}
    parts = _parts(run, batch)
    norms = gradient_norms(run, engine, parts, [1 / count for count in _counts(run, engine, parts, batch.targets)])
    progress.factors = balanced(norms)
    weights = [term.weight_at(step, run.steps) for term in recipe.losses]
    return {"gradient_shares": gradient_shares(norms, weights, recipe.losses)}


def _parts(run: TrainContext, batch: Batch) -> list[Batch]:
    """Return the micro-batches of this process's part of a batch."""
    accelerator = run.accelerator
    mine = batch[torch.arange(len(batch)).tensor_split(accelerator.num_processes)[accelerator.process_index]]
    return [part.trim().to(accelerator.device) for part in mine.chunks(run.recipe.micro_batch)]


def _step(
    run: TrainContext, engine: Engine, step: int, batch: Batch, factors: Sequence[float]
) -> tuple[list[float], float, dict[str, int]]:
    """Take one optimizer step on `batch`, shared by the processes. Return the mean of each loss over its tokens, the
    norm of the gradient before it was clipped, and the counts of codes (`Engine.update`).

    `factors`: the weights of the losses.
    """
    recipe, accelerator = run.recipe, run.accelerator
    share = rate(step, run.steps, recipe.warmup, recipe.final_rate)
    for group in engine.optimizer.param_groups:
        group["lr"] = recipe.rates[group["kind"]] * share * group["size"]
    parts = _parts(run, batch)
    counts = _counts(run, engine, parts, batch.targets)
    weights = [factor / count for factor, count in zip(factors, counts, strict=True)]
    report = torch.zeros(len(counts), 2, device=accelerator.device)
    for number, part in enumerate(parts, start=1):
        with engine.no_sync(last=number == len(parts)):
            with run.autocast():
                loss, found = engine.measure(part, weights)
            engine.backward(loss)
        report += found
    sums = accelerator.reduce(report, "sum")[:, 0]
    norm = engine.step(recipe.clip)
    means = [float(value) / count for value, count in zip(sums, counts, strict=True)]
    if not math.isfinite(sum(means)) or not math.isfinite(norm):
        raise NumericsError(
            f"step {step + 1}: the loss is {sum(means)} and the gradient's norm {norm}; lower the rates and rerun, "
            f"the state before this step is kept"
        )
    return means, norm, engine.update((step + 1) / run.steps)


def _counts(run: TrainContext, engine: Engine, parts: Sequence[Batch], targets: int) -> list[float]:
    """Return the divisor of each loss's sum over a step: its `targets`, those of all processes (each knows every
    sequence, so nobody has to ask), or a sum of weights that has to be found."""
    counts = [float(targets)] * len(run.recipe.losses)
    if all(term.of.counts_tokens for term in run.recipe.losses):
        return counts
    with torch.no_grad(), run.autocast():
        report = torch.stack([engine.measure(part, counts)[1] for part in parts]).sum(0)
    return [float(count) for count in run.accelerator.reduce(report, "sum")[:, 1]]
