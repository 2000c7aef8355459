"""The gates of quality at the end of a run: the finished checkpoint beside its dense model, on held-out calibration.

Both read the same few windows block by block, the compressed one decoded as it is read. So memory holds a block, the
hidden states, and the logits of a window of each. The numbers go into the checkpoint's report before they are judged:
an interrupted run measures when it is started again, and one that missed its gates says so again.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic

from torch import Tensor

from llmcompress.allocation.allocate import Allocation, choose
from llmcompress.allocation.prices import damage
from llmcompress.compression.job import Job
from llmcompress.compression.memory_estimate import gate_bytes
from llmcompress.compression.plan import unmeasured_warning
from llmcompress.data.calibration import CalibrationTokens
from llmcompress.errors import GateError, InputError, MemoryLimitError, RecipeError, format_bytes
from llmcompress.evaluation.distance import distance
from llmcompress.evaluation.logits import Counting, OnDisk, Readable
from llmcompress.models.dense.locate import Place
from llmcompress.models.dense.model import open_source
from llmcompress.models.files.checkpoint import add_file
from llmcompress.models.files.compressed import decoded_source
from llmcompress.models.files.file_names import REPORT
from llmcompress.recipe.compression import Recipe
from llmcompress.recipe.target import Target
from llmcompress.reporting import report as reports
from llmcompress.reporting.report import GATE_TOKENS, GATE_WINDOW, GateReport, Report, measured_gates, pending_gates
from llmcompress.runtime.memory import peak_memory, total_memory
from llmcompress.runtime.progress import digest_file
from llmcompress.runtime.ranks import ALONE, Ranks


def judge(
    job: Job,
    folder: Path,
    device: str,
    progress: Counting | None = None,
    plan: Allocation | None = None,
    ranks: Ranks = ALONE,
) -> Report:
    """Measure the job's finished checkpoint in `folder` and judge it by the job's limits; return its new report.

    Numbers that the report has already are not measured again. `plan`: how its steps were chosen for a target. Several
    processes share the windows if all of them see the folder; the first one writes. The report has a warning if nothing
    can be measured. Raises DiskError if the folder cannot be written to, NumericsError for a model that computes NaN.
    """
    started, limits = monotonic(), job.recipe.gates.of_quality
    before = ranks.first(lambda: reports.read(folder))
    gates = before.gates
    is_open = bool(limits) and (gates is None or not gates.measured or gates.text not in _gate_texts(job.recipe))
    if is_open:
        gates = _measure_folder(job, folder, device, progress, ranks)
    if gates is not None and not gates.measured and not limits:
        gates = None
    if gates is not None and gates.measured:
        gates = gates.judge(limits)
        if gates.held is False and plan is not None:
            holding = _options_within(plan, gates)
            gates = replace(gates, predicted_bytes=None if holding is None else plan.choices.size(holding))
    if gates == before.gates:
        return before
    seconds = monotonic() - started if is_open else 0.0

    def write() -> Report:
        report = _with_gates(before, gates, seconds)
        add_file(folder, REPORT, json.dumps(report.to_json(), indent=2))
        return report

    return ranks.first(write)


def check_gates(report: Report, folder: Path, plan: Allocation | None = None, stays: bool = True) -> None:
    """Raise GateError for a report of a model that missed its gates. `stays`: True if its folder does."""
    gates = report.gates
    if gates is None or gates.held is not False:
        return
    where = (
        f"it stays in {folder} for inspection, and push refuses it" if stays else "save the error's `result` to keep it"
    )
    raise GateError(
        f"the compressed model is outside of its gates: {', '.join(gates.clauses())}, {gates.text_clause()}; {where}; "
        f"{_advice(gates, plan)}, or give other gates in the recipe (null for none)"
    )


def is_unsettled(folder: Path, recipe: Recipe) -> bool:
    """True if `folder` has a checkpoint with gates that it missed or that are not yet measured on the recipe's text."""
    try:
        gates = reports.read(folder).gates
    except InputError:  # no checkpoint, or a damaged one: whoever writes there says so
        return False
    return gates is not None and (gates.pending or gates.held is False or gates.text not in _gate_texts(recipe))


def _gate_texts(recipe: Recipe) -> set[str]:
    """Return the sections whose held-out text settles gates: the calibration; and the distillation if it reads the same
    data set, and so learns from what the calibration holds out."""
    learned = [] if recipe.distill is None else [text.dataset for text in recipe.distill.texts()]
    overlaps = recipe.calibration is not None and recipe.calibration.dataset in learned
    return {"calibration", "distillation"} if overlaps else {"calibration"}


