"""The gates of quality at the end of a run: the finished checkpoint beside its dense model, on held-out calibration.

Both read the same few windows, block by block, the compressed one decoded as it is read; so memory holds a block, the
hidden states and the logits of a window of each. The numbers go into the report of the checkpoint before they are
judged: a run that is interrupted measures when it is asked for again, and one that missed its gates says so again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic

from torch import Tensor

from llmcompress.allocation.allocate import Allocation, choose
from llmcompress.allocation.prices import damage
from llmcompress.compression.job import Job
from llmcompress.compression.memory_estimate import gate_bytes
from llmcompress.compression.plan import unmeasured
from llmcompress.errors import GateError, InputError, MemoryLimitError, RecipeError, format_bytes
from llmcompress.evaluation.distance import distance
from llmcompress.evaluation.logits import Counting, OnDisk, Readable
from llmcompress.models.dense.locate import Place
from llmcompress.models.dense.model import open_source
from llmcompress.models.files.checkpoint import add_file
from llmcompress.models.files.compressed import decoded_source
from llmcompress.models.files.file_names import REPORT
from llmcompress.recipe.target import Target
from llmcompress.reporting import report as reports
from llmcompress.reporting.report import (
    GATE_TOKENS,
    GATE_WINDOW,
    GateReport,
    Report,
    measured_gates,
    pending_gates,
)
from llmcompress.runtime.memory import peak_memory, total_memory
from llmcompress.runtime.ranks import ALONE, Ranks


def judge(
    job: Job,
    folder: Path,
    device: str,
    progress: Counting | None = None,
    plan: Allocation | None = None,
    ranks: Ranks = ALONE,
) -> Report:
    """Measure the job's finished checkpoint in `folder`, unless its report has the numbers already, and write them and
    the job's limits into its report, which is returned. `plan`: how its steps were chosen for a target.

    Several processes share the windows if all of them see the folder; the first one writes. What cannot be measured is
    a warning in the report. Raises DiskError where the folder cannot be written to, and NumericsError for a model that
    computes NaN.
    """
    started, limits = monotonic(), job.recipe.gates.of_quality
    before = ranks.first(lambda: reports.read(folder))
    is_open = _is_open(before.gates, limits)
    found = _measured(job, folder, device, progress, ranks) if is_open else before.gates
    if found is not None and not found.measured and not limits:
        found = None
    if found is not None and found.measured:
        found = found.judge(limits)
        if found.held is False and plan is not None:
            holding = _holding(plan, found)
            found = replace(found, predicted_bytes=None if holding is None else plan.choices.size(holding))
    if found == before.gates:
        return before
    seconds = monotonic() - started if is_open else 0.0
    return ranks.first(lambda: _written(folder, _noted(before, found, seconds)))


def check(report: Report, folder: Path, plan: Allocation | None = None, stays: bool = True) -> None:
    """Raise GateError for a report of a model that missed its gates. `stays`: True if its folder does."""
    gates = report.gates
    if gates is None or gates.held is not False:
        return
    kept = f"{folder} keeps it for a look, and is not to be pushed" if stays else "name an output folder to keep it"
    raise GateError(
        f"the compressed model is outside of its gates: {', '.join(gates.clauses())}, {gates.text_clause()}; {kept}; "
        f"{_advice(gates, plan)}, or give other gates in the recipe (null for none)"
    )


def is_unsettled(folder: Path) -> bool:
    """True if the checkpoint in `folder`, if there is one, has gates that it missed or that are still to be measured on
    the calibration text."""
    try:
        gates = reports.read(folder).gates
    except InputError:  # no checkpoint, or a damaged one: whoever writes there says so
        return False
    return gates is not None and (gates.pending or gates.held is False or gates.text != "calibration")


def gate_windows(held_out: Tensor) -> Tensor:
    """Return the windows `[n, at most GATE_WINDOW]` that are read of held-out sequences `[sequences, length]`."""
    length = min(held_out.shape[1], GATE_WINDOW)
    pieces = held_out[:, : held_out.shape[1] // length * length].reshape(-1, length)
    return pieces[: max(GATE_TOKENS // length, 1)]


def measure(
    dense: Readable, model: Readable, windows: Tensor, blocks: Counting | None = None, ranks: Ranks = ALONE
) -> GateReport:
    """Compare a model with its dense one on `windows [n, length]`; `blocks` receives (blocks, blocks in all) of both.

    Raises what `distance` raises.
    """
    far = distance(dense, model, windows, processes=ranks, blocks=None if blocks is None else _BothModels(blocks))
    return measured_gates(far.kl, far.student.nll - far.teacher.nll, far.student.tokens)


def _is_open(gates: GateReport | None, limits: Mapping[str, float]) -> bool:
    """True if something is to be measured: there are limits, and no numbers of the calibration text yet."""
    return bool(limits) and (gates is None or not gates.measured or gates.text != "calibration")


def _measured(job: Job, folder: Path, device: str, progress: Counting | None, ranks: Ranks) -> GateReport | None:
    """Return the numbers of the checkpoint in `folder`, without limits, or why there are none."""
    windows, reason = ranks.first(lambda: _windows(job, device))
    if windows is None:
        return pending_gates(job.recipe.gates.of_quality, reason)

    def numbers(together: Ranks) -> GateReport | None:
        """Those of the windows that `together` share."""
        try:
            with together.agree_on_errors():
                place = Place(str(folder), folder, trust_remote_code=job.source.trust_remote_code)
                models = OnDisk(open_source(job.source.place), device), OnDisk(decoded_source(place), device)
            return measure(*models, windows, progress, together)
        except (InputError, MemoryLimitError) as error:
            return pending_gates(job.recipe.gates.of_quality, f"that failed ({error})")

    if all(ranks.gather((folder / REPORT).is_file())):
        return numbers(ranks)
    return ranks.first(lambda: numbers(ALONE))


def _windows(job: Job, device: str) -> tuple[Tensor | None, str | None]:
    """Return the windows that both models read; without any, why."""
    reason, tokens = job.ungated or _too_large(job, device), None
    if reason is None and (tokens := job.tokens) is not None and not tokens.held_out:
        reason = "the calibration text is one sequence, and none is held out"
    if reason is not None or tokens is None:
        return None, reason
    return gate_windows(tokens.sequences[tokens.obtained - tokens.held_out :]), None


def _too_large(job: Job, device: str) -> str | None:
    """Return a clause for models whose comparison does not fit into this machine; None for others."""
    needed, there = gate_bytes(job.source, job.arch, job.recipe), total_memory()
    if device != "cpu" or needed <= there:
        return None
    return f"that takes about {format_bytes(needed)}, and this machine has {format_bytes(there)}"


def _written(folder: Path, report: Report) -> Report:
    """Put a report into its folder, and return it."""
    add_file(folder, REPORT, json.dumps(report.to_json(), indent=2))
    return report


def _noted(before: Report, found: GateReport | None, seconds: float) -> Report:
    """Return the report with its gates, and with the time and the memory that they took."""
    warning = None if found is None or found.unmeasured is None else unmeasured(found.unmeasured)
    more = () if warning is None or warning in before.warnings else (warning,)
    peak = max(before.peak_memory_bytes, peak_memory()) if seconds else before.peak_memory_bytes
    told = (*before.warnings, *more)
    return replace(before, gates=found, seconds=before.seconds + seconds, peak_memory_bytes=peak, warnings=told)


def _holding(plan: Allocation, gates: GateReport) -> tuple[int, ...] | None:
    """Return the options of the least size that is predicted to keep the limits; None if none of them does.

    Where the chosen options cost more than was predicted for them, others are taken to do so in the same proportion.
    """
    predicted = damage(plan.prices, plan.chosen)
    limit = wanted_kl(gates) * (min(1.0, predicted / gates.kl) if gates.kl else 1.0)
    try:
        return choose(plan.choices, plan.prices, Target(kl=limit)) if limit > 0 else None
    except RecipeError:
        return None


def wanted_kl(gates: GateReport) -> float:
    """Return the KL at which both limits would be kept, if the logarithm of the ratio grows as the KL does."""
    wanted, ratio = gates.limits.get("kl", math.inf), gates.limits.get("perplexity_ratio")
    if ratio is not None and gates.perplexity_ratio is not None and gates.perplexity_ratio > ratio:
        wanted = min(wanted, math.log(ratio) / math.log(gates.perplexity_ratio) * (gates.kl or 0.0))
    return wanted


def _advice(gates: GateReport, plan: Allocation | None) -> str:
    """Return the clause on how large a model has to be to keep its gates."""
    if plan is None:
        return f"without prices nobody knows the bytes that hold them, and --kl {wanted_kl(gates):.2g} finds them"
    chosen = _holding(plan, gates)
    if chosen is None:
        return "none of its options is predicted to hold them; give options with more bits"
    size, bpw, target = plan.choices.size(chosen), plan.choices.bpw(chosen), plan.job.recipe.target
    if target is not None and target.sparsity is not None:
        share = math.floor((plan.choices.sparsity(chosen) or 0.0) * 1000) / 1000
        return f"--sparsity {share:g} is predicted to hold them"
    if target is not None and target.bpw is not None and bpw is not None:
        return f"{size:,} bytes (--bpw {math.ceil(bpw * 1000) / 1000:g}) are predicted to hold them"
    return f"{size:,} bytes (--size {size}B) are predicted to hold them"


@dataclass(frozen=True)
class _BothModels:
    """A count of the blocks that two models pass one after the other."""

    told: Counting
    passed: list[int] = field(default_factory=list)

    def __call__(self, done: int, total: int) -> None:
        """Report one more block."""
        self.passed.append(done)
        self.told(len(self.passed), 2 * total)
