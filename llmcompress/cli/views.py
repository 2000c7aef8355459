"""Results as a terminal shows them; every view takes the object that `--json` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llmcompress.reporting.formatting import aim, byte_count, duration
from llmcompress.reporting.quality_limits import GateReport
from llmcompress.reporting.tables import (
    CHANGE_HEADINGS,
    Row,
    change_cells,
    comparison_cells,
    frontier_cells,
    grouped,
    measured,
    metrics,
    number,
    passport_cells,
)

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def plan_view(plan: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the steps planned for each layer, and the sizes. Layers that differ only in block number share a line."""
    yield f"plan    {plan['recipe']} on {plan['model']}"
    table = new_table(("layers", "", "shape", "steps", "bpw", "stored as"), right=(1, 4))
    for name, rows in grouped(plan["layers"], ("shape", "steps", "bits"), every):
        row = rows[0]
        table.add_row(name, _times(rows), _shape(row), _steps(row), f"{row['bpw']:.3f}", row["description"])
    yield table
    if (wanted := plan["target"]) is not None:
        yield f"target  {aim(wanted)} · compress measures what options cost, and spends where it counts"
    yield f"sizes   {_sizes(plan)}"
    yield f"needs   about {byte_count(plan['peak_memory_bytes'])} of memory and {duration(plan['seconds'])}"
    if (blocks := plan["reconstruction"]) is not None:
        rates = ", ".join(f"{kind} at {rate:g}" for kind, rate in blocks["rates"].items())
        steps = "a pass over the text" if blocks["steps"] is None else f"{blocks['steps']} steps"
        window = "" if blocks["window"] == 1 else f" in windows of {blocks['window']}"
        yield f"learns  every block{window}, {steps} each time: {rates}"
    if (then := plan["distillation"]) is not None:
        yield f"then    distillation {then['name']}: {_asked(then)}; that comes on top"


