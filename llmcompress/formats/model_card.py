"""The model card: how to load a compressed checkpoint, its size, its losses, and what nobody measured."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmcompress.formats.evidence import Evidence
from llmcompress.models.files.file_names import DISTILLATION_PLOT
from llmcompress.reporting.markdown import code, fenced, plain
from llmcompress.reporting.report import Report
from llmcompress.reporting.tables import grouped, measured, metrics, passport_cells

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
CONTROL_WORDS = {"no_teacher": "without a teacher", "vanilla": "by forward KL alone"}  # of one table's headings


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
        *_table(report, scores),
        "\n## What was done\n",
        "| layers | | shape | stored as | bpw | held-out error |\n|---|---|---|---|---|---|",
        *_layers(report),
        f"\n![Output error and bits per weight of every layer]({plot})" if plot else NO_PLOT,
        f"\nRecipe:\n\n{fenced(recipe, 'yaml')}\n",
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


def _table(report: Report, scores: dict[str, Any] | None) -> Iterator[str]:
    """Rows: what was counted and measured; columns: dense and compressed."""
    yield "| | dense | compressed |\n|---|---|---|"
    yield f"| bytes of weights | {report.dense_bytes:,} | {report.bytes:,} |"
    yield f"| bits per weight of the decoder's linears | {_bits(report)} | {report.bpw:.3f} |"
    yield f"| bits per weight of the whole file | {_bits(report)} | {report.model_bpw:.3f} |"
    if scores is None:
        return
    dense, compressed = scores["dense"], scores["compressed"]
    perplexities = [measured(one["perplexity"], one.get("perplexity_stderr"), 3) for one in (dense, compressed)]
    yield f"| perplexity ({plain(scores['text'])}) | {' | '.join(perplexities)} |"
    yield f"| KL to the dense model, nats/token | 0 | {measured(compressed['kl'], compressed.get('kl_stderr'))} |"
    agreement = measured(compressed["top1_agreement"], compressed.get("top1_agreement_stderr"))
    yield f"| top-1 agreement with the dense model | 1 | {agreement} |"
    if "calibration_error" in compressed:  # folders that were scored before it was measured have none
        sure = [f"{one['calibration_error']:.4f}" for one in (dense, compressed)]
        yield f"| calibration error: how far confidence is from being right | {' | '.join(sure)} |"
    for name, one in compressed.get("domains", {}).items():
        yield f"| KL to the dense model on {plain(name)} | 0 | {measured(one['kl'], one['kl_stderr'])} |"
    for task, entry in compressed["tasks"].items():
        for (metric, before, error), (_, after, new_error) in zip(metrics(dense["tasks"][task]), metrics(entry)):
            yield f"| {plain(task)}: {plain(metric)} | {measured(before, error)} | {measured(after, new_error)} |"


def _bits(report: Report) -> str:
    return f"{report.dense_bytes * 8 / report.parameters:.3g}"


def _layers(report: Report) -> Iterator[str]:
    for name, rows in grouped(report.to_json()["layers"], ("shape", "steps", "stored")):
        errors = [row["error_heldout"] for row in rows if row["error_heldout"] is not None]
        error = f"{sum(errors) / len(errors):.4f}" if errors else ""
        shape, bpw = "x".join(map(str, rows[0]["shape"])), sum(row["bpw"] for row in rows) / len(rows)
        yield f"| {plain(name)} | {len(rows)} | {shape} | {plain(rows[0]['stored'])} | {bpw:.3f} | {error} |"


def _distillation(taught: Taught) -> Iterator[str]:
    """Yield the teacher, the text and the gains of a distillation."""
    done = taught.report
    teacher = _linked(_known(done["teacher_id"]))
    weights = {name: f"{weight:g}" if isinstance(weight, float) else weight for name, weight in done["losses"].items()}
    losses = " + ".join(plain(name) if weight == "1" else f"{weight} {plain(name)}" for name, weight in weights.items())
    trained = ", ".join(f"{count:,} {kind}" for kind, count in done["trained"].items())
    sizes = [done[f"bytes_{when}"] for when in ("before", "after")]
    grown = "" if sizes[0] == sizes[1] else f" Compressed weights took {sizes[0]:,} bytes before, {sizes[1]:,} after."
    before, after = done["history"][0], done["history"][-1]
    yield "## Distillation\n"
    yield (
        f"Taught by {teacher} in {done['steps']:,} steps on {done['tokens']:,} tokens of {_sources(done['data'])}. "
        f"Loss: {losses}. What trained: {trained}.{grown}{_cost(done.get('quantized_teacher'))}\n"
    )
    yield from _gains(before, after, done.get("controls", {}))
    yield f"\n![Held-out KL and perplexity by tokens]({DISTILLATION_PLOT})" if done["plot"] else NO_CURVE
    yield f"\nRecipe:\n\n{fenced(taught.recipe, 'yaml')}\n"


def _adapters(passport: dict[str, Any]) -> Iterator[str]:
    """Yield what LoRA adapters of the dense model are worth on this one."""
    yield "## Adapters of the dense model\n"
    yield f"Gains in nats per token of {plain(passport['protocol']['text'])}.\n"
    headings = ("adapter", "gain, dense", "gain here", "kept", "KL between both", "alike", "distinct pairs")
    yield f"| {' | '.join(headings)} |\n{'|---' * len(headings)}|"
    yield from (f"| {' | '.join(map(plain, passport_cells(row)))} |" for row in passport["adapters"])
    yield ""


def _evidence(proof: Evidence) -> Iterator[str]:
    """Yield what stands beside the scores, and what was not measured."""
    yield "## Evidence\n"
    yield from (f"- {plain(sentence)}." for sentence in proof.found)
    yield from (f"- Not measured: {plain(name)}." for name in proof.missing)
    yield ""


def _gains(before: dict[str, Any], after: dict[str, Any], controls: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield a table of looks at the held-out text, those of controls among them, and what became of the others."""
    ended = {CONTROL_WORDS[name]: last for name, last in controls.items() if "failed" not in last}
    looks = {"before": before, "after": after, **ended}
    yield f"| on text held out of it | {' | '.join(looks)} | teacher |\n|{'---|' * (len(looks) + 2)}"
    kls = [f"{look['kl']:.4f}" for look in looks.values()]
    perplexities = [look["perplexity"] for look in looks.values()] + [after["teacher_perplexity"]]
    yield f"| KL to the teacher, nats/token | {' | '.join(kls)} | 0 |"
    yield f"| perplexity | {' | '.join(f'{value:.3f}' for value in perplexities)} |"
    for name, last in controls.items():
        if "failed" in last:
            yield f"\nThe control {CONTROL_WORDS[name]} failed: {plain(last['failed'])}."


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
