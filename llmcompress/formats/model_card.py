"""The model card: how to load a compressed checkpoint, its size and losses, and the evidence for its quality."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llmcompress.errors import list_names
from llmcompress.models.files.file_names import DISTILLATION_PLOT
from llmcompress.reporting.formatting import code, code_block, plain, plain_cell
from llmcompress.reporting.report import Report
from llmcompress.reporting.tables import (
    CONTROLS,
    Table,
    adapter_table,
    gain_table,
    group_rows,
    loss_sum,
    metrics,
    score_rows,
    size_rows,
    steps_and_tokens,
    worst_domain,
)

Facts = dict[str, Any]  # of a JSON file

LOADER = re.compile(r"AutoModel\w*", re.ASCII)
LOAD = """\
```python
import llmcompress  # install it from its repository; teaches transformers this format
from transformers import {loader}, AutoTokenizer

model = {loader}.from_pretrained({name}{trust})
tokenizer = AutoTokenizer.from_pretrained({name}{trust})
```"""
TRUST = """
The model needs the Python code in this repository, which came with the model that it was made from. Read it before you
trust it: without `trust_remote_code=True` it is not run, and the model does not load.
"""
PIPELINES = {
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModel": "feature-extraction",
}
HUB_MODEL = re.compile(r"[\w.-]+(/[\w.-]+)?")
LICENCE = re.compile(r"[\w.+-]{1,100}")


NO_PLOT = "\nThere is no plot of the layers: matplotlib was not installed where this was published."
NO_CURVE = "\nThere is no plot of it: matplotlib was not installed where it ran."


@dataclass(frozen=True)
class DistillationRecord:
    """A distillation: the report of `distill`, and the recipe as YAML text."""

    report: Facts
    recipe: str


def card(
    report: Report,
    name: str,
    recipe: str,
    scores: Facts | None = None,
    plot: str | None = None,
    taught: DistillationRecord | None = None,
    proof: Evidence | None = None,
    passport: Facts | None = None,
) -> str:
    """Return the README.md of the Hub repository `name`, with metadata that the Hub reads.

    `recipe`: YAML text; `scores`: saved by `score`; `plot`: the picture of the layers beside it; `taught`: the
    distillation that followed; `passport`: results on adapters, saved by `passport --save`.
    """
    from huggingface_hub import ModelCardData

    base = _hub_id(report.base_model)
    relation: Facts = {"base_model_relation": "quantized"} if base else {}
    metadata = ModelCardData(
        license=report.license if report.license and LICENCE.fullmatch(report.license) else None,
        library_name="transformers",
        pipeline_tag=PIPELINES.get(report.auto_class, "text-generation"),
        tags=["llmcompress", *sorted({step for row in report.layers for step in row.steps})],
        base_model=base,
        model_name=name.rpartition("/")[2],
        eval_results=list(_eval_results(scores)) or None,
        **relation,
    )
    title = f"# {plain(name.rpartition('/')[2])}\n"
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n",
        title,
        f"{_link(base)}, compressed by llmcompress from {report.dense_bytes / 1e6:,.1f} MB to "
        f"{report.bytes / 1e6:,.1f} MB{', then distilled' if taught else ''}.\n",
        _load(report, name) + "\n",
        *((TRUST,) if report.trust_remote_code else ()),
        "## Size and quality\n",
        _quality_table(report, scores),
        "\n## What was done\n",
        _layer_table(report),
        f"\n![Output error and bits per weight of every layer]({plot})" if plot else NO_PLOT,
        f"\nRecipe:\n\n{code_block(recipe, 'yaml')}\n",
        *(() if taught is None else _distillation(taught)),
        *(() if passport is None else _adapters(passport)),
        *(() if proof is None else _evidence(proof)),
        "## Limits\n",
        *_limits(report, scores),
    ]
    return "\n".join(parts) + "\n"


def _load(report: Report, name: str) -> str:
    """Return the program that loads the repository `name`."""
    trust = ", trust_remote_code=True" * report.trust_remote_code
    loader = report.auto_class if LOADER.fullmatch(report.auto_class) else "AutoModelForCausalLM"
    return LOAD.format(name=json.dumps(name), trust=trust, loader=loader)


def _hub_id(base: str | None) -> str | None:
    """Return the Hub id of a model; None for anything else."""
    return base if base and HUB_MODEL.fullmatch(base) else None


def _link(base: str | None) -> str:
    return f"[{base}](https://huggingface.co/{base})" if base else "a local checkpoint"


def _eval_results(scores: Facts | None) -> Iterator[Any]:
    from huggingface_hub import EvalResult

    for task, entry in ((scores or {}).get("compressed") or {}).get("tasks", {}).items():
        for metric, value, _ in metrics(entry):
            yield EvalResult(
                task_type="text-generation",
                dataset_type=task,
                dataset_name=task,
                metric_type=metric,
                metric_value=value,
            )


def _quality_table(report: Report, scores: Facts | None) -> str:
    """Return the table of sizes and scores, dense and compressed."""
    rows: list[Sequence[str]] = [*size_rows(report)]
    rows += [] if scores is None else [row[:3] for row in score_rows(scores)]
    return Table(("", "dense", "compressed"), rows).markdown(plain_cell)


def _layer_table(report: Report) -> str:
    """Return the table of layers; those that differ only in numbers share a row."""
    cells = []
    for name, rows in group_rows(report.to_json()["layers"], ("shape", "steps", "stored")):
        errors = [row["error_heldout"] for row in rows if row["error_heldout"] is not None]
        error = f"{sum(errors) / len(errors):.4f}" if errors else ""
        shape, bpw = "x".join(map(str, rows[0]["shape"])), sum(row["bpw"] for row in rows) / len(rows)
        cells.append((name, str(len(rows)), shape, rows[0]["stored"], f"{bpw:.3f}", error))
    return Table(("layers", "", "shape", "stored as", "bpw", "held-out error"), cells).markdown(plain_cell)


def _distillation(taught: DistillationRecord) -> Iterator[str]:
    """Yield the teacher, the text and the gains of a distillation."""
    done = taught.report
    teacher = _link(_hub_id(done["teacher_id"]))
    trained = ", ".join(f"{count:,} {kind}" for kind, count in done["trained"].items())
    sizes = [done[f"bytes_{when}"] for when in ("before", "after")]
    grown = "" if sizes[0] == sizes[1] else f" Compressed weights took {sizes[0]:,} bytes before, {sizes[1]:,} after."
    yield "## Distillation\n"
    losses, cost = plain(loss_sum(done)), _cost(done.get("quantized_teacher"))
    yield (
        f"Taught by {teacher} in {steps_and_tokens(done)} of {_sources(done['data'])}. "
        f"Loss: {losses}. What trained: {trained}.{grown}{cost}\n"
    )
    yield gain_table(done).markdown(plain_cell)
    for name, last in done.get("controls", {}).items():
        if "failed" in last:
            yield f"\nThe control {CONTROLS[name]} failed: {plain(last['failed'])}."
    yield f"\n![Held-out KL and perplexity by tokens]({DISTILLATION_PLOT})" if done["plot"] else NO_CURVE
    yield f"\nRecipe:\n\n{code_block(taught.recipe, 'yaml')}\n"


def _adapters(passport: Facts) -> Iterator[str]:
    """Yield the gains of LoRA adapters of the dense model on this one."""
    yield "## Adapters of the dense model\n"
    yield f"Gains in nats per token of {plain(passport['protocol']['text'])}.\n"
    yield f"{adapter_table(passport).markdown(plain_cell)}\n"


def _evidence(proof: Evidence) -> Iterator[str]:
    """Yield the evidence for the quality."""
    yield "## Evidence\n"
    yield from (f"- {plain(sentence)}." for sentence in proof.findings)
    yield from (f"- Not measured: {plain(name)}." for name in proof.missing)
    yield ""


def _cost(quantized: Facts | None) -> str:
    """Return the sentence on a quantized teacher: its bits, and its distance to the original."""
    if quantized is None:
        return ""
    return (
        f" While it taught, the teacher had its linears in {quantized['bits']} bits, at a KL of {quantized['kl']:.4f} "
        f"nats/token to itself before; the table compares with the latter."
    )


def _sources(data: Facts) -> str:
    """Return the sources of a distillation's text: one, or several domains."""
    return ", ".join(code(text["source"]) for text in data.get("domains", {"text": data}).values())