def report_view(report: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the steps and errors of each layer, then sizes, calibration text and cost of a compression."""
    from statistics import median  # here, since it takes longer to import than typer parses

    yield f"recipe  {report['recipe']} on {report['model']}" + (f" at {report['revision']}" * bool(report["revision"]))
    headings = ("layers", "", "shape", "steps", "bpw", "error", "held out", "worst", "stored as")
    table = new_table(headings, right=(1, 4, 5, 6, 7))
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
    yield f"cost    {duration(report['seconds'])} · {byte_count(report['peak_memory_bytes'])} of memory at the peak"
    if "allocation" in report:
        yield _reached(report["allocation"])
    if report["gates"] is not None:
        yield f"gates   {GateReport.from_json(report['gates']).sentence()}"
    if "distillation" in report:
        yield ""
        yield from distilled_view(report["distillation"], every)


def _stored(rows: Sequence[Row]) -> str:
    """Return the form that most rows are stored in, and the number of rows stored otherwise."""
    (form, count), *others = Counter(row["stored"] for row in rows).most_common()
    return f"{form}, {len(rows) - count} otherwise" if others else form


def _reached(allocation: Row) -> str:
    """Return the line on a target: predicted and measured KL, and the time it took."""
    kl = f"KL predicted {allocation['predicted_kl']:.4f}, measured {allocation['measured_kl']:.4f}"
    others = [f"{value:.4f} for a {name} plan" for name, value in allocation.get("baselines", {}).items()]
    kl += f" on {allocation['probing_tokens']} tokens"
    beside = f" · {' and '.join(others)} of that size, predicted" if others else ""
    return f"target  {aim(allocation['target'])} · {kl}{beside} · {duration(allocation['seconds'])}"


def score_view(scores: Row, every: bool) -> Iterator[RenderableType]:
    """Yield a model's scores and its size."""
    size, bpw, model_bpw = byte_count(scores["bytes"]), number(scores["bpw"]), number(scores["model_bpw"])
    yield f"size    {size} · {bpw} bpw · model_bpw {model_bpw}"
    perplexity = measured(scores["perplexity"], scores["perplexity_stderr"], 3)
    sure = f"calibration error {scores['calibration_error']:.4f}"
    yield f"text    perplexity {perplexity} over {scores['tokens']:,} tokens · {sure}"
    if scores["kl"] is not None:
        kl = measured(scores["kl"], scores["kl_stderr"])
        agreement = measured(scores["top1_agreement"], scores["top1_agreement_stderr"])
        yield f"dense   KL {kl} nats/token · top-1 agreement {agreement}"
    if scores.get("domains"):
        yield _by_kind(scores["domains"])
    if scores["tasks"]:
        table = new_table(("task", "metric", "value", "items"), right=(2, 3))
        for task, entry in scores["tasks"].items():
            for metric, value, error in metrics(entry):
                table.add_row(task, metric, measured(value, error), f"{entry.get('samples', '')}")
        yield table


def _by_kind(domains: Row) -> Table:
    """Return the scores on each kind of text, the worst first where there is a dense model."""
    headings = ("kind of text", "perplexity", "KL", "top-1 agreement", "calibration error")
    table = new_table(headings, right=range(1, len(headings)))
    for name, one in sorted(domains.items(), key=lambda entry: -(entry[1]["kl"] or 0)):
        far = ["" if one[key] is None else measured(one[key], one[f"{key}_stderr"]) for key in ("kl", "top1_agreement")]
        perplexity = measured(one["perplexity"], one["perplexity_stderr"], 3)
        table.add_row(name, perplexity, *far, f"{one['calibration_error']:.4f}")
    return table


def comparison_view(found: Row, every: bool) -> Iterator[RenderableType]:
    """Yield models as rows and scores as columns; with `every`, also every difference."""
    headings, rows, notes = comparison_cells(found)
    table = new_table(headings, right=range(1, len(headings)))
    for row in rows:
        table.add_row(*row)
    yield table
    yield from notes
    if every:
        table = new_table(CHANGE_HEADINGS, right=(2, 3))
        for row in change_cells(found):
            table.add_row(*row)
        yield table


def frontier_view(found: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the table of a frontier: one model at many sizes."""
    headings, rows, notes = frontier_cells(found)
    table = new_table(headings, right=range(2, len(headings)))
    for row in rows:
        table.add_row(*row)
    yield table
    yield from notes


def verified_view(found: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the findings of `verify` on a valid checkpoint."""
    yield f"files   {found['files']} as they were written · {byte_count(found['bytes'])} of weights"
    yield f"model   {found['layers']} compressed layers, all tensors there and finite"
    if found["perplexity"] is None:
        yield f"text    finite numbers for {found['tokens']:,} tokens, of which none predicts the next"
    else:
        yield f"text    perplexity {found['perplexity']:.3f} over {found['tokens']:,} tokens"
    if found["kl"] is not None:
        yield f"dense   KL {found['kl']:.4f} nats/token · top-1 agreement {found['top1_agreement']:.4f}"


def exported_view(found: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the sizes of an export, and the properties it kept and changed."""
    yield f"sizes   {_before_after(found)} of weights in {found['output']}"
    yield from (f"kept    {sentence}" for sentence in found["kept"])
    yield from (f"changed {sentence}" for sentence in found["changed"])


def priced_view(found: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the part of the prices that was measured, and the next step."""
    yield f"priced  part {found['part']} in {found['file']}"
    yield "next    the same command without --price-part, when all parts are there"


def dropped_view(found: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the numbers of the dropped blocks, what they cost if that was measured, and the sizes before and after."""
    yield f"dropped {', '.join(map(str, found['dropped']))} of the {len(found['dropped'] + found['kept'])} blocks"
    if found["damage"] is not None:
        yield f"damage  {found['damage']:.3f} nats of KL a token, before any training"
    yield f"sizes   {_before_after(found)} of weights in {found['output']}"


def shrunk_view(found: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the terms that lost components, and the sizes before and after."""
    yield f"terms   {found['terms']} of more than rank {found['rank']} were cut to it"
    yield f"sizes   {_before_after(found)} of weights in {found['output']}"
    yield f"bits    {found['bpw_before']:.3f} -> {found['bpw_after']:.3f} bpw"


def drift_view(found: Row, every: bool) -> Iterator[RenderableType]:
    """Yield how far the states that enter each block are from the dense model's, then where they are farthest."""
    table = new_table(("block", f"of {found['against']}", "CKA", "relative error"), right=range(4))
    for row in found["blocks"]:
        numbers = ("" if row[key] is None else f"{row[key]:.4f}" for key in ("cka", "error"))
        table.add_row(str(row["block"]), str(row["original"]), *numbers)
    yield table
    known = [row for row in found["blocks"] if row["cka"] is not None]
    if known:
        least = min(known, key=lambda row: row["cka"])
        yield f"least   {least['cka']:.4f} at block {least['block']}; the last row is what leaves the last block"


def passport_view(found: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the gain of every adapter on both models, the share that is kept, and how alike the two are with it."""
    table = new_table(("adapter", "gain, dense", "gain", "kept", "KL", "alike", "distinct pairs"), right=range(1, 7))
    for row in found["adapters"]:
        table.add_row(*passport_cells(row))
    yield table
    yield "gain    in nats per token; alike: of gains over tokens; distinct pairs: dense, compressed, handed over"


def narrowed_view(found: Row, every: bool) -> Iterator[RenderableType]:
    """Yield what stays in every block, the predicted damage, and the sizes."""
    for part, before in found["before"].items():
        where = "a block, on average" if found["per_block"] else "every block"
        yield f"{part.replace('_', '-'):7} {before:,} -> {round(found['after'][part], 1):,} in {where}"
    parts = list(found["before"])
    names = [part.replace("_", "-") for part in parts]
    heads = ("block", *names, *(f"error by {name}" for name in names), "damage")
    table = new_table(heads, right=range(len(heads)))
    for block in found["blocks"]:
        fates = {part["part"]: part for part in block["parts"]}
        kept = [f"{len(fates[part]['kept']) if part in fates else found['before'][part]:,}" for part in parts]
        errors = [f"{fates[part]['error']:.4f}" if part in fates else "" for part in parts]
        table.add_row(str(block["block"]), *kept, *errors, f"{block['damage']:.4f}")
    yield table
    if found["damage"] is not None:
        yield f"damage  {found['damage']:.3f} nats of KL a token, the sum over blocks narrowed one by one"
    yield from _written(found)
    if found["output"]:
        yield f"next    llmcompress distill {found['output']} shortened --teacher {found['model']} -o MENDED"


def experts_view(found: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the experts of each block that do not stay as they are, the predicted damage, and the sizes."""
    yield f"experts {_way(found)}"
    table = new_table(("block", "experts", "share of tokens", "damage"), right=(0, 2, 3))
    for block in found["blocks"]:
        gone = [row for row in block["experts"] if row["fate"] != "kept"]
        total = sum(row["tokens"] for row in block["experts"])
        share = f"{sum(row['tokens'] for row in gone) / total:.3f}" if total else ""
        damage = block["damage"] if gone else block["considered"]
        shown = "" if damage is None else f"{damage:.4f}" + ("" if gone else " if condensed")
        table.add_row(str(block["block"]), _fates(gone, every) or "stay", share if gone else "", shown)
    yield table
    yield from _written(found)


def _way(found: Row) -> str:
    """Return what is done to a mixture in one line."""
    asked, each = found["settings"], found["experts_before"]
    if found["way"] == "prune":
        return f"{asked['keep']} of {each} stay in each block, by {asked['by']}"
    if found["way"] == "merge":
        return f"{each} in each block become {asked['keep']}, by averages of alike ones"
    if found["way"] == "condense":
        return f"{asked['experts']} of {each} stay on, without a router, in {len(asked['blocks'])} blocks"
    return f"{asked['count']} of {each} in each block become factors of rank {asked['rank']}, by {asked['by']}"


def _fates(rows: Sequence[Row], every: bool) -> str:
    """Return the fates of a block's experts with their numbers; with `every`, weights of those that are folded too."""
    parts = []
    for fate in ("dropped", "merged", "replaced", "folded"):
        groups: dict[int | None, list[Row]] = {}
        for row in (row for row in rows if row["fate"] == fate):
            groups.setdefault(row["becomes"] if fate == "merged" else None, []).append(row)
        for same in groups.values():
            names = [
                f"{row['number']}" + (f" x {row['weight']:.3f}" if every and row["weight"] else "") for row in same
            ]
            parts.append(f"{fate} {', '.join(names)}")
    return "; ".join(parts)


def distilled_view(found: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the gains of a distillation on held-out text, then its cost."""
    table = new_table(("step", "KL", "perplexity", "loss", "seconds"), right=(0, 1, 2, 3, 4))
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
        if (regrown := phase.get("regrown")) is not None:
            yield f"regrown {regrown:.1%} of the weights of a phase's matrices, which had been pruned"
    if found["bytes_before"] != found["bytes_after"]:
        yield f"sizes   {_before_after(found)} of compressed weights"
    trained = " · ".join(f"{count:,} {kind}" for kind, count in found["trained"].items())
    yield f"trained {trained} · on {found['tokens']:,} tokens in {duration(found['seconds'])}"
    yield f"plot    {found['plot'] or 'none: it needs matplotlib (the extra report)'}"
    if (cost := found.get("quantized_teacher")) is not None:
        yield f"bits    {cost['bits']} of the teacher while it taught · KL {cost['kl']:.4f} to itself before"
    for name, last in found.get("controls", {}).items():
        reached = last.get("failed") or f"KL {last['kl']:.4f} · perplexity {last['perplexity']:.3f}, on the same tokens"
        yield f"control {name.replace('_', ' ')} · {reached}"
    if found["cache_bias"] is not None:
        bias = found["cache_bias"]["after"]
        seen = f"KL {bias['kl_with_tail']:.4f} of {bias['kl']:.4f}"
        yield f"cache   {bias['tail_mass']:.1%} of the teacher's mass in the tail · {seen} seen through it"


def _asked(distillation: Row) -> str:
    """Return a planned distillation in one line: parameters, losses, amount of text."""
    losses = " + ".join(term["of"]["loss"] for term in distillation["losses"])
    texts = distillation["data"] if isinstance(distillation["data"], list) else [distillation["data"]]
    amounts = " + ".join(f"{text['samples']} x {text['length']}" for text in texts)
    return f"{', '.join(distillation['rates'])} by {losses} · {amounts} tokens"


def answered_view(found: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the number of answers a teacher wrote, and the reasons for those refused."""
    yield f"answers {found['answers']:,} to {found['prompts']:,} prompts, by {found['model']}, in {found['output']}"
    faults = " · ".join(f"{count:,} {name}" for name, count in found["faults"].items()) or "none"
    yield f"faults  {faults}"
    yield f"instead {found['references']:,} references · {found['dropped']:,} prompts left out"


def pushed_view(found: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the files sent to the Hub; for a dry run, those it would send."""
    table = new_table(("file", "bytes"), right=(1,))
    for name, size in found["files"].items():
        table.add_row(name, f"{size:,}")
    yield table
    yield from (f"lacks   {name}" for name in found["unmeasured"])
    total = byte_count(sum(found["files"].values()))
    yield f"commit  {found['commit']} · {total}" if found["commit"] else f"nothing was sent · {total} would be"


def new_table(headings: Sequence[str], right: Sequence[int]) -> Table:
    """Return an empty table without lines; the columns numbered in `right` are flush right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index in right else "left", overflow="fold")
    return table


def _sizes(values: Row) -> str:
    return (
        f"{byte_count(values['dense_bytes'])} -> {byte_count(values['bytes'])} · "
        f"{number(values['bpw'])} bpw · model_bpw {number(values['model_bpw'])}"
    )


def _written(found: Row) -> Iterator[str]:
    """Yield the sizes before and after, and the text that was read."""
    written = f"of weights in {found['output']}" if found["output"] else "of weights; nothing was written"
    yield f"sizes   {_before_after(found)} {written}"
    text = found["calibration"]
    judged = text["held_out"] * text["length"]
    yield f"data    {text['source']} · {text['tokens']:,} tokens, {judged:,} of them to judge on"


def _before_after(found: Row) -> str:
    return f"{byte_count(found['bytes_before'])} -> {byte_count(found['bytes_after'])}"


def _times(rows: Sequence[Row]) -> str:
    return f"x{len(rows)}" if len(rows) > 1 else ""


def _shape(row: Row) -> str:
    return " x ".join(map(str, row["shape"]))


def _steps(row: Row) -> str:
    return ", ".join(row["steps"]) or "stays dense"
