"""The training loop: plain Accelerate, one process or several, no callbacks.

    for step in range(progress.step, steps):
        student reads, teacher reads, losses per token; gradients add over micro-batches and processes
        one step of the optimizer; now and then a look at the held-out sequences, and a state to resume from

`step.py` has a step, `parallel/strategy.py` how processes hold the models.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from llmcompress.data.batch import Batch
from llmcompress.data.schedule import draw, normalize, quotas, rate, reweight
from llmcompress.distillation.context import Report, TrainContext
from llmcompress.distillation.held_out import evaluate_held_out, held_out_distances
from llmcompress.distillation.metrics import term_names
from llmcompress.distillation.objective.forward import recompute_activations
from llmcompress.distillation.objective.hidden_states import StateMatching
from llmcompress.distillation.objective.objective import Objective
from llmcompress.distillation.on_policy import with_own_text
from llmcompress.distillation.optimizers import optimizer_of
from llmcompress.distillation.parallel.deepspeed import PartitionedStrategy
from llmcompress.distillation.parallel.fsdp import ShardedStrategy
from llmcompress.distillation.parallel.launch import is_partitioned, is_sharded, receives_shares
from llmcompress.distillation.parallel.strategy import Strategy, hold_decoded
from llmcompress.distillation.resume import Progress, Saving
from llmcompress.distillation.step import balance_losses, loss_weights, take_step
from llmcompress.errors import Termination
from llmcompress.losses.loss import LossState
from llmcompress.runtime.signals import stop_requests


def train(run: TrainContext, report: Report | None = None) -> Progress:
    """Train the parameters of `run.student` from the last state on; returns the measurements.

    Raises NumericsError, naming the step, if the loss or a gradient is not finite; the last state stays. Asked to stop
    by a signal, it saves the state after the current step, and then raises what the signal would have raised.
    """
    recipe, accelerator = run.recipe, run.accelerator
    states = [term.of.start() for term in recipe.losses]
    with ExitStack() as stack:
        strategy = _start(run, states, stack)
        stopping = stack.enter_context(stop_requests())
        progress = _load_progress(run, strategy, states)
        started, saving = time.monotonic() - progress.seconds, Saving(recipe)
        run.metrics.start(progress.step, begun=bool(progress.history))
        if not progress.history:
            progress.history.append(_look(run, strategy, progress))
            run.metrics.add(progress.history[-1])
        for step in range(progress.step, run.steps):
            began = time.monotonic()
            batch = _next_batch(run, strategy, progress, step)
            entry: dict[str, Any] = balance_losses(run, strategy, progress, step, batch)
            weights = loss_weights(run, progress, step)
            means, norm, codes = take_step(run, strategy, step, batch, weights)
            loss = math.fsum(weight * mean for weight, mean in zip(weights, means, strict=True))
            for state, mean in zip(states, means, strict=True):
                if state is not None:
                    state.update(mean, (step + 1) / run.steps)
            progress.step, progress.seconds = step + 1, time.monotonic() - started
            progress.targets += batch.targets
            progress.frozen = codes.get("frozen")
            progress.losses = [None if state is None else state.state_dict() for state in states]
            entry |= {"codes": codes} if codes else {}
            entry["tokens_per_second"] = batch.targets / (time.monotonic() - began)
            run.metrics.add({**_metrics(run, progress, loss, means, norm), **entry})
            last = progress.step == run.steps
            if last or progress.step % recipe.evaluate_every == 0:
                look = {**_look(run, strategy, progress), "seconds": progress.seconds}
                progress.history.append({**look, "loss": loss})
                run.metrics.add(look)
            stop, late = _agree_on_saving(accelerator, stopping, saving.is_late())
            if last or stop or late or saving.is_due(progress.step):
                with saving.measure_time(), run.ranks.agree_on_errors():
                    strategy.save(run.store, progress)
            if report is not None:
                read = progress.step * recipe.batch * run.data.sequences.ids.shape[1]
                report(progress.step, run.steps, loss, read / progress.seconds, progress.history[-1]["kl"])
            if stop:
                message = f"step {progress.step} is kept in {run.store.folder}, from where the same command resumes"
                raise (KeyboardInterrupt if signal.SIGINT in stopping else Termination)(message)
    strategy.gather()
    return progress


def _start(run: TrainContext, states: Sequence[LossState | None], stack: ExitStack) -> Strategy:
    """Return the objective and the optimizer in the hands of the processes; `stack` undoes changes of the models."""
    recipe, accelerator, model = run.recipe, run.accelerator, run.student.model
    matching = StateMatching.of(model, run.reading_teacher, recipe.losses, recipe.seed)
    objective = Objective(model, run.source, matching, list(zip(recipe.losses, states, strict=True)))
    run.student.add_projections(objective.projections)
    groups = run.student.groups()
    sizes = run.ranks.first(lambda: [group["size"] for group in groups])  # others may have no numbers yet
    optimizer = optimizer_of(recipe, [group | {"size": size} for group, size in zip(groups, sizes, strict=True)])
    if recipe.checkpointing:
        with run.ranks.agree_on_errors():
            stack.enter_context(recompute_activations(model, check=not receives_shares(accelerator)))
    stack.enter_context(hold_decoded(accelerator, model, run.teacher))
    kind = choose_strategy(accelerator)
    return kind(accelerator, run.student, run.teacher, objective, optimizer, recipe.freezing)


def choose_strategy(accelerator: Accelerator) -> type[Strategy]:
    """Return how the processes hold the models, as the launcher asks for."""
    if is_sharded(accelerator):
        return ShardedStrategy
    return PartitionedStrategy if is_partitioned(accelerator) else Strategy


def _load_progress(run: TrainContext, strategy: Strategy, states: Sequence[LossState | None]) -> Progress:
    """Return the progress of an earlier run, after putting back the `states` of its losses, or that of a start."""
    progress = strategy.load(run.store)
    progress.shares = progress.shares or normalize(run.data.weights)
    progress.cursors = progress.cursors or [0] * len(run.data.sizes)
    for state, saved in zip(states, progress.losses):
        if state is not None and saved is not None:
            state.load_state_dict(saved)
    return progress


def _agree_on_saving(accelerator: Accelerator, stopping: list[int], late: bool) -> tuple[bool, bool]:
    """Return two flags: any process was asked to stop; the first one finds a state to be `late`.

    All then do the same, or some would wait for the others forever: clocks differ, and a signal may reach one alone.
    """
    if accelerator.num_processes == 1:
        return bool(stopping), late
    own = [float(len(stopping)), float(late and accelerator.is_main_process)]
    stop, overdue = accelerator.reduce(torch.tensor(own, device=accelerator.device), "sum").tolist()
    return stop > 0, overdue > 0


def _next_batch(run: TrainContext, strategy: Strategy, progress: Progress, step: int) -> Batch:
    """Return the sequences of a step; update the domains' shares, if due, and their cursors in `progress`."""
    recipe, data = run.recipe, run.data
    if recipe.mixture.due(step):
        few = recipe.mixture.sequences
        gaps = strategy.evaluate(lambda: [held_out_distances(run, part[:few]).means() for part in data.held_out])
        perplexities = ([gap[key] for gap in gaps] for key in ("perplexity", "teacher_perplexity"))
        progress.shares = _from_first(run.accelerator, reweight(progress.shares, *perplexities))
    draw_ahead = partial(_draw_batches, run, progress.shares, progress.cursors)
    [(batch, progress.cursors)] = draw_ahead(range(step, step + 1))
    if recipe.on_policy is not None:
        return with_own_text(run, recipe.on_policy, progress, step, draw_ahead)
    return batch


