"""Tables of results, built once for terminal, Markdown, model card and HTML page; and groups of like layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from llmcompress.reporting.formatting import cell, duration, number, with_error, without_folders

if TYPE_CHECKING:
    from llmcompress.reporting.report import Report

Row = dict[str, Any]
MARKS = {True: "*", False: "", None: "?"}  # is a difference beyond noise?
VERDICTS = {True: "yes", False: "no", None: "?"}
CONTROLS = {"no_teacher": "without a teacher", "vanilla": "by forward KL alone"}  # of a distillation


@dataclass(frozen=True)
class Table:
    """Cells as text. `numbers`: the columns that are flush right; `notes`: sentences below."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()
    notes: Sequence[str] = ()

    def markdown(self, escape: Callable[[str], str] = cell) -> str:
        """Return the table in Markdown, without its notes; `escape`: of the cells."""
        lines = [f"| {' | '.join(map(escape, row))} |" for row in (self.headings, *self.rows)]
        return "\n".join([lines[0], "|---" * len(self.headings) + "|", *lines[1:]])


def comparison_markdown(results: Row) -> str:
    """Return a comparison as Markdown: its two tables, the protocol and the versions."""
    table = comparison_table(results)
    notes = [*table.notes] + [f"{name}: {_settings(results[name])}" for name in ("protocol", "versions")]
    listed = "\n".join(f"- {note.replace('*', chr(92) + '*')}" for note in notes)
    return f"{table.markdown()}\n\n{listed}\n\n{change_table(results).markdown()}\n"


def comparison_table(results: Row) -> Table:
    """Return the scores of a comparison, a row for each model, with notes on the marks."""
    models, first = results["models"], results["models"][0]["model"]
    columns = _task_columns(models[0])
    kinds = len(models[0].get("domains", {}))
    headings = ["model", "bytes", "bpw", "model_bpw", "ECE", "KL", "top-1 agreement"]
    headings += [f"worst KL of {kinds} kinds"] * bool(kinds) + ["perplexity"]
    scored = len(headings) - 1
    headings += [f"{task}: {metric}" for task, metric in columns]
    rows = [_comparison_row(model, columns) for model in models]
    marks = {text[-1] for row in rows for text in row[scored:]}
    notes = [
        f"± standard error · KL in nats/token and top-1 agreement are distances from {first}",
        "ECE: expected calibration error, how far a model's confidence is from how often it is right",
    ]
    if "*" in marks:
        notes.append(f"* differs from {first} beyond noise: paired, item by item, at 95 %")
    if "?" in marks:
        notes.append("? cannot be told from noise: fewer than two items, or no mean over items")
    notes += [f"{model['model']}: {warning}" for model in models for warning in model.get("warnings", ())]
    return Table(headings, rows, range(1, len(headings)), notes)


def _comparison_row(model: Row, columns: Sequence[tuple[str, str]]) -> list[str]:
    """Return the cells of one model, with its scores in the tasks and metrics of `columns`."""
    cells = [model["model"], f"{model['bytes']:,}", number(model["bpw"]), number(model["model_bpw"])]
    cells.append(f"{model['calibration_error']:.4f}")
    cells += [with_error(model[name], model[f"{name}_stderr"]) for name in ("kl", "top1_agreement")]
    if domains := model.get("domains"):
        worst = worst_domain(domains)
        cells.append(f"{with_error(domains[worst]['kl'], domains[worst]['kl_stderr'])} {worst}")
    changes = model["differences"] or {"nll": None, "tasks": {}}
    scores = [(with_error(model["perplexity"], model["perplexity_stderr"], 3), changes["nll"])]
    for task, metric in columns:
        change = changes["tasks"].get(task, {}).get(metric)
        scores.append((_task_cell(model["tasks"].get(task, {}), metric), change))
    if model["differences"] is None:  # the reference
        return cells + [score for score, _ in scores]
    return cells + [score + MARKS[change and change["beyond_noise"]] * (score != "?") for score, change in scores]


def worst_domain(domains: dict[str, Row]) -> str:
    """Return the kind of text with the largest KL to the dense model."""
    return max(domains, key=lambda name: float(domains[name]["kl"]))


def change_table(results: Row) -> Table:
    """Return the difference of every model of a comparison from the first, a row for each score."""
    rows = []
    for model in results["models"][1:]:
        changes = {"log perplexity, nats/token": model["differences"]["nll"]}
        for task, entry in model["differences"]["tasks"].items():
            changes |= {f"{task}: {metric}": change for metric, change in entry.items()}
        for name, change in changes.items():
            value, verdict = with_error(change["value"], change["stderr"]), VERDICTS[change["beyond_noise"]]
            rows.append([model["model"], name, value, str(change["items"]), verdict])
    return Table(("model", "score", "difference", "items", "beyond noise"), rows, (2, 3))


