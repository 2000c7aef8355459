"""Cells of tables and Markdown: comparisons, frontiers and groups of layers, for every page that shows them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from llmcompress.reporting.formatting import duration
from llmcompress.reporting.markdown import cell

Row = dict[str, Any]
MARKS = {True: "*", False: "", None: "?"}  # is a difference beyond noise?
CHANGE_HEADINGS = ("model", "score", "difference", "items", "beyond noise")


def comparison_markdown(found: Row) -> str:
    """Return a comparison as Markdown: its two tables, the protocol and the versions."""
    headings, rows, notes = comparison_cells(found)
    notes += [
        f"{name}: " + ", ".join(f"{key} {value}" for key, value in found[name].items() if value not in (None, []))
        for name in ("protocol", "versions")
    ]
    said = [f"- {note.replace('*', chr(92) + '*')}" for note in notes]
    parts = (*markdown_table(headings, rows), "", *said, "", *markdown_table(CHANGE_HEADINGS, change_cells(found)))
    return "\n".join(parts) + "\n"


def comparison_cells(found: Row) -> tuple[list[str], list[list[str]], list[str]]:
    """Return (headings, one row of cells per model, notes on the marks) of a comparison."""
    models, first = found["models"], found["models"][0]["model"]
    columns = [(task, metric) for task, entry in models[0]["tasks"].items() for metric, _, _ in metrics(entry)]
    kinds = len(models[0].get("domains", {}))
    headings = ["model", "bytes", "bpw", "model_bpw", "ECE", "KL", "top-1 agreement"]
    headings += [f"worst KL of {kinds} kinds"] * bool(kinds) + ["perplexity"]
    scored = len(headings) - 1
    headings += [f"{task}: {metric}" for task, metric in columns]
    rows = [_comparison_row(row, columns) for row in models]
    marks = {cell[-1] for row in rows for cell in row[scored:]}
    notes = [
        f"± standard error · KL in nats/token and top-1 agreement are distances from {first}",
        "ECE: expected calibration error, how far a model's confidence is from how often it is right",
    ]
    if "*" in marks:
        notes.append(f"* differs from {first} beyond noise: paired, item by item, at 95 %")
    if "?" in marks:
        notes.append("? cannot be told from noise: fewer than two items, or no mean over items")
    notes += [f"{row['model']}: {warning}" for row in models for warning in row.get("warnings", ())]
    return headings, rows, notes


def _comparison_row(row: Row, columns: Sequence[tuple[str, str]]) -> list[str]:
    """Return the cells of one model, with its scores in the tasks and metrics of `columns`."""
    cells = [row["model"], f"{row['bytes']:,}", number(row["bpw"]), number(row["model_bpw"])]
    cells.append(f"{row['calibration_error']:.4f}")
    cells += [measured(row[name], row[f"{name}_stderr"]) for name in ("kl", "top1_agreement")]
    if domains := row.get("domains"):
        worst = worst_domain(domains)
        cells.append(f"{measured(domains[worst]['kl'], domains[worst]['kl_stderr'])} {worst}")
    changes = row["differences"] or {"nll": None, "tasks": {}}
    scores = [(measured(row["perplexity"], row["perplexity_stderr"], 3), changes["nll"])]
    for task, metric in columns:
        [(value, error)] = [(value, error) for name, value, error in metrics(row["tasks"][task]) if name == metric]
        scores.append((measured(value, error), changes["tasks"].get(task, {}).get(metric)))
    if row["differences"] is None:  # the reference
        return cells + [score for score, _ in scores]
    return cells + [score + MARKS[change and change["beyond_noise"]] for score, change in scores]


def worst_domain(domains: dict[str, Row]) -> str:
    """Return the kind of text on which a model is farthest from the dense one, by KL."""
    return max(domains, key=lambda name: float(domains[name]["kl"]))


def change_cells(found: Row) -> Iterator[list[str]]:
    """Yield the difference of every model from the first in every score, as cells under `CHANGE_HEADINGS`."""
    for row in found["models"][1:]:
        changes = {"log perplexity, nats/token": row["differences"]["nll"]}
        for task, entry in row["differences"]["tasks"].items():
            changes |= {f"{task}: {metric}": change for metric, change in entry.items()}
        for name, change in changes.items():
            value = measured(change["value"], change["stderr"])
            verdict = {True: "yes", False: "no", None: "?"}[change["beyond_noise"]]
            yield [row["model"], name, value, str(change["items"]), verdict]


def passport_cells(row: Row) -> list[str]:
    """Return the cells of one adapter of a passport: gains, the share that is kept, KL, likeness, distinct pairs."""
    kept = "no gain to keep" if row["kept"] is None else f"{row['kept']:.0%} ± {row['kept_stderr']:.0%}"
    pairs = ", ".join(f"{row['distinct'][name]:.2f}" for name in ("dense", "compressed", "handed_over"))
    numbers = (f"{row[key]:.4f}" for key in ("gain_dense", "gain"))
    return [row["adapter"], *numbers, kept, f"{row['kl']:.4f}", f"{row['alike']:.3f}", pairs]


def frontier_markdown(found: Row) -> str:
    """Return the table of a frontier as Markdown."""
    headings, rows, notes = frontier_cells(found)
    return "\n".join((*markdown_table(headings, rows), "", *(f"- {note}" for note in notes))) + "\n"


def frontier_cells(found: Row) -> tuple[list[str], list[list[str]], list[str]]:
    """Return (headings, rows, notes) of a frontier; rows are the dense model, every budget and the peers."""
    dense = found["dense"]
    columns = [(task, metric) for task, entry in dense["tasks"].items() for metric, _, _ in metrics(entry)]
    headings = ["recipe", "budget", "bpw", "bytes", "model_bpw", "perplexity", "ratio", "gap", "KL", "top-1 agreement"]
    headings += [f"{task}: {metric}" for task, metric in columns]
    headings += ["predicted KL", "measured KL", "seconds"]
    rows = [["dense", "", *_frontier_cells(dense | {"ratio": 1.0, "gap": 0.0}, columns)]]
    for series in found["series"]:
        rows += [[series["recipe"], one["budget"], *_frontier_cells(one, columns)] for one in series["points"]]
    rows += [[one["name"], "peer", *_frontier_cells(one, columns)] for one in found["peers"]]
    notes = [
        "ratio: perplexity over the dense model's, gap: its logarithm; KL in nats/token",
        "predicted KL: the sum of what the chosen options cost; measured KL: of the finished model on the same tokens",
    ]
    notes += [
        f"prices of {series['recipe']}: {duration(series['pricing_seconds'])}, once for all its budgets"
        for series in found["series"]
    ]
    notes += ["peers: as given, not measured here"] * bool(found["peers"])
    protocol = ", ".join(f"{key} {value}" for key, value in found["protocol"].items() if value not in (None, []))
    return headings, rows, [*notes, f"protocol: {protocol}"]


def _frontier_cells(one: Row, columns: Sequence[tuple[str, str]]) -> list[str]:
    """Return the cells of one point; "?" stands for an unknown number."""
    size = one.get("bytes")
    cells = [number(one.get("bpw")), "?" if size is None else f"{size:,}", number(one.get("model_bpw"))]
    cells += [measured(one["perplexity"], one.get("perplexity_stderr"), 3), number(one["ratio"]), number(one["gap"])]
    for name in ("kl", "top1_agreement"):
        cells.append("?" if one.get(name) is None else measured(one[name], one.get(f"{name}_stderr")))
    for task, metric in columns:
        cells.append(_task_cell(one["tasks"].get(task, {}), metric))
    cells += [f"{one[name]:.4f}" if name in one else "" for name in ("predicted_kl", "measured_kl")]
    return [*cells, f"{one['seconds']:.0f}" if "seconds" in one else ""]


def _task_cell(entry: dict[str, float], metric: str) -> str:
    return next((measured(value, error) for name, value, error in metrics(entry) if name == metric), "?")


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table in Markdown."""
    yield f"| {' | '.join(map(cell, headings))} |"
    yield "|---" * len(headings) + "|"
    yield from (f"| {' | '.join(map(cell, row))} |" for row in rows)


