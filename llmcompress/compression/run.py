"""Run a job: from a recipe laid over a dense model to a compressed checkpoint and a report.

    job -> tokens -> walk -> moments -> methods -> expressions -> checkpoint

Each block is written as soon as it is finished, so memory holds one block, whatever the model's depth.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from llmcompress.calibrate.walk import Block, Progress, walk
from llmcompress.compression.block import CompressionState, compress_block, restore
from llmcompress.compression.journal import Journal, open_journal, run_identity, run_name
from llmcompress.compression.plan import Job, check_memory, warnings
from llmcompress.compression.result import Result
from llmcompress.data.calibration import CalibrationTokens, calibration_tokens
from llmcompress.distill.blockwise.tune import tuner
from llmcompress.errors import DiskError, InputError, NumericsError
from llmcompress.evaluate import report as reports
from llmcompress.evaluate.report import Report
from llmcompress.methods.engines.stream_search import searched_there
from llmcompress.models import file_names
from llmcompress.models.auto_class import auto_name
from llmcompress.models.binding import binding
from llmcompress.models.checkpoint import Writer, publishing
from llmcompress.models.companions import Companions, companions
from llmcompress.models.hf_quantizer import table_entry
from llmcompress.models.staging import check_output, is_ours, locked, remove
from llmcompress.models.written import check_written
from llmcompress.recipe.published import published
from llmcompress.recipe.read import dump
from llmcompress.runtime.devices import device_of
from llmcompress.runtime.memory import peak_memory
from llmcompress.runtime.precision import fast_float32, product_dtype
from llmcompress.runtime.versions import versions
from llmcompress.weight.modules import Layout, payload_texts


@fast_float32()
def compress(
    job: Job,
    output: str | Path | None = None,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    resume: bool = True,
) -> Result:
    """Compress the job's model into the new folder `output`, or a temporary one; `distill:` is left to the pipeline.

    Raises an LLMCompressError, in one sentence, for whatever is wrong. Only finished blocks are left behind then, in
    `<output>.partial`: the same call resumes after them, or starts over if `resume` is false.
    """
    started = time.monotonic()
    place, planned = device_of(device), job.plan
    job.check_rules()
    temporary = None
    if output is None:
        temporary = tempfile.TemporaryDirectory(prefix="llmcompress-")
        output = Path(temporary.name) / "model"
    output = Path(output)
    check_memory(planned, device)
    with locked(output, "output folder") as staging:
        if resume and is_ours(staging) and is_complete(output, job, device):  # the end came just before this one
            remove(staging)
            return Result(output, reports.read(output))
        check_output(output, planned.bytes + planned.bytes // 20)
        _check_rest(job)
        tokens, beside, recipe = _tokens(job), _companions(job), dump(published(job.recipe))
        identity = run_identity(job.source, job.recipe, None if tokens is None else tokens.hash, device)
        with (
            open_journal(staging, identity, resume, last=temporary is None) as journal,
            publishing(staging, output, len(journal.closed())) as writer,
        ):
            tune = None if job.recipe.reconstruct is None else tuner(job.recipe.reconstruct)
            run = CompressionState(job, place, tune, 0 if tokens is None else tokens.held_out, list(journal.found))
            started -= journal.seconds
            _compress_blocks(run, tokens, journal, writer, progress, started)
            _check_gates(run)
            size = _write_rest(job, run.layouts, beside, writer)
            _check_unchanged(job, identity)
            report = _report(run, tokens, journal, size, time.monotonic() - started)
            report = replace(report, run=run_name(identity))
            writer.write(file_names.REPORT, json.dumps(report.to_json(), indent=2))
            writer.write(file_names.RECIPE, recipe)
            check_written(writer.folder, job.source.trust_remote_code)
    return Result(output, report, temporary)


def _companions(job: Job) -> Companions:
    return companions(job.source.folder, job.source.trust_remote_code)


def is_complete(output: Path, job: Job, device: str) -> bool:
    """True if this very job has completed `output` before, but for its distillation; False if nothing is there.

    Raises DiskError for what another job made, and InputError for what none made.
    """
    if not output.is_dir() or not any(output.iterdir()):
        return False
    found = reports.read(output)
    tokens = _tokens(job)
    identity = run_identity(job.source, job.recipe, None if tokens is None else tokens.hash, device)
    if found.run != run_name(identity):
        raise DiskError(
            f"{output} was left by a run with another recipe, model, text, device or version; remove it, or choose "
            f"another output folder"
        )
    return True


def _check_rest(job: Job) -> None:
    """Raise InputError for NaN or Inf in what is not compressed: embeddings, head and last norm."""
    for name in _rest(job):
        if not bool(job.source.read(name).isfinite().all()):
            raise InputError(f"{job.source.name}: {name} holds NaN or Inf; use an undamaged checkpoint")


def _check_unchanged(job: Job, identity: Mapping[str, Any]) -> None:
    """Raise InputError if the model's files are no longer those that the run began with."""
    changed = [what for what, digest in job.source.content().items() if identity[what] != digest]
    if changed:
        raise InputError(
            f"{job.source.name} was replaced while it was compressed ({' and '.join(changed)} changed); start over "
            f"(--no-resume)"
        )


