"""The evidence for a checkpoint's quality: measurements beside its scores, and those that are missing.

A compressed model that was compared with nothing looks fine. So its card names baseline plans of the same size, the
differences from the dense model that are beyond noise, the calibration error, the worst kind of text, and controls of
its distillation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmcompress.errors import list_names
from llmcompress.reporting.tables import worst_domain

Facts = dict[str, Any]


@dataclass(frozen=True)
class Evidence:
    """Sentences on what was measured, and names of what was not."""

    found: tuple[str, ...]
    missing: tuple[str, ...]


def evidence(scores: Facts | None, allocation: Facts | None, distillation: Facts | None) -> Evidence:
    """Return the evidence in a checkpoint's files: its scores, its plan for a target and its distillation, each None
    where there is none."""
    rows = [*_of_scores(scores), *_of_plan(allocation), *_of_kinds(scores, distillation)]
    rows += _of_controls(distillation)
    return Evidence(tuple(text for there, text in rows if there), tuple(text for there, text in rows if not there))


def _of_scores(scores: Facts | None) -> Iterator[tuple[bool, str]]:
    if scores is None:
        yield False, "perplexity, KL and tasks (llmcompress eval FOLDER --against DENSE --save keeps them)"
        return
    dense, small = scores["dense"], scores["compressed"]
    if not small["tasks"]:
        yield False, "tasks"
    changes = scores.get("differences")
    if changes is None:
        yield False, "whether differences from the dense model are beyond noise"
    else:
        beyond = ["perplexity"] if changes["nll"]["beyond_noise"] else []
        for task, entry in changes["tasks"].items():
            beyond += [f"{task} ({metric})" for metric, change in entry.items() if change["beyond_noise"]]
        said = list_names(beyond, 20) if beyond else "nothing"
        yield True, f"Beyond noise (paired, item by item, at 95 %) it differs from the dense model in: {said}"
    if "calibration_error" not in small:
        yield False, "the calibration error"
        return
    before, after = (one["calibration_error"] for one in (dense, small))
    yield True, f"Its confidence is off by {after:.4f} on average, that of the dense model by {before:.4f}"


def _of_plan(allocation: Facts | None) -> Iterator[tuple[bool, str]]:
    if allocation is None:
        return
    baselines = allocation.get("baselines")
    if not baselines:
        yield False, "plans of equal size beside the chosen one"
        return
    others = " and ".join(f"{kl:.4f} for a {name} plan" for name, kl in baselines.items())
    yield True, f"Predicted KL at this size: {allocation['predicted_kl']:.4f} for the plan that was chosen, {others}"


def _of_kinds(scores: Facts | None, distillation: Facts | None) -> Iterator[tuple[bool, str]]:
    last = distillation["history"][-1] if distillation else {}
    scored = scores["compressed"].get("domains") if scores else None
    for domains, kinds in ((scored, "kinds of text"), (last.get("domains"), "kinds of held-out text")):
        if domains:
            worst = worst_domain(domains)
            yield True, f"Of {len(domains)} {kinds} it is worst on {worst}: KL {domains[worst]['kl']:.4f}"
    if not scored and not last.get("domains"):
        yield False, "quality by kinds of text (llmcompress eval FOLDER --against DENSE --domains TEXTS --save)"


def _of_controls(distillation: Facts | None) -> Iterator[tuple[bool, str]]:
    if distillation is None:
        return
    if distillation.get("controls"):
        yield True, "Controls of the distillation stand beside its gains"
    else:
        yield False, "controls of the distillation: the same tokens without a teacher, and by forward KL alone"
