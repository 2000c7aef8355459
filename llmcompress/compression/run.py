"""Run a job: from a recipe laid over a dense model to a compressed checkpoint and a report.

    job -> tokens -> walk -> moments -> methods -> expressions -> checkpoint

Each block is written as soon as it is finished, so memory holds one block, whatever the model's depth.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

from llmcompress.calibration.gather import Statistics
from llmcompress.calibration.ranks import own_share
from llmcompress.calibration.walk import Block, Execution, Progress, walk
from llmcompress.compression.block import (
    CompressionState,
    compress_block,
    restore,
    smooth_inputs,
    stored_common_matrices,
)
from llmcompress.compression.job import Job, gradient_importance
from llmcompress.compression.plan import check_memory, plan_of
from llmcompress.compression.result import Result
from llmcompress.compression.run_files import RunFiles, identity_of
from llmcompress.data.calibration import CalibrationTokens
from llmcompress.distillation.reconstruct import BlockTuner
from llmcompress.errors import NumericsError, RecipeError, list_names
from llmcompress.methods.solvers.block_search import can_search
from llmcompress.models.dense.skeleton import auto_name
from llmcompress.reporting.report import TRIAL, Report, pending_gates
from llmcompress.runtime.devices import as_current, device_of
from llmcompress.runtime.facts import versions
from llmcompress.runtime.load import SlowBlocks
from llmcompress.runtime.memory import peak_memory
from llmcompress.runtime.phases import Phases, time_phases
from llmcompress.runtime.precision import fast_float32, product_dtype
from llmcompress.runtime.ranks import ALONE, Ranks

LOG = logging.getLogger("llmcompress")


@fast_float32()
def compress(
    job: Job,
    output: str | Path | None = None,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    resume: bool = True,
    ranks: Ranks = ALONE,
) -> Result:
    """Compress the job's model into the new folder `output`, or a temporary one; `distill:` is left to the pipeline.

    After an error only finished blocks are left, in `<output>.partial`: the same call resumes after them, or starts
    over if `resume` is false. Several processes each compute on their own `device`; the first one reads and writes all
    files but the model's. Raises an LLMCompressError, in one sentence, for whatever is wrong.
    """
    started = time.monotonic()
    place, planned = device_of(device), plan_of(job, ranks.count)
    with ranks.agree_on_errors():
        job.check_rules()
        check_ranks(job, ranks, output)
        check_memory(planned, device, ranks.here)
    temporary = None
    if output is None:
        temporary = tempfile.TemporaryDirectory(prefix="llmcompress-")
        output = Path(temporary.name) / "model"
    output = Path(output)
    kind = device if ranks.count == 1 else ranks.requested_device
    files = RunFiles(job, planned, output, kind, resume, temporary is None)
    with as_current(place), time_phases() as phases, files:
        if (report := ranks.first(files.begin)) is not None:  # an earlier run ended just before this one
            return Result(output, report)
        tokens = ranks.first(lambda: job.tokens)
        identity = identity_of(job, tokens, kind)
        ranks.compare(identity)
        finished = ranks.first(partial(files.open, identity))
        tune = None if job.recipe.reconstruct is None else BlockTuner(job.recipe.reconstruct, ranks)
        run = CompressionState(job, place, tune, 0 if tokens is None else tokens.held_out, list(finished), ranks)
        if finished:
            started -= finished[-1].seconds
            phases.resume(finished[-1].phases)
        _compress_blocks(run, tokens, files, progress, started, phases)
        with ranks.agree_on_errors():
            _check_fallbacks(run)
        report = ranks.first(lambda: _finish(run, tokens, files, len(finished), started, phases))
    return Result(output, report, temporary)


def check_ranks(job: Job, ranks: Ranks, output: Path | str | None) -> None:
    """Raise RecipeError for a job that several processes cannot do together."""
    if ranks.count == 1:
        return
    if job.recipe.tie is not None:
        raise RecipeError(f"{ranks.count} processes do not compress tied blocks; leave tie: out, or start one process")
    if job.recipe.distill is not None:
        raise RecipeError(
            f"{ranks.count} processes compress, but do not train after it; compress without distill:, then start "
            f"llmcompress distill in many"
        )
    if output is None:
        raise RecipeError(f"{ranks.count} processes write one checkpoint; name a folder for it")


def _compress_blocks(
    run: CompressionState,
    tokens: CalibrationTokens | None,
    files: RunFiles,
    progress: Progress | None,
    started: float,
    phases: Phases,
) -> None:
    """Compress every block into the checkpoint; blocks that an earlier run has finished are restored and run."""
    finished = len(run.entries)
    if finished == len(run.job.arch.blocks) + len(run.job.tables):
        return  # their files may be merged already
    if run.job.ties:
        for index in range(min(finished, len(run.job.arch.blocks))):
            run.common |= stored_common_matrices(run, files.tensors(index))
    slow = SlowBlocks()
    for block in _walk_blocks(run, tokens, files, finished, progress):
        if block.index < finished:
            tensors = run.ranks.first(partial(files.tensors, block.index))
            restore(run, block, tensors, last=block.index + 1 == finished)
            continue
        result = compress_block(run, block)
        seconds, peak = time.monotonic() - started, peak_memory()
        run.entries.append(replace(result.entry, seconds=seconds, peak=peak, phases=phases.seconds()))
        run.ranks.first(partial(files.add, run.entries[-1], result.closed, result.pending))
        with run.ranks.agree_on_errors():
            _check_fallbacks(run)
        note = slow.end_block(tuple(row.shape for row in result.entry.rows))
        if note is not None and run.ranks.count == 1:  # other processes of the run are no other work
            LOG.warning(note)


def _walk_blocks(
    run: CompressionState, tokens: CalibrationTokens | None, files: RunFiles, finished: int, progress: Progress | None
) -> Iterator[Block]:
    """Walk over the model; without tokens, the moments are empty."""
    job, recipe, tune = run.job, run.job.recipe, run.tune
    sequences, held_out, importance = None, 0, None
    if tokens is not None:
        sequences, held_out = own_share(tokens.sequences, tokens.held_out, run.ranks)
        importance = gradient_importance(job, sequences, run.device, run.ranks, files.compute_once)
    statistics = Statistics(
        job.needs(),
        recipe.cap,
        recipe.token_weights,
        importance,
        recipe.prefix,
        cross=recipe.asymmetric > 0,
        inputs=job.inputs,
        aim=recipe.asymmetric,
        kv_cache=recipe.kv_cache is not None,
    )
    fuses = recipe.fuse is not None and recipe.fuse.awq
    execution = Execution(
        run.device,
        product_dtype(recipe.compute, run.device),
        batch_size=None if tune is None else tune.recipe.micro_batch,
        ranks=run.ranks,
        progress=progress,
        prepare=partial(smooth_inputs, run) if fuses and (job.inputs or recipe.kv_cache) else None,
    )
    window = 0 if tune is None else tune.recipe.window
    stages = {"held_out": held_out, "window": window, "finished": finished}
    return walk(job.source, job.arch, sequences, statistics, execution, **stages)


def _check_fallbacks(run: CompressionState) -> None:
    """Raise NumericsError if more layers needed a fallback than the recipe allows."""
    layers, share = len(run.job.all_steps), run.job.recipe.gates.max_fallback_layers
    fallbacks = [row for row in run.rows if row.fallback]
    if len(fallbacks) > share * layers:
        raise NumericsError(
            f"{len(fallbacks)} of {layers} layers needed a fallback, {fallbacks[0].name} first "
            f"({fallbacks[0].fallback}), and gates.max_fallback_layers allows a share of {share:g}; calibrate on more "
            f"text, or allow more"
        )


def _finish(
    run: CompressionState,
    tokens: CalibrationTokens | None,
    files: RunFiles,
    before: int,
    started: float,
    phases: Phases,
) -> Report:
    """Write everything outside of the blocks, and return the report; an earlier run had finished `before` blocks."""
    size = files.write_rest(run.layouts, {name: tie.name for name, tie in run.job.ties.items()})
    report = _report(run, tokens, size, time.monotonic() - started)
    warnings = (*files.planned.warnings, *(() if tokens is None else tokens.notes), *_warnings(run, before))
    return files.close(replace(report, warnings=warnings, phases=phases.seconds()))


def _report(run: CompressionState, tokens: CalibrationTokens | None, size: int, seconds: float) -> Report:
    """Return the report of the run, without warnings."""
    job, rows = run.job, run.rows
    linears = [row for row in rows if row.name not in job.tables]
    weights = sum(prod(row.shape) for row in linears)
    processes = {} if run.ranks.count == 1 else {"processes": run.ranks.count}  # that have added up statistics
    return Report(
        model=job.source.public_name,
        revision=job.source.origin.revision,
        recipe=job.recipe.name,
        dense_bytes=job.source.bytes,
        bytes=size,
        bpw=sum(row.bpw * prod(row.shape) for row in linears) / weights,
        model_bpw=size * 8 / job.source.parameters,
        parameters=job.source.parameters,
        seconds=seconds,
        peak_memory_bytes=max([peak_memory(), *(entry.peak for entry in run.entries)]),
        calibration=None if tokens is None else tokens.report() | processes,
        layers=tuple(rows),
        base_model=job.source.origin.base_model,
        license=job.source.license,
        versions=versions(),
        blocks={path: errors for entry in run.entries for path, errors in entry.learned.items()},
        fused=tuple(note for entry in run.entries for note in entry.fused),
        trust_remote_code=bool(job.source.code),
        auto_class=auto_name(job.source.config),
        gates=pending_gates(job.recipe.gates.of_quality, job.ungated),
        trial=job.recipe.trial,
        kv_scales={path: scales for entry in run.entries for path, scales in entry.kv_scales.items()},
    )


def _warnings(run: CompressionState, before: int) -> Iterator[str]:
    """Yield the warnings of the run itself, in a sentence each."""
    if run.job.recipe.trial:
        yield TRIAL
    if run.tune is not None:
        yield "errors of layers are those before their blocks learned, which moves all of a block together"
    if run.job.recipe.kv_cache:
        scaled = sum(bool(entry.kv_scales) for entry in run.entries)
        yield (
            f"kv_cache: {scaled} of {len(run.job.arch.blocks)} blocks have scales, which vLLM alone reads; what is "
            f"measured here keeps keys and values as they are"
        )
    paths = [path for entry in run.entries for path in entry.unweighed]
    if paths:
        yield (
            f"token_weights: {list_names(paths)} of {len(run.job.arch.blocks)} blocks do not tell how much attention "
            f"tokens receive, so all tokens count alike there"
        )
    few = {row.name.rpartition(".")[0]: row.starved for row in run.rows if row.starved is not None}
    if few:
        least = min(few, key=lambda name: few[name])
        yield (
            f"{len(few)} experts were given less than a quarter of the calibration tokens of an average one "
            f"({least}: {few[least]}), so their statistics were filled up with tokens routed elsewhere; calibrate on "
            f"more text"
        )
    if any("trellis" in row.stored for row in run.rows) and not can_search(run.device):
        yield (
            f"trellises were searched on the CPU, not on {run.device}, since that takes an NVIDIA GPU and Triton; if "
            'there is such a GPU, run pip install "llmcompress[gpu]"'
        )
    if before:
        yield f"{before} of {len(run.entries)} blocks and tables are from an earlier run, which was interrupted"