def _compress_blocks(
    run: CompressionState,
    tokens: CalibrationTokens | None,
    journal: Journal,
    writer: Writer,
    progress: Progress | None,
    started: float,
) -> None:
    """Compress every block into the writer's folder; blocks that the journal has found there are restored and run."""
    finished = len(journal.found)
    if finished == len(run.job.arch.blocks) + len(run.job.tables):
        return  # their files may be merged already
    for block in _blocks(run, tokens, finished, progress):
        if block.index < finished:
            restore(run, block, journal.tensors(block.index), last=block.index + 1 == finished)
            continue
        result = compress_block(run, block)
        for tensors in result.closed:
            writer.add(tensors, payload_texts(result.entry.layouts))
        run.entries.append(replace(result.entry, seconds=time.monotonic() - started))
        journal.add(run.entries[-1], result.pending)


def _tokens(job: Job) -> CalibrationTokens | None:
    """Return the calibration tokens; None for a recipe without calibration."""
    config = job.recipe.calibration
    if config is None:
        return None
    source = job.source
    return calibration_tokens(config, source.tokenizer(), source.load, source.config)


def _blocks(
    run: CompressionState, tokens: CalibrationTokens | None, finished: int, progress: Progress | None
) -> Iterator[Block]:
    """Walk over the model; without tokens, the moments are empty."""
    job, recipe = run.job, run.job.recipe
    return walk(
        job.source,
        job.arch,
        None if tokens is None else tokens.sequences,
        held_out=0 if tokens is None else tokens.held_out,
        needs=job.needs(),
        cap=recipe.cap,
        weights=recipe.token_weights,
        prefix=recipe.prefix,
        dense_stream=recipe.asymmetric > 0,
        outputs=run.tune is not None,
        pairs=run.tune is not None and run.tune.window > 1,
        batch_size=None if run.tune is None else run.tune.batch_size,
        device=run.device,
        dtype=product_dtype(recipe.compute, run.device),
        finished=finished,
        progress=progress,
    )


def _write_rest(job: Job, layouts: dict[str, Layout], beside: Companions, writer: Writer) -> int:
    """Write all but the decoder blocks: embeddings, head, config, tokenizer, and other files of the dense folder.

    Returns the bytes of all weights.
    """
    if not writer.mark.is_file():
        writer.add({name: job.source.read(name) for name in _rest(job)})
    config = job.source.config_entries()
    config["quantization_config"] = table_entry(layouts) | {"versions": versions()}
    writer.write("config.json", json.dumps(config, indent=1))
    beside.copy(writer.folder)
    return writer.close(binding(writer.folder))


def _rest(job: Job) -> list[str]:
    """Return the names of the stored tensors that are in no decoder block and not compressed."""
    inside = tuple(f"{layout.path}." for layout in job.arch.blocks)
    tables = {f"{name}.weight" for name in job.tables}
    return [name for name in job.source.tensors if not name.startswith(inside) and name not in tables]


def _check_gates(run: CompressionState) -> None:
    """Raise NumericsError if more layers needed a fallback than the recipe allows."""
    rows = run.rows
    fallbacks = [row for row in rows if row.fallback]
    if len(fallbacks) > run.job.recipe.gates.max_fallback_layers * len(rows):
        raise NumericsError(
            f"{len(fallbacks)} of {len(rows)} layers needed a fallback, {fallbacks[0].name} first "
            f"({fallbacks[0].fallback}); calibrate on more text"
        )


def _report(
    run: CompressionState, tokens: CalibrationTokens | None, journal: Journal, size: int, seconds: float
) -> Report:
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
        calibration=None if tokens is None else tokens.report(),
        layers=tuple(rows),
        warnings=(*warnings(job), *_notes(tokens), *_starved(run), *_searched_elsewhere(run), *_from_before(journal)),
        base_model=job.source.hub_id,
        license=job.source.license,
        versions=versions(),
        blocks=run.learned,
        fused=run.fused,
        trust_remote_code=bool(job.source.code),
        auto_class=auto_name(job.source.config),
    )


def _notes(tokens: CalibrationTokens | None) -> tuple[str, ...]:
    return () if tokens is None else tokens.notes


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
    if searched_there(run.device) or not any("trellis" in row.stored for row in run.rows):
        return ()
    return (
        f"trellises were searched on the CPU, not on {run.device}, since that takes an NVIDIA GPU and Triton; if there "
        'is such a GPU, run pip install "llmcompress[gpu]"',
    )


def _from_before(journal: Journal) -> tuple[str, ...]:
    """Return a sentence if some blocks are those of an earlier run."""
    count = len(journal.found)
    return (
        (f"{count} of {journal.count} blocks and tables are from an earlier run, which was interrupted",)
        if count
        else ()
    )
