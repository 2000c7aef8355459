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

from llmcompress.calibration.ranks import own_share
from llmcompress.calibration.walk import Block, Progress, walk
from llmcompress.compression.block import CompressionState, common_of, compress_block, restore
from llmcompress.compression.importance import importance_of
from llmcompress.compression.job import Job
from llmcompress.compression.plan import check_memory, plan_of
from llmcompress.compression.result import Result
from llmcompress.compression.run_files import Books, identity_of
from llmcompress.data.calibration import CalibrationTokens
from llmcompress.distillation.blockwise.tune import tuner
from llmcompress.errors import NumericsError, RecipeError, list_names
from llmcompress.methods.solvers.stream_search import can_search
from llmcompress.models.dense.skeleton import auto_name
from llmcompress.reporting.report import Report, pending_gates
from llmcompress.runtime.devices import device_of
from llmcompress.runtime.facts import versions
from llmcompress.runtime.load import SlowBlocks
from llmcompress.runtime.memory import peak_memory
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

    Raises an LLMCompressError, in one sentence, for whatever is wrong. Only finished blocks are left behind then, in
    `<output>.partial`: the same call resumes after them, or starts over if `resume` is false. Of several processes,
    each computes on its own `device`, and the first one reads and writes files beside the model's.
    """
    started = time.monotonic()
    place, planned = device_of(device), plan_of(job)
    with ranks.agree_on_errors():
        job.check_rules()
        check_ranks(job, ranks, output)
        check_memory(planned, device, ranks.here)
    temporary = None
    if output is None:
        temporary = tempfile.TemporaryDirectory(prefix="llmcompress-")
        output = Path(temporary.name) / "model"
    output = Path(output)
    asked = device if ranks.count == 1 else ranks.requested_device
    with Books(job, planned, output, asked, resume, last=temporary is None) as books:
        if (report := ranks.first(books.begin)) is not None:  # the end came just before this run
            return Result(output, report)
        tokens = ranks.first(lambda: job.tokens)
        identity = identity_of(job, tokens, asked)
        ranks.compare(identity)
        found = ranks.first(partial(books.open, identity))
        tune = None if job.recipe.reconstruct is None else tuner(job.recipe.reconstruct, ranks)
        run = CompressionState(job, place, tune, 0 if tokens is None else tokens.held_out, list(found), ranks)
        started -= found[-1].seconds if found else 0.0
        _compress_blocks(run, tokens, books, progress, started)
        with ranks.agree_on_errors():
            _check_gates(run)
        report = ranks.first(lambda: _finish(run, tokens, books, len(found), started))
    return Result(output, report, temporary)


def check_ranks(job: Job, ranks: Ranks, output: Path | str | None) -> None:
    """Raise RecipeError for what several processes cannot do together."""
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
    run: CompressionState, tokens: CalibrationTokens | None, books: Books, progress: Progress | None, started: float
) -> None:
    """Compress every block into the checkpoint; blocks that an earlier run has finished are restored and run."""
    finished = len(run.entries)
    if run.job.ties:
        for index in range(min(finished, len(run.job.arch.blocks))):
            run.common |= common_of(run, books.tensors(index))
    if finished == len(run.job.arch.blocks) + len(run.job.tables):
        return  # their files may be merged already
    slow = SlowBlocks()
    for block in _blocks(run, tokens, books, finished, progress):
        if block.index < finished:
            tensors = run.ranks.first(partial(books.tensors, block.index))
            restore(run, block, tensors, last=block.index + 1 == finished)
            continue
        result = compress_block(run, block)
        run.entries.append(replace(result.entry, seconds=time.monotonic() - started))
        run.ranks.first(partial(books.add, result, run.entries[-1]))
        note = slow.end_block(tuple(row.shape for row in result.entry.rows))
        if note is not None and run.ranks.count == 1:  # other processes of the run are no other work
            LOG.warning(note)


def _blocks(
    run: CompressionState, tokens: CalibrationTokens | None, books: Books, finished: int, progress: Progress | None
) -> Iterator[Block]:
    """Walk over the model; without tokens, the moments are empty."""
    job, recipe = run.job, run.job.recipe
    sequences, held_out = (None, 0) if tokens is None else own_share(tokens.sequences, tokens.held_out, run.ranks)
    importance = None if sequences is None else importance_of(job, sequences, run.device, run.ranks, books.kept)
    return walk(
        job.source,
        job.arch,
        sequences,
        held_out=held_out,
        needs=job.needs(),
        cap=recipe.cap,
        weights=recipe.token_weights,
        importance=importance,
        prefix=recipe.prefix,
        dense_stream=recipe.asymmetric > 0,
        outputs=run.tune is not None,
        pairs=run.tune is not None and run.tune.window > 1,
        batch_size=None if run.tune is None else run.tune.batch_size,
        device=run.device,
        dtype=product_dtype(recipe.compute, run.device),
        finished=finished,
        ranks=run.ranks,
        progress=progress,
    )


def _finish(
    run: CompressionState, tokens: CalibrationTokens | None, books: Books, before: int, started: float
) -> Report:
    """Write everything that is no block, and return the report; an earlier run had finished `before` blocks."""
    size = books.write_rest(run.layouts, {name: tied.name for name, tied in run.job.ties.items()})
    found = _report(run, tokens, before, size, time.monotonic() - started)
    return books.close(replace(found, warnings=(*books.planned.warnings, *found.warnings)))


def _check_gates(run: CompressionState) -> None:
    """Raise NumericsError if more layers needed a fallback than the recipe allows."""
    rows = run.rows
    fallbacks = [row for row in rows if row.fallback]
    if len(fallbacks) > run.job.recipe.gates.max_fallback_layers * len(rows):
        raise NumericsError(
            f"{len(fallbacks)} of {len(rows)} layers needed a fallback, {fallbacks[0].name} first "
            f"({fallbacks[0].fallback}); calibrate on more text"
        )


def _report(run: CompressionState, tokens: CalibrationTokens | None, before: int, size: int, seconds: float) -> Report:
    """Return the report of the run, without the warnings of its plan."""
    job, rows = run.job, run.rows
    linears = [row for row in rows if row.name not in job.tables]
    weights = sum(prod(row.shape) for row in linears)
    return Report(
        model=job.source.public_name,
        revision=job.source.revision,
        recipe=job.recipe.name,
        dense_bytes=job.source.bytes,
        bytes=size,
        bpw=sum(row.bpw * prod(row.shape) for row in linears) / weights,
        model_bpw=size * 8 / job.source.parameters,
        parameters=job.source.parameters,
        seconds=seconds,
        peak_memory_bytes=peak_memory(),
        calibration=None if tokens is None else tokens.report() | _shared(run.ranks),
        layers=tuple(rows),
        warnings=(
            *_notes(tokens),
            *_unweighed(run),
            *_starved(run),
            *_searched_elsewhere(run),
            *_from_before(before, len(run.entries)),
        ),
        base_model=job.source.hub_id,
        license=job.source.license,
        versions=versions(),
        blocks=run.learned,
        fused=run.fused,
        trust_remote_code=bool(job.source.code),
        auto_class=auto_name(job.source.config),
        gates=pending_gates(job.recipe.gates.of_quality, job.ungated),
    )


def _shared(ranks: Ranks) -> dict[str, int]:
    """Return how many processes have added up statistics, where that is more than one."""
    return {} if ranks.count == 1 else {"processes": ranks.count}


def _notes(tokens: CalibrationTokens | None) -> tuple[str, ...]:
    return () if tokens is None else tokens.notes


def _unweighed(run: CompressionState) -> tuple[str, ...]:
    """Return a sentence if the tokens of some blocks could not be weighed as the recipe asks."""
    paths = [path for entry in run.entries for path in entry.unweighed]
    if not paths:
        return ()
    return (
        f"token_weights: {list_names(paths)} of {len(run.job.arch.blocks)} blocks do not tell how much attention "
        f"tokens receive, so all tokens count alike there",
    )


def _starved(run: CompressionState) -> tuple[str, ...]:
    """Return a sentence if experts were given few calibration tokens."""
    few = {row.name.rpartition(".")[0]: row.starved for row in run.rows if row.starved is not None}
    if not few:
        return ()
    least = min(few, key=lambda name: few[name])
    return (
        f"{len(few)} experts were given less than a quarter of the calibration tokens of an average one "
        f"({least}: {few[least]}), so they were fitted to what all tokens would give them too; calibrate on more text",
    )


def _searched_elsewhere(run: CompressionState) -> tuple[str, ...]:
    """Return a sentence if trellises were searched on another device than the requested one."""
    if can_search(run.device) or not any("trellis" in row.stored for row in run.rows):
        return ()
    return (
        f"trellises were searched on the CPU, not on {run.device}, since that takes an NVIDIA GPU and Triton; if there "
        'is such a GPU, run pip install "llmcompress[gpu]"',
    )


def _from_before(before: int, count: int) -> tuple[str, ...]:
    """Return a sentence if some blocks are those of an earlier run."""
    if not before:
        return ()
    return (f"{before} of {count} blocks and tables are from an earlier run, which was interrupted",)
