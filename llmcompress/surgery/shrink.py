"""Smaller sizes of one compressed checkpoint: its low-rank terms keep their first components only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from llmcompress.distillation.student.folder import CompressedStudent
from llmcompress.errors import RecipeError
from llmcompress.models.dense.companions import companions
from llmcompress.models.files import file_names
from llmcompress.models.files.checkpoint import write_checkpoint
from llmcompress.models.files.compressed import CompressedCheckpoint, check_written, locate_size
from llmcompress.models.files.identity import binding
from llmcompress.reporting import report as reports
from llmcompress.reporting.report import pending_gates
from llmcompress.runtime.json_values import JsonRecord
from llmcompress.runtime.progress import count_each
from llmcompress.weight.expression import bits, describe
from llmcompress.weight.modules import CompressedLinear
from llmcompress.weight.nodes import Weight


@dataclass(frozen=True)
class ShrinkReport(JsonRecord):
    """The checkpoint that was written. `terms`: low-rank terms that lost components; bytes count the weights."""

    output: str
    rank: int
    terms: int
    bytes_before: int
    bytes_after: int
    bpw_before: float
    bpw_after: float


def shrink(folder: str | Path, rank: int, output: str | Path, *, trust_remote_code: bool = False) -> ShrinkReport:
    """Write a compressed checkpoint with the first `rank` components of its low-rank terms, at most.

    Its scores, distillation and allocation are of another size and are not copied. Of a checkpoint that `distill`
    made with `nested` sizes, only the files that hold these components are read, or downloaded.

    Args:
        folder: a checkpoint of compress or distill, or its Hub id.
        rank: components that stay, of all terms of a matrix together; 0 leaves the terms out.
        output: a new or empty folder.
        trust_remote_code: True to run the Python code that the model brings along, if transformers lacks its class.

    Returns:
        The folder, and the bytes and bits per weight before and after.

    Raises:
        InputError: for a model that compress did not write.
        RecipeError: for a rank that leaves nothing of a matrix, or takes nothing away, and for tied blocks.
        DiskError: for an output that cannot be written; then nothing is left behind.
    """
    if rank < 0:
        raise RecipeError(f"a rank of {rank} is none; give 0, which leaves low-rank terms out, or more")
    source, target = locate_size(folder, rank, trust_remote_code).folder, Path(output)
    before, opened = reports.read(source), CompressedCheckpoint(source, trust_remote_code, rank)
    smaller: dict[str, Weight] = {}
    linears: dict[str, CompressedLinear] = {}
    for name in count_each(opened.layouts, "matrix read"):
        weight = opened.expression(name)
        linear = CompressedLinear.of(weight, inputs=opened.layouts[name].inputs)
        if linear.layout.bytes() < opened.whole[name].bytes():
            smaller[name] = weight
        if linear.layout.text != opened.layouts[name].text:  # which may have its tensors in another order, too
            linears[name] = linear
    if not smaller:
        raise RecipeError(f"{folder} has no low-rank term of more than rank {rank}, so there is nothing to take away")
    beside = companions(source, trust_remote_code)
    with write_checkpoint(target, opened.bytes) as writer:
        beside.copy(writer.folder)
        CompressedStudent(opened).store(linears, {}, writer)
        size = writer.close(binding(writer.folder))
        after = _recount(before, smaller, rank, size)
        writer.write(file_names.REPORT, json.dumps(after.to_json(), indent=2))
        writer.write(file_names.RECIPE, (source / file_names.RECIPE).read_text(encoding="utf-8"))
        check_written(writer.folder, bool(beside.code))
    return ShrinkReport(str(target), rank, len(smaller), before.bytes, size, before.bpw, after.bpw)


def _recount(before: reports.Report, smaller: Mapping[str, Weight], rank: int, size: int) -> reports.Report:
    """Return the report with the sizes of the `smaller` weights, in files of `size` bytes."""
    rows = []
    for row in before.layers:
        if row.name in smaller:
            weight = smaller[row.name]
            row = replace(row, bpw=bits(weight) / prod(row.shape), stored=describe(weight))
        rows.append(row)
    counted = [row for row in rows if reports.BLOCK.search(row.name)]  # a token table is in no block
    warning = f"low-rank terms have {rank} components at most; errors of layers are those before that"
    gates = before.gates
    if gates is not None and gates.held is not False:  # what the whole missed, a part of it misses
        gates = pending_gates(gates.limits, f"its terms were cut to rank {rank}")
    return before.recount(rows, counted, size, (warning,), gates)
