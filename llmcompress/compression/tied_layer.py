"""The linears of tied blocks: a common matrix where the first of its blocks is, and each linear's own term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmcompress.calibration.walk import Block, InputGroup
from llmcompress.compression.job import Job
from llmcompress.compression.layer import layer_of, row_of
from llmcompress.compression.ties import Tied
from llmcompress.methods.layer import Layer, apply, base_and_term
from llmcompress.methods.row_chunks import apply_in_runs
from llmcompress.reporting.report import LayerReport
from llmcompress.weight.encoding import decode
from llmcompress.weight.expression import bits, dense
from llmcompress.weight.modules import PackedWeight, pack_weight
from llmcompress.weight.nodes import Dense, Weight, Zero
from llmcompress.weight.sums import add_to_base


def tied_layers(
    job: Job, block: Block, groups: Sequence[InputGroup], common: Mapping[str, PackedWeight]
) -> tuple[dict[str, PackedWeight], list[LayerReport]]:
    """Compress the linears of input groups that have matrices in common with others, given the `common` ones so far.

    Returns what each stores of its own, and the common matrices that begin here, by name; and the rows of the report.
    """
    found: dict[str, PackedWeight] = {}
    rows = []
    for group in groups:
        for name in (name for name in group.names if name in job.ties):
            tied, layer = job.ties[name], layer_of(job, block, name, group)
            notes: tuple[str, ...] = ()
            if tied.is_first(name):
                start = started(job, tied).to(layer.weight.device)
                fitted = replace(layer, name=tied.name, weight=start, approx=Dense(start.to(torch.bfloat16)))
                base, notes = apply_in_runs(fitted, tied.steps)
                found[tied.name] = pack_weight(base)
            else:
                base = decode(common[tied.name].layout.header, common[tied.name].views())
            own = _own(tied, layer, dense(base))
            found[name] = pack_weight(own)
            rows.append(_row(job, tied, layer, base, own, notes, group))
        group.inputs.derived.clear()
    return found, rows


def started(job: Job, tied: Tied) -> Tensor:
    """Return the common matrix before it is compressed, float32 `[out, in]`: the mean of those it begins with."""
    linears, total = job.arch.linears(), torch.zeros(tied.shape)
    for name in tied.start:
        weight = job.source.read(f"{name}.weight").float()
        total += weight.T if linears[name].transposed else weight
    return total / len(tied.start)


def _own(tied: Tied, layer: Layer, base: Tensor) -> Weight:
    """Return what a linear adds to the common matrix `base [out, in]`: a low-rank term, or nothing."""
    if tied.term is None:
        return Zero(tied.shape)
    lost = layer.weight - base
    done = apply(replace(layer, weight=lost, approx=Dense(torch.zeros_like(lost, dtype=torch.bfloat16))), [tied.term])
    return base_and_term(done.approx)[1] or Zero(tied.shape)


def _row(
    job: Job, tied: Tied, layer: Layer, base: Weight, own: Weight, notes: tuple[str, ...], group: InputGroup
) -> LayerReport:
    """Return the row of the report: the common matrix counts in the first of its linears."""
    whole = add_to_base(base, own)
    stored = whole if tied.is_first(layer.name) else own
    return row_of(job, layer, dense(whole), bits(stored), tied.described(layer.name, stored), notes, group)
