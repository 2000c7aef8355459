"""Plans, reports and scores as people read them on a terminal; every view takes the object that `--json` prints."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llmcompress.evaluate.formatting import duration

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Row = dict[str, Any]
MARKS = {True: "*", False: "", None: "?"}  # is a difference beyond noise?
CHANGE_HEADINGS = ("model", "score", "difference", "items", "beyond noise")


def plan_view(plan: Row, every: bool) -> Iterator[RenderableType]:
    """What would happen to each layer, and the sizes. Layers that only differ in the block's number share a line."""
    yield f"plan    {plan['recipe']} on {plan['model']}"
    table = _table(("layers", "", "shape", "steps", "bpw", "stored as"), right=(1, 4))
    for name, rows in grouped(plan["layers"], ("shape", "steps", "bits"), every):
        row = rows[0]
        table.add_row(name, _times(rows), _shape(row), _steps(row), f"{row['bpw']:.3f}", row["description"])
    yield table
    yield f"sizes   {_sizes(plan)}"
    yield f"needs   about {_bytes(plan['peak_memory_bytes'])} of memory and {duration(plan['seconds'])}"
    if (blocks := plan["reconstruction"]) is not None:
        rates = ", ".join(f"{kind} at {rate:g}" for kind, rate in blocks["rates"].items())
        steps = "a pass over the text" if blocks["steps"] is None else f"{blocks['steps']} steps"
        window = "" if blocks["window"] == 1 else f" in windows of {blocks['window']}"
        yield f"learns  every block{window}, {steps} each time: {rates}; that comes on top"
    if (then := plan["distillation"]) is not None:
        yield f"then    distillation {then['name']}: {_asked(then)}; that comes on top"


def report_view(report: Row, every: bool) -> Iterator[RenderableType]:
    """What was done to each layer and how well it went, then the sizes, the text and the cost."""
    from statistics import median  # here, since it takes longer to import than typer parses

    yield f"recipe  {report['recipe']} on {report['model']}" + (f" at {report['revision']}" * bool(report["revision"]))
    headings = ("layers", "", "shape", "steps", "bpw", "error", "held out", "worst", "stored as")
    table = _table(headings, right=(1, 4, 5, 6, 7))
    for name, rows in grouped(report["layers"], ("shape", "steps"), every):
        fitted, unseen = [row["error"] for row in rows], [row["error_heldout"] for row in rows]
        seen = [value for value in unseen if value is not None]
        bpw = sum(row["bpw"] for row in rows) / len(rows)
        held_out, worst = (f"{median(seen):.4f}", f"{max(seen):.4f}") if seen else ("", f"{max(fitted):.4f}")
        cells = (f"{bpw:.3f}", f"{median(fitted):.4f}", held_out, worst)
        table.add_row(name, _times(rows), _shape(rows[0]), _steps(rows[0]), *cells, _stored(rows))
    yield table
    yield f"sizes   {_sizes(report)}"
    if (text := report["calibration"]) is not None:
        yield f"data    {text['source']} · {text['tokens']:,} tokens · sha256 {text['hash'][:12]}…"
    else:
        yield "data    none: errors are those of the weights, not of what layers make of their inputs"
    fallbacks = [row for row in report["layers"] if row["fallback"]]
    yield from (f"note    {row['name']}: {row['fallback']}" for row in fallbacks)
    if blocks := list(report["blocks"].values()):
        error = median(block["after"] for block in blocks)
        said = [f"blocks  {len(blocks)} reconstructed", f"error {error:.4f} in the median"]
        if left := [block["left"] for block in blocks if "left" in block]:  # which older reports lack
            said.append(f"x{median(left):.3f} by learning")
            said += [f"nothing helped {left.count(1)}"] if 1 in left else []
        yield " · ".join(said)
    yield f"cost    {duration(report['seconds'])} · {_bytes(report['peak_memory_bytes'])} of memory at the peak"
    if "allocation" in report:
        yield _reached(report["allocation"])
    if "distillation" in report:
        yield ""
        yield from distilled_view(report["distillation"], every)


def _stored(rows: Sequence[Row]) -> str:
    """The form that most of the rows have, and how many have another."""
    (form, count), *others = Counter(row["stored"] for row in rows).most_common()
    return f"{form}, {len(rows) - count} otherwise" if others else form


def _reached(allocation: Row) -> str:
    """A target, and how far off its prediction was."""
    [(aim, value)] = allocation["target"].items()
    wanted = _bytes(value) if aim == "bytes" else f"{value:g} {aim}"
    kl = f"KL predicted {allocation['predicted_kl']:.4f}, measured {allocation['measured_kl']:.4f}"
    return f"target  {wanted} · {kl} on {allocation['probing_tokens']} tokens · {duration(allocation['seconds'])}"