def adapter_table(results: Row) -> Table:
    """Return the adapters of a passport: gains in nats per token on both models, the share that is kept, their KL with
    the adapter, the correlation of gains over tokens, and distinct pairs of tokens that each writes."""
    rows = []
    for row in results["adapters"]:
        kept = "no gain to keep" if row["kept"] is None else f"{row['kept']:.0%} ± {row['kept_stderr']:.0%}"
        pairs = ", ".join(f"{row['distinct'][name]:.2f}" for name in ("dense", "compressed", "handed_over"))
        gains = (f"{row[key]:.4f}" for key in ("gain_dense", "gain"))
        alike = "" if row["alike"] is None else f"{row['alike']:.3f}"
        rows.append([row["adapter"], *gains, kept, f"{row['kl']:.4f}", alike, pairs])
    headings = ("adapter", "gain, dense", "gain here", "kept", "KL between both", "alike", "distinct pairs")
    return Table(headings, rows, range(1, 7))


def size_rows(report: Report) -> list[tuple[str, str, str]]:
    """Return (name, dense, compressed) of bytes and bits per weight; "" for what a mixture of dtypes hides."""
    dense_bits = f"{report.dense_bytes * 8 / report.parameters:.3g}"
    linear_bits = dense_bits if dense_bits in ("16", "32") else ""
    return [
        ("bytes of all weight files", f"{report.dense_bytes:,}", f"{report.bytes:,}"),
        ("bits per weight, compressed linears", linear_bits, f"{report.bpw:.3f}"),
        ("bits per weight, all files", dense_bits, f"{report.model_bpw:.3f}"),
    ]


def score_rows(scores: Row) -> list[tuple[str, ...]]:
    """Return (score, dense, compressed, change) of the scores that `eval --save` wrote."""
    dense, small = scores["dense"], scores["compressed"]
    perplexities = [with_error(side["perplexity"], side.get("perplexity_stderr"), 3) for side in (dense, small)]
    agreement = with_error(small["top1_agreement"], small.get("top1_agreement_stderr"))
    ratio = f"×{small['perplexity'] / dense['perplexity']:.3f}"
    rows: list[tuple[str, ...]] = [
        (f"perplexity on {without_folders(scores['text'])}", *perplexities, ratio),
        ("KL to the dense model, nats/token", "0", with_error(small["kl"], small.get("kl_stderr")), ""),
        ("top-1 agreement with the dense model", "1", agreement, ""),
    ]
    if "calibration_error" in small:  # which older folders lack
        before, after = dense["calibration_error"], small["calibration_error"]
        label = "calibration error: how far confidence is from being right"
        rows.append((label, f"{before:.4f}", f"{after:.4f}", f"{after - before:.4f}"))
    for name, domain in small.get("domains", {}).items():
        kl = with_error(domain["kl"], domain["kl_stderr"])
        rows.append((f"KL to the dense model on {without_folders(name)}", "0", kl, ""))
    for task, entry in small["tasks"].items():
        known = dense["tasks"].get(task, {})  # empty if the tasks failed there
        for metric, value, error in metrics(entry):
            label, change = f"{without_folders(task)}: {metric}", f"{value - known[metric]:+.4f}" if known else ""
            rows.append((label, _task_cell(known, metric), with_error(value, error), change))
    return rows


def gain_table(distillation: Row) -> Table:
    """Return what a distillation gained on held-out text, beside its controls and its teacher."""
    before, after = distillation["history"][0], distillation["history"][-1]
    controls = {CONTROLS[name]: last for name, last in distillation.get("controls", {}).items() if "failed" not in last}
    looks = {"before": before, "after": after, **controls}
    perplexities = [look["perplexity"] for look in looks.values()] + [after["teacher_perplexity"]]
    rows = [
        ("KL to the teacher, nats/token", *(f"{look['kl']:.4f}" for look in looks.values()), "0"),
        ("perplexity", *(f"{value:.3f}" for value in perplexities)),
    ]
    for name in after.get("domains", {}):
        domains = [look["domains"].get(name) if "domains" in look else None for look in looks.values()]
        kls = ("" if domain is None else f"{domain['kl']:.4f}" for domain in domains)
        rows.append((f"KL to the teacher on {without_folders(name)}", *kls, "0"))
    return Table(("on held-out text", *looks, "teacher"), rows, range(1, len(looks) + 2))


def loss_sum(done: Row) -> str:
    """Return the losses of a distillation with their weights, as "forward_kl + 0.5 hidden"."""
    losses = done["losses"].items()
    weights = {name: f"{weight:g}" if isinstance(weight, float) else f"{weight}" for name, weight in losses}
    total = " + ".join(name if weight == "1" else f"{weight} {name}" for name, weight in weights.items())
    return " and ".join(filter(None, ("outputs of each block" if _block_steps(done) else "", total)))


