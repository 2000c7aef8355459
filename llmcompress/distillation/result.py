"""The result of a distillation: what was measured, and the folder with the student's learned weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from math import prod
from typing import Any

from torch import nn

from llmcompress.distillation.context import DistillationJob, TrainContext
from llmcompress.distillation.metrics import term_names
from llmcompress.distillation.phases import PhasesResult, missing_kinds
from llmcompress.distillation.student.folder import StudentFolder
from llmcompress.models.dense.companions import Companions
from llmcompress.models.files import file_names
from llmcompress.models.files.checkpoint import make_checkpoint
from llmcompress.models.files.compressed import check_written
from llmcompress.models.files.identity import binding
from llmcompress.reporting import report as reports
from llmcompress.reporting.plots import distillation_png
from llmcompress.reporting.report import KNOWN_TEXT, GateReport, measured_gates, pending_gates
from llmcompress.runtime.json_values import JsonRecord
from llmcompress.weight.expression import bits, describe
from llmcompress.weight.layout import Layout
from llmcompress.weight.modules import CompressedLinear, Multiplying, base_of, describe_beside_base


@dataclass(frozen=True)
class DistillationResult(JsonRecord):
    """The output and the measurements of a distillation.

    Attributes:
        steps: those end to end; `tokens`: the number predicted in them.
        bytes_before: of all compressed weights; `bytes_after`: with the added low-rank terms.
        trained: how many numbers of each kind.
        history: KL to the teacher and perplexities on the held-out sequences, from before the first step to after the
            last.
        phases: {kind, steps, seconds, frozen: the number of codes that oscillated} of each, and {before, after, step,
            frozen} of every block of a blockwise one: its held-out errors and its best step.
        losses: the weight of each, end to end.
        teacher_id: its Hub id, if it has one.
        plot: the file of its curve, None if matplotlib is missing.
        cache_bias: see `measure_cache_bias`, before and after.
        quantized_teacher: {bits, kl, perplexity} on the held-out sequences, with kl from its dense form.
        controls: the last look of each control at the held-out sequences, or why it failed.
    """

    output: str
    teacher: str
    steps: int
    tokens: int
    seconds: float
    bytes_before: int
    bytes_after: int
    trained: Mapping[str, int]
    data: dict[str, Any]
    history: list[dict[str, Any]]
    phases: list[dict[str, Any]]
    losses: Mapping[str, float | str]
    teacher_id: str | None = None
    plot: str | None = None
    warnings: tuple[str, ...] = ()
    cache_bias: dict[str, dict[str, float]] | None = None
    quantized_teacher: dict[str, float] | None = None
    controls: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def result_of(
    job: DistillationJob, run: TrainContext, learned: PhasesResult, before: Mapping[str, Layout], warnings: list[str]
) -> DistillationResult:
    """Return the result of a job without controls. `before`: the layouts of the student's compressed modules."""
    after = {**before, **{name: layer.layout for name, layer in learned.linears.items()}}
    losses = job.recipe.losses if learned.steps else ()
    return DistillationResult(
        output=str(job.output),
        teacher=job.teacher_place.public_name,
        steps=learned.steps,
        tokens=learned.tokens,
        seconds=learned.seconds,
        bytes_before=sum(layout.bytes() for layout in before.values()),
        bytes_after=sum(layout.bytes() for layout in after.values()),
        trained=learned.trained,
        data=job.data.report,
        history=learned.history,
        phases=learned.phases,
        losses={name: term.weight_in_words() for name, term in zip(term_names(losses), losses, strict=True)},
        teacher_id=job.teacher_place.hub_id,
        plot=file_names.DISTILLATION_PLOT if find_spec("matplotlib") else None,
        warnings=(*warnings, *missing_kinds(learned.trained), *([reports.TRIAL] if job.recipe.trial else [])),
        cache_bias=learned.cache_bias,
        quantized_teacher=run.quantization,
    )


def write_result(
    job: DistillationJob,
    student: StudentFolder,
    companions: Companions,
    learned: PhasesResult,
    recipe: str,
    result: DistillationResult,
) -> None:
    """Write the student's folder with the learned weights in place of its own, and with the measurements."""
    with make_checkpoint(job.output) as writer:
        companions.copy(writer.folder)
        student.store(learned.linears, learned.dense, writer)
        compressed = bool(student.layouts)
        size = writer.close(binding(writer.folder) if compressed else None)
        if (student.folder / file_names.REPORT).is_file():  # not beside what save_pretrained wrote
            report = _recount_report(reports.read(student.folder), learned.linears, size, result)
            report = replace(report, trial=report.trial or job.recipe.trial)
            writer.write(file_names.REPORT, json.dumps(report.to_json(), indent=2))
            writer.write(file_names.RECIPE, (student.folder / file_names.RECIPE).read_text(encoding="utf-8"))
        writer.write(file_names.DISTILLATION_RECIPE, recipe)
        writer.write(file_names.METRICS, (job.store.folder / file_names.METRICS).read_text(encoding="utf-8"))
        entries = result.to_json() | {"output": job.output.name}
        writer.write(file_names.DISTILLATION, json.dumps(entries, indent=2))
        if result.plot is not None:
            (writer.folder / result.plot).write_bytes(distillation_png(result.history))
        if compressed:
            check_written(writer.folder, bool(companions.code))


def _recount_report(
    before: reports.Report, linears: Mapping[str, Multiplying], size: int, result: DistillationResult
) -> reports.Report:
    """Return the student's report, updated to the weights stored now, in files of `size` bytes."""
    warning = "errors of layers are those before the distillation, which moves all together"
    stored = _count_stored(linears)
    rows = [replace(row, **stored[row.name]) if row.name in stored else row for row in before.layers]
    counted = [row for row in rows if row.name in stored]
    gates = None if before.gates is None else _quality(result).judge(before.gates.limits)
    if gates is not None and gates.held is not False and any(w.startswith(KNOWN_TEXT) for w in result.warnings):
        gates = pending_gates(gates.limits, KNOWN_TEXT)  # what misses on text that it knows misses on any other
    return before.recount(rows, counted, size, (warning, *result.warnings), gates)


def _count_stored(linears: Mapping[str, Multiplying]) -> dict[str, dict[str, Any]]:
    """Return the changed entries of rows, by linear. A base that several share counts in the first of them."""
    counted: set[nn.Module] = set()
    entries: dict[str, dict[str, Any]] = {}
    for name, layer in linears.items():
        if isinstance(layer, CompressedLinear):
            base = base_of(layer)
            own = layer.expression() if base is None or base in counted else layer.whole()
            text = describe_beside_base(own) if base is not None and base in counted else describe(own)
            stored = text if layer.layout.inputs is None else f"{text}, {layer.layout.inputs}"
            entries[name] = {"bpw": bits(own) / prod(layer.layout.size), "stored": stored}
            counted.add(base)
    return entries


def _quality(result: DistillationResult) -> GateReport:
    """Return the quality on the held-out text of the distillation."""
    last = result.history[-1]
    gap = math.log(last["perplexity"] / last["teacher_perplexity"])
    return measured_gates(last["kl"], gap, 0, "distillation")