def metrics(entry: dict[str, float]) -> Iterator[tuple[str, float, float | None]]:
    """Yield (metric, value, standard error or None) for each of a task's scores."""
    for metric, value in entry.items():
        name, comma, kind = metric.partition(",")
        if metric != "samples" and not name.endswith("_stderr"):
            yield metric, value, entry.get(f"{name}_stderr{comma}{kind}")


def measured(value: float, error: float | None, digits: int = 4) -> str:
    """Return a value with its standard error, if it has one, as "3.120 ± 0.045"."""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def grouped(rows: Sequence[Row], same: Sequence[str], every: bool = False) -> Iterator[tuple[str, list[Row]]]:
    """Group rows that agree in `same` and, up to numbers, in name; yield ("layers.*.q_proj", rows) in order.

    With `every`, names must agree in full.
    """
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        name = row["name"] if every else starred(row["name"])
        groups.setdefault((name, *(repr(row[key]) for key in same)), []).append(row)
    for (name, *_), members in groups.items():
        yield (members[0]["name"] if len(members) == 1 else name), members


def summarized(sentences: Iterable[str]) -> list[str]:
    """Merge sentences that differ only in the block's number into one each, with their count."""
    groups: dict[str, list[str]] = {}
    for sentence in sentences:
        groups.setdefault(starred(sentence), []).append(sentence)
    return [same[0] if len(same) == 1 else f"{text} ({len(same)} times)" for text, same in groups.items()]


def starred(name: str) -> str:
    """Return the module path with a star for every number."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def number(value: float | None) -> str:
    """Return a number with three decimals; "?" for None."""
    return "?" if value is None else f"{value:.3f}"