def _limits(report: Report, scores: Facts | None) -> Iterator[str]:
    """Yield the limits of a checkpoint that a user must know."""
    if report.calibration is None:
        yield "- No calibration text was used."
    else:
        text = report.calibration
        said = f"- Calibrated on {text['tokens']:,} tokens of {code(text['source'])}"
        drawn = text["source"].startswith("random tokens")  # of dataset: random
        yield f"{said}{', no text' if drawn else '; other languages and domains lose more than the table shows'}."
    if report.gates is not None and report.gates.measured:
        yield f"- Gates of its recipe {plain(report.gates.sentence())}."
    fallbacks = Counter(row.fallback for row in report.layers if row.fallback)
    yield from (f"- {count} layers: {plain(what)}." for what, count in fallbacks.items())
    yield from (f"- {plain(warning[0].upper() + warning[1:])}." for warning in report.warnings)
    if scores is None:
        yield "- Nobody has scored this checkpoint yet: neither perplexity nor tasks."
    else:
        yield "- Not measured: safety, bias, instruction following, long context, and every task that is not listed."
    yield "- A layer without a kernel for the device is decoded when it is used, and no faster than a dense one there."


# --- evidence ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """Sentences on measurements, and names of missing ones.

    A compressed model that was compared with nothing looks fine. So the card also has the KL of baseline plans of the
    same size, the differences from the dense model that are beyond noise, the calibration error, the worst kind of
    text, and controls of the distillation.
    """

    findings: tuple[str, ...]
    missing: tuple[str, ...]


def gather_evidence(scores: Facts | None, allocation: Facts | None, distillation: Facts | None) -> Evidence:
    """Return the evidence in a checkpoint's scores, allocation and distillation, each None where there is none."""
    rows = [*_score_evidence(scores), *_plan_evidence(allocation), *_domain_evidence(scores, distillation)]
    rows += _control_evidence(distillation)
    return Evidence(tuple(text for known, text in rows if known), tuple(text for known, text in rows if not known))


