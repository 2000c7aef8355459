"""The report of a run: sizes, errors layer by layer, and quality beside the gates, as a checkpoint stores it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from llmcompress.errors import InputError
from llmcompress.models.files.file_names import ALLOCATION, DISTILLATION, REPORT
from llmcompress.models.files.reading import MENDING, read_json
from llmcompress.runtime.json_values import JsonRecord

BLOCK = re.compile(r"(?:^|\.)(\d+)\.")
GATE_TOKENS = 2048  # read for the gates, at most: a few percent of a calibration of 128 sequences
GATE_WINDOW = 256  # tokens in a window of them, at most
TRIAL = "a trial (--quick), on the least text, shows that all works and nothing of the quality"
PENDING = "the run ended before it was measured"
UNGATED = "gates: the distance to the dense model is not measured"
KNOWN_TEXT = "the student learned earlier from held-out text"
# warnings that each command words for its result
SAID_ANEW = ("low-rank terms have ", "rates: the student has no ", KNOWN_TEXT)


@dataclass(frozen=True)
class LayerReport:
    """One linear. Errors are relative, |(W - W_approx) X|^2 / |W X|^2 on calibration and held-out text, and without
    calibration |W - W_approx|^2 / |W|^2. W is the weight that was aimed at: not the dense one with `asymmetric`, or
    where inputs are rounded. `starved`: the calibration tokens of an expert with too few of its own, which was fitted
    to others too."""

    name: str
    shape: tuple[int, int]  # (out, in)
    steps: tuple[str, ...]
    bpw: float
    error: float
    error_heldout: float | None
    fallback: str | None  # what was done in place of a step that failed
    stored: str  # the expression, for people
    starved: int | None = None

    @property
    def shown_error(self) -> float:
        """The error on held-out text, or on the calibration where that was not measured."""
        return self.error if self.error_heldout is None else self.error_heldout

    @staticmethod
    def from_json(row: dict[str, Any]) -> LayerReport:
        """Return the inverse of `dataclasses.asdict`. Raises KeyError or TypeError for a row of another form."""
        return LayerReport(**{**row, "shape": tuple(row["shape"]), "steps": tuple(row["steps"])})


@dataclass(frozen=True)
class GateReport:
    """The quality of a finished model beside the limits of its recipe.

    `limits`, by name: of `kl`, in nats per token, and of `perplexity_ratio`, the perplexity over the dense model's.
    `held`: True if both are within their limits; None if nothing was measured, for the reason `unmeasured`. `tokens`:
    predicted tokens of held-out `text`, 0 if unknown. `predicted_bytes`: the predicted least size within the limits,
    where prices are known.
    """

    limits: Mapping[str, float]
    kl: float | None = None
    perplexity_ratio: float | None = None
    tokens: int = 0
    text: str = "calibration"
    held: bool | None = None
    unmeasured: str | None = None
    predicted_bytes: int | None = None

    @property
    def measured(self) -> dict[str, float]:
        """The measured numbers, by name."""
        numbers = {"kl": self.kl, "perplexity_ratio": self.perplexity_ratio}
        return {name: value for name, value in numbers.items() if value is not None}

    @property
    def pending(self) -> bool:
        """True if it is still to be measured."""
        return self.unmeasured == PENDING

    def judge(self, limits: Mapping[str, float]) -> GateReport:
        """Return the measured numbers beside these limits."""
        missed = any(value > limits.get(name, math.inf) for name, value in self.measured.items())
        return replace(
            self, limits=dict(limits), held=not missed if self.measured and limits else None, predicted_bytes=None
        )

    def clauses(self) -> list[str]:
        """Return a clause for each measured number, with its limit."""
        words = {"kl": "KL {:.4g} nats per token", "perplexity_ratio": "perplexity {:.4g} times the dense model's"}
        return [
            words[name].format(value) + (f" (at most {self.limits[name]:g})" if name in self.limits else "")
            for name, value in self.measured.items()
        ]

    def text_clause(self) -> str:
        """Return a clause on the text."""
        return f"on {f'{self.tokens:,} tokens' if self.tokens else 'text'} held out of the {self.text}"

    def sentence(self) -> str:
        """Return the verdict, the numbers and the text as one sentence."""
        if self.unmeasured is not None:
            return f"not measured: {self.unmeasured}"
        verdict = "off" if not self.limits else "held" if self.held else "missed"
        return f"{verdict}: {', '.join(self.clauses())}, {self.text_clause()}"


def pending_gates(limits: Mapping[str, float], unmeasured: str | None = None) -> GateReport | None:
    """Return the report before anything is measured; None without limits. `unmeasured`: why nothing will be."""
    return GateReport(dict(limits), unmeasured=unmeasured or PENDING) if limits else None


def measured_gates(kl: float, gap: float, tokens: int, text: str = "calibration") -> GateReport:
    """Return a report without limits. `gap`: the logarithm of the ratio of perplexities."""
    return GateReport({}, kl, math.exp(min(gap, 700.0)), tokens, text)


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
    blocks: dict[str, dict[str, Any]] = field(default_factory=dict)  # of a recipe that reconstructs: the last training
    # of each, and the share of its error that all of them `left`
    fused: tuple[str, ...] = ()  # into the dense blocks
    phases: dict[str, dict[str, float]] = field(default_factory=dict)  # seconds on `host` and `device` by phase
    run: str = ""  # a digest of everything that determines the compressed weights
    auto_class: str = "AutoModelForCausalLM"  # of transformers, that loads it
    trust_remote_code: bool = False  # the model's own code was run, and is needed to load it
    gates: GateReport | None = None  # None where the recipe switches them off
    trial: bool = False  # True if it was to show that all works, on the least text
    kv_scales: dict[str, list[float]] = field(default_factory=dict)  # of keys and values in FP8, by path of attention

    def recount(
        self,
        layers: Sequence[LayerReport],
        counted: Sequence[LayerReport],
        size: int,
        warnings: Iterable[str],
        gates: GateReport | None,
    ) -> Report:
        """Return the report with new layers, in files of `size` bytes, and further warnings.

        `counted`: the layers that count for `bpw`. What earlier commands said of terms, rates and gates goes.
        """
        judged = gates is not None and gates.unmeasured is None
        gone = (*SAID_ANEW, UNGATED) if judged else SAID_ANEW
        earlier = [warning for warning in self.warnings if not warning.startswith(gone)]
        return replace(
            self,
            bytes=size,
            bpw=sum(row.bpw * prod(row.shape) for row in counted) / sum(prod(row.shape) for row in counted),
            model_bpw=size * 8 / self.parameters,
            layers=tuple(layers),
            warnings=tuple(dict.fromkeys((*earlier, *warnings))),
            gates=gates,
        )

    @staticmethod
    def from_json(entries: dict[str, Any]) -> Report:
        """Return the inverse of `to_json`. Raises InputError for entries of another form."""
        try:
            layers = map(LayerReport.from_json, entries["layers"])
            texts = {"warnings": tuple(entries["warnings"]), "fused": tuple(entries.get("fused", ()))}
            gates = None if entries.get("gates") is None else GateReport(**entries["gates"])
            return Report(**{**entries, **texts, "layers": tuple(layers), "gates": gates})
        except (KeyError, TypeError) as error:
            raise InputError(f"{REPORT} is not a report of this version of llmcompress ({error})") from error


def group_by_kind(report: Report) -> dict[str, list[tuple[int, LayerReport]]]:
    """Return the linears of blocks as (block, row), in order, by their names within the block."""
    kinds: dict[str, list[tuple[int, LayerReport]]] = {}
    for row in report.layers:
        if match := BLOCK.search(row.name):  # a token table is in no block
            kinds.setdefault(row.name[match.end() :], []).append((int(match[1]), row))
    return {kind: sorted(rows, key=lambda entry: entry[0]) for kind, rows in kinds.items()}


def read(folder: str | Path) -> Report:
    """Read the report of a compressed checkpoint.

    Args:
        folder: a checkpoint of `compress`, `distill` or `Result.save`.

    Returns:
        Sizes in bytes, bits per weight, seconds, and steps, bits and errors of every layer.

    Raises:
        InputError: for a folder without a report, or with one that cannot be read.
    """
    try:
        return Report.from_json(read_json(Path(folder).expanduser() / REPORT))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} holds no {REPORT}, so llmcompress did not write it; give a folder that compress wrote"
        ) from error


def read_distillation(folder: Path) -> dict[str, Any] | None:
    """Return the report of `distill`; None for a checkpoint that was only compressed. Raises InputError for damage."""
    return read_optional(folder / DISTILLATION)


def read_allocation(folder: Path) -> dict[str, Any] | None:
    """Return the prices and the plan of a checkpoint with a target; None for others. Raises InputError for damage."""
    return read_optional(folder / ALLOCATION)


def read_optional(path: Path) -> dict[str, Any] | None:
    """Return the entries of a checkpoint's JSON file; None without one. Raises InputError for a damaged file."""
    try:
        return read_json(path) if path.is_file() else None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {error}); {MENDING}") from error


def read_all(folder: Path) -> dict[str, Any]:
    """Return the report of a checkpoint as plain values, with those on its `distillation` and `allocation`, if any.

    Raises InputError for damage.
    """
    more = {"distillation": read_distillation(folder), "allocation": read_allocation(folder)}
    return read(folder).to_json() | {name: part for name, part in more.items() if part is not None}
