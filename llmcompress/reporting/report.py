"""The report of a run, layer by layer: the numbers that a checkpoint carries, `inspect` prints and a card quotes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from llmcompress.errors import InputError
from llmcompress.models.files.file_names import ALLOCATION, DISTILLATION, REPORT
from llmcompress.models.files.reading import read_json
from llmcompress.reporting.quality_limits import GateReport
from llmcompress.runtime.json_values import JsonRecord

BLOCK = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class LayerReport:
    """One linear. Errors: relative output errors |(W - W_approx) X|^2 / |W X|^2, on calibration and held-out text;
    those of the weights alone, |W - W_approx|^2 / |W|^2, without calibration. `starved`: the calibration tokens that
    came to it, if it is one of an expert that was given few and so was fitted to others too."""

    name: str
    shape: tuple[int, int]  # (out, in)
    steps: tuple[str, ...]
    bpw: float
    error: float
    error_heldout: float | None
    fallback: str | None  # what had to be done differently than asked, if anything
    stored: str  # the expression, for people
    starved: int | None = None

    @property
    def shown_error(self) -> float:
        """The error on held-out text where it was measured, else that on the calibration."""
        return self.error if self.error_heldout is None else self.error_heldout

    @staticmethod
    def from_json(row: dict[str, Any]) -> LayerReport:
        """The inverse of `dataclasses.asdict`. Raises KeyError or TypeError for a row of another form."""
        return LayerReport(**{**row, "shape": tuple(row["shape"]), "steps": tuple(row["steps"])})


@dataclass(frozen=True)
class Report(JsonRecord):
    """A run. `bpw`: stored bits of the compressed linears / their weights; `model_bpw`: file bits / all parameters."""

    model: str
    revision: str | None
    recipe: str
    dense_bytes: int
    bytes: int
    bpw: float
    model_bpw: float
    parameters: int
    seconds: float
    peak_memory_bytes: int
    calibration: dict[str, Any] | None
    layers: tuple[LayerReport, ...]
    warnings: tuple[str, ...] = ()
    base_model: str | None = None  # a Hub id
    license: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, dict[str, Any]] = field(default_factory=dict)  # how each learned the last time, and what share of
    # its error all times together `left`; where the recipe reconstructs
    fused: tuple[str, ...] = ()  # what was fused into the dense blocks
    run: str = ""  # a digest of all that the compressed weights depend on
    auto_class: str = "AutoModelForCausalLM"  # of transformers, which loads it
    trust_remote_code: bool = False  # the model's own code was run, and is needed to load it
    gates: GateReport | None = None  # its quality beside the recipe's limits; None where these are switched off

    def recounted(
        self,
        layers: Sequence[LayerReport],
        counted: Sequence[LayerReport],
        size: int,
        warnings: Iterable[str],
        gates: GateReport | None,
    ) -> Report:
        """Return the report of what is stored now, in files of `size` bytes, with further warnings. `counted`: those of
        its `layers` whose bits are bits per weight."""
        return replace(
            self,
            bytes=size,
            bpw=sum(row.bpw * prod(row.shape) for row in counted) / sum(prod(row.shape) for row in counted),
            model_bpw=size * 8 / self.parameters,
            layers=tuple(layers),
            warnings=(*self.warnings, *warnings),
            gates=gates,
        )

    @staticmethod
    def from_json(entries: dict[str, Any]) -> Report:
        """The inverse of `to_json`. Raises InputError for entries of another form."""
        try:
            layers = map(LayerReport.from_json, entries["layers"])
            texts = {"warnings": tuple(entries["warnings"]), "fused": tuple(entries.get("fused", ()))}
            gates = None if entries.get("gates") is None else GateReport.from_json(entries["gates"])
            return Report(**{**entries, **texts, "layers": tuple(layers), "gates": gates})
        except (KeyError, TypeError) as error:
            raise InputError(f"{REPORT} is not a report of this version of llmcompress ({error})") from error


def by_kind(report: Report) -> dict[str, list[tuple[int, LayerReport]]]:
    """Group the linears of blocks by what follows the block's number in their names, each as (block, row), in order."""
    kinds: dict[str, list[tuple[int, LayerReport]]] = {}
    for row in report.layers:
        if found := BLOCK.search(row.name):  # a token table is in no block
            kinds.setdefault(row.name[found.end() :], []).append((int(found[1]), row))
    return {kind: sorted(rows, key=lambda entry: entry[0]) for kind, rows in kinds.items()}


def read(folder: str | Path) -> Report:
    """Read the report of a compressed checkpoint.

    Args:
        folder: what `compress`, `distill` or `Result.save` wrote.

    Returns:
        Sizes in bytes, bits per weight, seconds, and steps, bits and errors of every layer.

    Raises:
        InputError: for a folder without a report, or with one that cannot be read.
    """
    try:
        return Report.from_json(read_json(Path(folder) / REPORT))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} holds no {REPORT}, so llmcompress did not write it; give a folder that compress wrote"
        ) from error


def read_distillation(folder: Path) -> dict[str, Any] | None:
    """Return what `distill` reported of a checkpoint; None if it was only compressed. Raises InputError for damage."""
    try:
        return read_json(folder / DISTILLATION) if (folder / DISTILLATION).is_file() else None
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / DISTILLATION} cannot be read ({error}); distil again") from error


def read_allocation(folder: Path) -> dict[str, Any] | None:
    """The price list and the plan of a checkpoint that a target was set for; None for others. Raises InputError for
    damage."""
    try:
        return read_json(folder / ALLOCATION) if (folder / ALLOCATION).is_file() else None
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / ALLOCATION} cannot be read ({error}); compress again") from error


def gathered(folder: Path) -> dict[str, Any]:
    """Return all that the reports of a checkpoint say as plain values: its own, and as `distillation` and `allocation`
    those on its training and on the way to its target, where they are. Raises InputError for damage."""
    more = {"distillation": read_distillation(folder), "allocation": read_allocation(folder)}
    return read(folder).to_json() | {name: part for name, part in more.items() if part is not None}