def score_view(scores: Row, every: bool) -> Iterator[RenderableType]:
    """A model's quality beside its size."""
    yield f"size    {_bytes(scores['bytes'])} · {_number(scores['bpw'])} bpw · model_bpw {_number(scores['model_bpw'])}"
    perplexity = measured(scores["perplexity"], scores["perplexity_stderr"], 3)
    yield f"text    perplexity {perplexity} over {scores['tokens']:,} tokens"
    if scores["kl"] is not None:
        kl = measured(scores["kl"], scores["kl_stderr"])
        agreement = measured(scores["top1_agreement"], scores["top1_agreement_stderr"])
        yield f"dense   KL {kl} nats/token · top-1 agreement {agreement}"
    if scores["tasks"]:
        table = _table(("task", "metric", "value", "items"), right=(2, 3))
        for task, entry in scores["tasks"].items():
            for metric, value, error in metrics(entry):
                table.add_row(task, metric, measured(value, error), f"{entry.get('samples', '')}")
        yield table


def comparison_view(found: Row, every: bool) -> Iterator[RenderableType]:
    """Models as rows, scores as columns; and every difference."""
    headings, rows, notes = comparison_cells(found)
    table = _table(headings, right=range(1, len(headings)))
    for row in rows:
        table.add_row(*row)
    yield table
    yield from notes
    if every:
        table = _table(CHANGE_HEADINGS, right=(2, 3))
        for row in _changes(found):
            table.add_row(*row)
        yield table


def comparison_markdown(found: Row) -> str:
    """The tables of `comparison_view` as Markdown, with the protocol and the versions."""
    headings, rows, notes = comparison_cells(found)
    notes += [
        f"{name}: " + ", ".join(f"{key} {value}" for key, value in found[name].items() if value not in (None, []))
        for name in ("protocol", "versions")
    ]
    said = [f"- {note.replace('*', chr(92) + '*')}" for note in notes]
    parts = (*_markdown(headings, rows), "", *said, "", *_markdown(CHANGE_HEADINGS, _changes(found)))
    return "\n".join(parts) + "\n"