def _score_evidence(scores: Facts | None) -> Iterator[tuple[bool, str]]:
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
        names = list_names(beyond, 20) if beyond else "nothing"
        yield True, f"Beyond noise (paired, item by item, at 95 %) it differs from the dense model in: {names}"
    if "calibration_error" not in small:
        yield False, "the calibration error"
        return
    before, after = (one["calibration_error"] for one in (dense, small))
    yield True, f"Its confidence is off by {after:.4f} on average, that of the dense model by {before:.4f}"


def _plan_evidence(allocation: Facts | None) -> Iterator[tuple[bool, str]]:
    if allocation is None:
        return
    baselines = allocation.get("baselines")
    if not baselines:
        yield False, "plans of equal size beside the chosen one"
        return
    others = " and ".join(f"{kl:.4f} for a {name} plan" for name, kl in baselines.items())
    yield True, f"Predicted KL at this size: {allocation['predicted_kl']:.4f} for the plan that was chosen, {others}"


def _domain_evidence(scores: Facts | None, distillation: Facts | None) -> Iterator[tuple[bool, str]]:
    last = distillation["history"][-1] if distillation else {}
    scored = scores["compressed"].get("domains") if scores else None
    for domains, kinds in ((scored, "kinds of text"), (last.get("domains"), "kinds of held-out text")):
        if domains:
            worst = worst_domain(domains)
            yield True, f"Of {len(domains)} {kinds} it is worst on {worst}: KL {domains[worst]['kl']:.4f}"
    if not scored and not last.get("domains"):
        yield False, "quality by kinds of text (llmcompress eval FOLDER --against DENSE --domains TEXTS --save)"


def _control_evidence(distillation: Facts | None) -> Iterator[tuple[bool, str]]:
    if distillation is None:
        return
    if distillation.get("controls"):
        yield True, "Controls of the distillation stand beside its gains"
    else:
        yield False, "controls of the distillation: the same tokens without a teacher, and by forward KL alone"