def gate_windows(tokens: CalibrationTokens) -> Tensor:
    """Return the windows `[n, at most GATE_WINDOW]` to read of the held-out sequences."""
    windows = tokens.held_out_windows(GATE_WINDOW).flatten(0, 1)
    return windows[: max(GATE_TOKENS // windows.shape[1], 1)]


def measure(
    dense: Readable, model: Readable, windows: Tensor, blocks: Counting | None = None, ranks: Ranks = ALONE
) -> GateReport:
    """Compare a model with its dense one on `windows [n, length]`; `blocks` receives (blocks, blocks in all) of both.

    Raises what `distance` raises.
    """
    far = distance(dense, model, windows, processes=ranks, blocks=None if blocks is None else _BothModels(blocks))
    return measured_gates(far.kl, far.student.nll - far.teacher.nll, far.student.tokens)


def _measure_folder(job: Job, folder: Path, device: str, progress: Counting | None, ranks: Ranks) -> GateReport | None:
    """Return the numbers of the checkpoint in `folder`, without limits, or why there are none."""
    windows, reason = ranks.first(lambda: _windows(job, device, ranks.here))
    if windows is None:
        return pending_gates(job.recipe.gates.of_quality, reason)

    def measure_shared(together: Ranks) -> GateReport | None:
        try:
            with together.agree_on_errors():
                place = Place(str(folder), folder, trust_remote_code=job.source.trust_remote_code)
                models = OnDisk(open_source(job.source.place), device), OnDisk(decoded_source(place), device)
            return measure(*models, windows, progress, together)
        except (InputError, MemoryLimitError) as error:
            return pending_gates(job.recipe.gates.of_quality, f"that failed ({error})")

    digests = ranks.gather(digest_file(folder / REPORT) if (folder / REPORT).is_file() else None)
    if len(set(digests)) == 1:  # on a disk that all machines see
        return measure_shared(ranks)
    return ranks.first(lambda: measure_shared(ALONE))


def _windows(job: Job, device: str, processes: int) -> tuple[Tensor | None, str | None]:
    """Return the windows that both models read, or the reason why there are none.

    `processes`: how many of them read on this machine.
    """
    reason, tokens = job.ungated or _too_large(job, device, processes), None
    if reason is None and (tokens := job.tokens) is not None and not tokens.held_out:
        reason = "the calibration text is one sequence, and none is held out"
    if reason is not None or tokens is None:
        return None, reason
    return gate_windows(tokens), None


def _too_large(job: Job, device: str, processes: int) -> str | None:
    """Return a clause if the comparison of both models does not fit into this machine; else None."""
    needed, total = processes * gate_bytes(job), total_memory()
    if device != "cpu" or needed <= total:
        return None
    return f"that takes about {format_bytes(needed)}, and this machine has {format_bytes(total)}"


def _with_gates(before: Report, gates: GateReport | None, seconds: float) -> Report:
    """Return the report with its gates, and with the time and the memory that they took."""
    warning = None if gates is None or gates.unmeasured is None else unmeasured_warning(gates.unmeasured)
    more = () if warning is None or warning in before.warnings else (warning,)
    peak = max(before.peak_memory_bytes, peak_memory()) if seconds else before.peak_memory_bytes
    warnings = (*before.warnings, *more)
    report = replace(before, gates=gates, seconds=before.seconds + seconds, peak_memory_bytes=peak, warnings=warnings)
    return replace(report, phases=report.phases | {"gates": {"host": seconds}}) if seconds else report


def _options_within(plan: Allocation, gates: GateReport) -> tuple[int, ...] | None:
    """Return the options of the least size that is predicted to keep the limits; None if none of them does.

    If the chosen options cost more than predicted, others are taken to do so in the same proportion.
    """
    predicted = damage(plan.prices, plan.chosen)
    limit = wanted_kl(gates) * (min(1.0, predicted / gates.kl) if gates.kl else 1.0)
    try:
        return choose(plan.choices, plan.prices, Target(kl=limit)) if limit > 0 else None
    except RecipeError:
        return None


def wanted_kl(gates: GateReport) -> float:
    """Return the KL that keeps both limits, if the logarithm of the ratio grows as the KL does."""
    wanted, ratio = gates.limits.get("kl", math.inf), gates.limits.get("perplexity_ratio")
    if ratio is not None and gates.perplexity_ratio is not None and gates.perplexity_ratio > ratio:
        wanted = min(wanted, math.log(ratio) / math.log(gates.perplexity_ratio) * (gates.kl or 0.0))
    return wanted


def _advice(gates: GateReport, plan: Allocation | None) -> str:
    """Return a clause on how large a model has to be to keep its gates."""
    if plan is None:
        return f"the size that keeps them is unknown without prices, and --kl {wanted_kl(gates):.2g} finds it"
    chosen = _options_within(plan, gates)
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

    progress: Counting
    passed: list[int] = field(default_factory=list)

    def __call__(self, done: int, total: int) -> None:
        """Report one more block."""
        self.passed.append(done)
        self.progress(len(self.passed), 2 * total)