def _markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a table."""
    yield f"| {' | '.join(headings)} |"
    yield "|---" * len(headings) + "|"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _changes(found: Row) -> Iterator[list[str]]:
    """What the models differ in from the first: cells for `CHANGE_HEADINGS`."""
    for row in found["models"][1:]:
        changes = {"log perplexity, nats/token": row["differences"]["nll"]}
        for task, entry in row["differences"]["tasks"].items():
            changes |= {f"{task}: {metric}": change for metric, change in entry.items()}
        for name, change in changes.items():
            value = measured(change["value"], change["stderr"])
            verdict = {True: "yes", False: "no", None: "?"}[change["beyond_noise"]]
            yield [row["model"], name, value, str(change["items"]), verdict]


def comparison_cells(found: Row) -> tuple[list[str], list[list[str]], list[str]]:
    """(headings, one row for each model, what the marks mean): a table for people, in whatever form."""
    models, first = found["models"], found["models"][0]["model"]
    columns = [(task, metric) for task, entry in models[0]["tasks"].items() for metric, _, _ in metrics(entry)]
    headings = ["model", "bytes", "bpw", "model_bpw", "KL", "top-1 agreement", "perplexity"]
    headings += [f"{task}: {metric}" for task, metric in columns]
    rows = [_comparison_row(row, columns) for row in models]
    marks = {cell[-1] for row in rows for cell in row[6:]}
    notes = [f"± standard error · KL in nats/token and top-1 agreement are distances from {first}"]
    if "*" in marks:
        notes.append(f"* differs from {first} beyond noise: paired, item by item, at 95 %")
    if "?" in marks:
        notes.append("? cannot be told from noise: fewer than two items, or no mean over items")
    return headings, rows, notes


def _comparison_row(row: Row, columns: Sequence[tuple[str, str]]) -> list[str]:
    """The cells of one model, with its scores in the tasks and metrics of `columns`."""
    cells = [row["model"], f"{row['bytes']:,}", _number(row["bpw"]), _number(row["model_bpw"])]
    cells += [measured(row[name], row[f"{name}_stderr"]) for name in ("kl", "top1_agreement")]
    changes = row["differences"] or {"nll": None, "tasks": {}}
    scores = [(measured(row["perplexity"], row["perplexity_stderr"], 3), changes["nll"])]
    for task, metric in columns:
        [(value, error)] = [(value, error) for name, value, error in metrics(row["tasks"][task]) if name == metric]
        scores.append((measured(value, error), changes["tasks"].get(task, {}).get(metric)))
    if row["differences"] is None:  # the reference
        return cells + [score for score, _ in scores]
    return cells + [score + MARKS[change and change["beyond_noise"]] for score, change in scores]


def frontier_view(found: Row, every: bool) -> Iterator[RenderableType]:
    """A model at many sizes, and where that was written."""
    headings, rows, notes = frontier_cells(found)
    table = _table(headings, right=range(2, len(headings)))
    for row in rows:
        table.add_row(*row)
    yield table
    yield from notes


def frontier_markdown(found: Row) -> str:
    """The table of `frontier_view` as Markdown."""
    headings, rows, notes = frontier_cells(found)
    return "\n".join((*_markdown(headings, rows), "", *(f"- {note}" for note in notes))) + "\n"


def frontier_cells(found: Row) -> tuple[list[str], list[list[str]], list[str]]:
    """(headings, rows: the dense model, every budget, the peers; notes): a table for people, in whatever form."""
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
    """What is known of a point."""
    size = one.get("bytes")
    cells = [_number(one.get("bpw")), "?" if size is None else f"{size:,}", _number(one.get("model_bpw"))]
    cells += [measured(one["perplexity"], one.get("perplexity_stderr"), 3), _number(one["ratio"]), _number(one["gap"])]
    for name in ("kl", "top1_agreement"):
        cells.append("?" if one.get(name) is None else measured(one[name], one.get(f"{name}_stderr")))
    for task, metric in columns:
        cells.append(_task_cell(one["tasks"].get(task, {}), metric))
    cells += [f"{one[name]:.4f}" if name in one else "" for name in ("predicted_kl", "measured_kl")]
    return [*cells, f"{one['seconds']:.0f}" if "seconds" in one else ""]


def _task_cell(entry: dict[str, float], metric: str) -> str:
    return next((measured(value, error) for name, value, error in metrics(entry) if name == metric), "?")


def metrics(entry: dict[str, float]) -> Iterator[tuple[str, float, float | None]]:
    """(metric, value, standard error or None) of a task's scores."""
    for metric, value in entry.items():
        name, comma, kind = metric.partition(",")
        if metric != "samples" and not name.endswith("_stderr"):
            yield metric, value, entry.get(f"{name}_stderr{comma}{kind}")


def measured(value: float, error: float | None, digits: int = 4) -> str:
    """A value with its standard error, if it has one."""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def verified_view(found: Row, every: bool) -> Iterator[RenderableType]:
    """A checkpoint that is in order."""
    yield f"files   {found['files']} as they were written · {_bytes(found['bytes'])} of weights"
    yield f"model   {found['layers']} compressed layers, all tensors there and finite"
    yield f"text    perplexity {found['perplexity']:.3f} over {found['tokens']:,} tokens"
    if found["kl"] is not None:
        yield f"dense   KL {found['kl']:.4f} nats/token · top-1 agreement {found['top1_agreement']:.4f}"


def exported_view(found: Row, every: bool) -> Iterator[RenderableType]:
    """What an export wrote, kept and changed."""
    yield f"sizes   {_bytes(found['bytes_before'])} -> {_bytes(found['bytes_after'])} of weights in {found['output']}"
    yield from (f"kept    {sentence}" for sentence in found["kept"])
    yield from (f"changed {sentence}" for sentence in found["changed"])


def dropped_view(found: Row, every: bool) -> Iterator[RenderableType]:
    """Which blocks of a model went."""
    yield f"dropped {', '.join(map(str, found['dropped']))} of the {len(found['dropped'] + found['kept'])} blocks"
    yield f"sizes   {_bytes(found['bytes_before'])} -> {_bytes(found['bytes_after'])} of weights in {found['output']}"


