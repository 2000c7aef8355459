"""The model card: how to load a compressed checkpoint, its size, its losses, and what nobody measured."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llmcompress.formats.evidence import Evidence
from llmcompress.models.files.file_names import DISTILLATION_PLOT
from llmcompress.reporting.markdown import code, code_block, plain, plain_cell
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
)

LOAD = """\
```python
import llmcompress  # pip install llmcompress; teaches transformers this format
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
class Taught:
    """A distillation as a card tells it: what `distill` reported, and its recipe as YAML text."""

    report: dict[str, Any]
    recipe: str


def card(
    report: Report,
    name: str,
    recipe: str,
    scores: dict[str, Any] | None = None,
    plot: str | None = None,
    taught: Taught | None = None,
    proof: Evidence | None = None,
    passport: dict[str, Any] | None = None,
) -> str:
    """Return the README.md of the Hub repository `name`, with metadata that the Hub reads.

    `recipe` is the YAML text; `scores` what `score` saved of dense and compressed, None if nobody asked; `plot` the
    picture of the layers beside it, None if there is none; `taught` the distillation that followed, if one did;
    `proof` the evidence for its quality; `passport` what `passport --save` kept of adapters.
    """
    from huggingface_hub import ModelCardData

    base = _known(report.base_model)
    relation: dict[str, Any] = {"base_model_relation": "quantized"} if base else {}
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
        f"{_linked(base)}, compressed by llmcompress from {report.dense_bytes / 1e6:,.1f} MB to "
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
    return LOAD.format(name=json.dumps(name), trust=trust, loader=report.auto_class)


def _known(base: str | None) -> str | None:
    """Return the Hub id of a model; None for anything else."""
    return base if base and HUB_MODEL.fullmatch(base) else None


def _linked(base: str | None) -> str:
    return f"[{base}](https://huggingface.co/{base})" if base else "a local checkpoint"


def _eval_results(scores: dict[str, Any] | None) -> Iterator[Any]:
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


def _quality_table(report: Report, scores: dict[str, Any] | None) -> str:
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


def _distillation(taught: Taught) -> Iterator[str]:
    """Yield the teacher, the text and the gains of a distillation."""
    done = taught.report
    teacher = _linked(_known(done["teacher_id"]))
    trained = ", ".join(f"{count:,} {kind}" for kind, count in done["trained"].items())
    sizes = [done[f"bytes_{when}"] for when in ("before", "after")]
    grown = "" if sizes[0] == sizes[1] else f" Compressed weights took {sizes[0]:,} bytes before, {sizes[1]:,} after."
    yield "## Distillation\n"
    losses, cost = plain(loss_sum(done["losses"])), _cost(done.get("quantized_teacher"))
    yield (
        f"Taught by {teacher} in {done['steps']:,} steps on {done['tokens']:,} tokens of {_sources(done['data'])}. "
        f"Loss: {losses}. What trained: {trained}.{grown}{cost}\n"
    )
    yield gain_table(done).markdown(plain_cell)
    for name, last in done.get("controls", {}).items():
        if "failed" in last:
            yield f"\nThe control {CONTROLS[name]} failed: {plain(last['failed'])}."
    yield f"\n![Held-out KL and perplexity by tokens]({DISTILLATION_PLOT})" if done["plot"] else NO_CURVE
    yield f"\nRecipe:\n\n{code_block(taught.recipe, 'yaml')}\n"


def _adapters(passport: dict[str, Any]) -> Iterator[str]:
    """Yield the worth of LoRA adapters of the dense model on this one."""
    yield "## Adapters of the dense model\n"
    yield f"Gains in nats per token of {plain(passport['protocol']['text'])}.\n"
    yield f"{adapter_table(passport).markdown(plain_cell)}\n"


def _evidence(proof: Evidence) -> Iterator[str]:
    """Yield what stands beside the scores, and what was not measured."""
    yield "## Evidence\n"
    yield from (f"- {plain(sentence)}." for sentence in proof.found)
    yield from (f"- Not measured: {plain(name)}." for name in proof.missing)
    yield ""


def _cost(quantized: dict[str, Any] | None) -> str:
    """Return the sentence on a quantized teacher: its bits, and its distance to the original."""
    if quantized is None:
        return ""
    return (
        f" While it taught, the teacher had its linears in {quantized['bits']} bits, at a KL of {quantized['kl']:.4f} "
        f"nats/token to itself before; the table compares with the latter."
    )


def _sources(data: dict[str, Any]) -> str:
    """Return the sources of a distillation's text: one, or several domains."""
    return ", ".join(code(text["source"]) for text in data.get("domains", {"text": data}).values())


def _limits(report: Report, scores: dict[str, Any] | None) -> Iterator[str]:
    """Yield the limits of a checkpoint that a user must know."""
    if report.calibration is None:
        yield "- No calibration text was used."
    else:
        text = report.calibration
        yield (
            f"- Calibrated on {text['tokens']:,} tokens of {code(text['source'])}; other languages and domains lose "
            f"more than the table shows."
        )
    if report.gates is not None and report.gates.measured:
        yield f"- Gates of its recipe {plain(report.gates.sentence())}."
    fallbacks = Counter(row.fallback for row in report.layers if row.fallback)
    yield from (f"- {count} layers: {plain(what)}." for what, count in fallbacks.items())
    yield from (f"- {plain(warning[0].upper() + warning[1:])}." for warning in report.warnings)
    if scores is None:
        yield "- Nobody has scored this checkpoint yet: neither perplexity nor tasks."
    else:
        yield "- Not measured: safety, bias, instruction following, long context, and every task that is not listed."
    yield "- The file is small; a layer is decoded when it is used, so running it is not faster than the dense model."