def steps_and_tokens(done: Row) -> str:
    """Return the amount of a distillation's training, as "200 steps of each block and 7 of the whole on 868 tokens"."""
    whole, blocks = done["steps"], _block_steps(done)
    steps = f"{whole:,} steps"
    if blocks:
        steps = f"{blocks:,} steps of each block" + (f" and {whole:,} of the whole" if whole else "")
    counts = pairwise(row["tokens"] for row in done["history"])  # which restart with every phase
    return f"{steps} on {sum(max(0, after - before) for before, after in counts):,} tokens"


def _block_steps(done: Row) -> int:
    """Return the number of steps that a distillation took with each block by itself."""
    return sum(phase["steps"] for phase in done["phases"] if phase["kind"] == "blockwise")


def frontier_markdown(results: Row) -> str:
    """Return the table of a frontier as Markdown."""
    table = frontier_table(results)
    notes = "\n".join(f"- {note}" for note in table.notes)
    return f"{table.markdown()}\n\n{notes}\n"


def frontier_table(results: Row) -> Table:
    """Return a frontier: a row for the dense model, every budget and every peer."""
    dense = results["dense"]
    columns = _task_columns(dense)
    headings = ["recipe", "budget", "bpw", "bytes", "model_bpw", "perplexity", "ratio", "gap", "KL", "top-1 agreement"]
    headings += [f"{task}: {metric}" for task, metric in columns]
    headings += ["predicted KL", "measured KL", "seconds"]
    rows = [["dense", "", *_frontier_cells(dense | {"ratio": 1.0, "gap": 0.0}, columns)]]
    for series in results["series"]:
        rows += [[series["recipe"], point["budget"], *_frontier_cells(point, columns)] for point in series["points"]]
    rows += [[peer["name"], "peer", *_frontier_cells(peer, columns)] for peer in results["peers"]]
    notes = [
        "ratio: perplexity over the dense model's, gap: its logarithm; KL in nats/token",
        "predicted KL: the sum of what the chosen options cost; measured KL: of the finished model on the same tokens",
    ]
    notes += [
        f"prices of {series['recipe']}: {duration(series['pricing_seconds'])}, once for all its budgets"
        for series in results["series"]
    ]
    notes += ["peers: as given, not measured here"] * bool(results["peers"])
    notes.append(f"protocol: {_settings(results['protocol'])}")
    return Table(headings, rows, range(2, len(headings)), notes)


def _frontier_cells(point: Row, columns: Sequence[tuple[str, str]]) -> list[str]:
    """Return the cells of one point; "?" stands for an unknown number."""
    size = point.get("bytes")
    cells = [number(point.get("bpw")), "?" if size is None else f"{size:,}", number(point.get("model_bpw"))]
    cells.append(with_error(point["perplexity"], point.get("perplexity_stderr"), 3))
    cells += [number(point["ratio"]), number(point["gap"])]
    for name in ("kl", "top1_agreement"):
        cells.append("?" if point.get(name) is None else with_error(point[name], point.get(f"{name}_stderr")))
    cells += [_task_cell(point["tasks"].get(task, {}), metric) for task, metric in columns]
    cells += [f"{point[name]:.4f}" if name in point else "" for name in ("predicted_kl", "measured_kl")]
    return [*cells, f"{point['seconds']:.0f}" if "seconds" in point else ""]


def _settings(values: Row) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value not in (None, []))


def _task_columns(model: Row) -> list[tuple[str, str]]:
    """Return (task, metric) of all scores of a model."""
    return [(task, metric) for task, entry in model["tasks"].items() for metric, _, _ in metrics(entry)]


def _task_cell(entry: dict[str, float], metric: str) -> str:
    return next((with_error(value, error) for name, value, error in metrics(entry) if name == metric), "?")


def metrics(entry: dict[str, float]) -> Iterator[tuple[str, float, float | None]]:
    """Yield (metric, value, standard error or None) for each of a task's scores."""
    for metric, value in entry.items():
        name, comma, kind = metric.partition(",")
        if metric != "samples" and not name.endswith("_stderr"):
            yield metric, value, entry.get(f"{name}_stderr{comma}{kind}")


def group_rows(rows: Sequence[Row], same: Sequence[str], every: bool = False) -> Iterator[tuple[str, list[Row]]]:
    """Group rows that agree in `same` and, up to numbers, in name; yield ("layers.*.q_proj", rows) in order.

    With `every`, names must agree in full.
    """
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        name = row["name"] if every else star_numbers(row["name"])
        groups.setdefault((name, *(repr(row[key]) for key in same)), []).append(row)
    for (name, *_), members in groups.items():
        yield (members[0]["name"] if len(members) == 1 else name), members


def merge_sentences(sentences: Iterable[str]) -> list[str]:
    """Merge sentences that differ only in the block's number into one each, with their count."""
    groups: dict[str, list[str]] = {}
    for sentence in sentences:
        groups.setdefault(star_numbers(sentence), []).append(sentence)
    return [same[0] if len(same) == 1 else f"{text} ({len(same)} times)" for text, same in groups.items()]


def star_numbers(name: str) -> str:
    """Return the module path with a star for every number."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