def _draw_batches(
    run: TrainContext, shares: list[float], cursors: list[int], steps: range
) -> list[tuple[Batch, list[int]]]:
    """Return the sequences that steps read if the domains have these shares, and the cursors after each step."""
    recipe, data, batches = run.recipe, run.data, []
    for step in steps:
        counts = quotas(shares, recipe.batch, step, recipe.seed)
        numbers = torch.tensor(draw(cursors, counts, data.sizes, recipe.seed))
        cursors = [cursor + count for cursor, count in zip(cursors, counts, strict=True)]
        batches.append((replace(data.sequences[numbers], numbers=numbers), cursors))
    return batches


def _from_first(accelerator: Accelerator, values: list[float]) -> list[float]:
    """Return the values of the first process: a last bit that differs would be another batch."""
    if accelerator.num_processes == 1:
        return values
    return [float(value) for value in broadcast(torch.tensor(values, dtype=torch.float64, device=accelerator.device))]


def _look(run: TrainContext, strategy: Strategy, progress: Progress) -> dict[str, Any]:
    """Look at the held-out sequences; return the result with the tokens predicted before it, and the shares of several
    domains."""
    result = strategy.evaluate(lambda: evaluate_held_out(run, progress.step))
    names = run.data.names
    shares = {"shares": dict(zip(names, progress.shares, strict=True))} if len(names) > 1 else {}
    return {**result, "tokens": progress.targets, **shares}


def _metrics(run: TrainContext, progress: Progress, loss: float, means: Sequence[float], norm: float) -> dict[str, Any]:
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