def distilled_view(found: Row, every: bool) -> Iterator[RenderableType]:
    """What a distillation recovered, on the sequences that it held out."""
    table = _table(("step", "KL", "perplexity", "loss", "seconds"), right=(0, 1, 2, 3, 4))
    history = found["history"]
    for row in history if every else (history[0], history[-1]):
        loss = f"{row['loss']:.4f}" if "loss" in row else ""
        seconds = duration(row["seconds"]) if "seconds" in row else ""
        table.add_row(str(row["step"]), f"{row['kl']:.4f}", f"{row['perplexity']:.3f}", loss, seconds)
    yield table
    for name, last in history[-1].get("domains", {}).items():
        first = history[0]["domains"][name]
        yield f"domain  {name} · KL {first['kl']:.4f} -> {last['kl']:.4f}"
    yield f"teacher {found['teacher']} · perplexity {history[-1]['teacher_perplexity']:.3f}"
    for phase in found["phases"]:
        if blocks := phase.get("blocks"):
            path, last = list(blocks.items())[-1]
            yield f"blocks  {len(blocks)} · held-out error of {path} {last['before']:.4f} -> {last['after']:.4f}"
        if (frozen := phase.get("frozen")) is not None:
            yield f"frozen  {frozen:,} codes that oscillated"
    if found["bytes_before"] != found["bytes_after"]:
        yield f"sizes   {_bytes(found['bytes_before'])} -> {_bytes(found['bytes_after'])} of compressed weights"
    trained = " · ".join(f"{count:,} {kind}" for kind, count in found["trained"].items())
    yield f"trained {trained} · on {found['tokens']:,} tokens in {duration(found['seconds'])}"
    yield f"plot    {found['plot'] or 'none: it needs matplotlib (the extra report)'}"
    if (cost := found.get("quantized_teacher")) is not None:
        yield f"bits    {cost['bits']} of the teacher while it taught · KL {cost['kl']:.4f} to itself before"
    if found["cache_bias"] is not None:
        bias = found["cache_bias"]["after"]
        seen = f"KL {bias['kl_with_tail']:.4f} of {bias['kl']:.4f}"
        yield f"cache   {bias['tail_mass']:.1%} of the teacher's mass in the tail · {seen} seen through it"


def _asked(distillation: Row) -> str:
    """What a distillation trains, against what, on how much."""
    losses = " + ".join(term["of"]["loss"] for term in distillation["losses"])
    texts = distillation["data"] if isinstance(distillation["data"], list) else [distillation["data"]]
    amounts = " + ".join(f"{text['samples']} x {text['length']}" for text in texts)
    return f"{', '.join(distillation['rates'])} by {losses} · {amounts} tokens"


def answered_view(found: Row, every: bool) -> Iterator[RenderableType]:
    """What a teacher answered, and why some of it could not be used."""
    yield f"answers {found['answers']:,} to {found['prompts']:,} prompts, by {found['model']}, in {found['output']}"
    faults = " · ".join(f"{count:,} {name}" for name, count in found["faults"].items()) or "none"
    yield f"faults  {faults}"
    yield f"instead {found['references']:,} references · {found['dropped']:,} prompts left out"


def pushed_view(found: Row, every: bool) -> Iterator[RenderableType]:
    """What went to the Hub, or would."""
    table = _table(("file", "bytes"), right=(1,))
    for name, size in found["files"].items():
        table.add_row(name, f"{size:,}")
    yield table
    total = _bytes(sum(found["files"].values()))
    yield f"commit  {found['commit']} · {total}" if found["commit"] else f"nothing was sent · {total} would be"


def grouped(rows: Sequence[Row], same: Sequence[str], every: bool = False) -> Iterator[tuple[str, list[Row]]]:
    """Rows in order, those together that agree in `same` and in their name up to numbers: ("layers.*.q_proj", rows)."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        name = row["name"] if every else starred(row["name"])
        groups.setdefault((name, *(repr(row[key]) for key in same)), []).append(row)
    for (name, *_), members in groups.items():
        yield (members[0]["name"] if len(members) == 1 else name), members


def summarized(sentences: Iterable[str]) -> list[str]:
    """Sentences that only differ in a block's number, said once with their count."""
    groups: dict[str, list[str]] = {}
    for sentence in sentences:
        groups.setdefault(starred(sentence), []).append(sentence)
    return [same[0] if len(same) == 1 else f"{text} ({len(same)} times)" for text, same in groups.items()]


def starred(name: str) -> str:
    """The module path with a star for every number."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _table(headings: Sequence[str], right: Sequence[int]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index in right else "left", overflow="fold")
    return table


def _sizes(values: Row) -> str:
    return (
        f"{_bytes(values['dense_bytes'])} -> {_bytes(values['bytes'])} · "
        f"{_number(values['bpw'])} bpw · model_bpw {_number(values['model_bpw'])}"
    )


def _times(rows: Sequence[Row]) -> str:
    return f"x{len(rows)}" if len(rows) > 1 else ""


def _shape(row: Row) -> str:
    return " x ".join(map(str, row["shape"]))


def _steps(row: Row) -> str:
    return ", ".join(row["steps"]) or "stays dense"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"
