"""Draw the pictures of the records: frontier.png, sizes in their stages, the older line and the peers; fewer.png, what
fewer matrices cost beside fewer bits; and models.png, ours and peers on three models.

    python research/frontier_picture.py

Points above WORST are left out: nobody reads off a line what a ruined model is.
"""

from __future__ import annotations

import re
from typing import Any

from records import RESULTS, Record
from tables import all_records, current

from llmcompress.reporting.plots import frontier_pictures, new_figure, png_bytes, write_name

PICTURES = RESULTS.parent / "pictures"
WORST = 10_000  # of perplexities
WORST_KL = 5
STAGES = {
    ", by calibration alone": "calibration alone",
    ", blocks learn": "blocks learn",
    ", then distilled": "distilled",
}
SEED = "a second seed"  # of a point that is drawn
PARTIAL = "partial binarization"
FEWER = {  # tables, and their students but for those that lost blocks
    "distilled-narrow": "narrower blocks",
    "distilled-tied": "tied blocks",
    "distilled-pruned": "zeros",
    "distilled-low-rank-50": "low rank",
}
DROPPED = "blocks dropped"
BITS = "bits, calibration alone"
RECIPES = ("default", "balanced", "gptq-5-g64", "gptq-6-g64", "gptq-8-g64")
TEXT = "WikiText-2 test, 8×1024"


def main() -> None:
    """Draw all pictures."""
    records = all_records()
    (PICTURES / "frontier.png").write_bytes(frontier_pictures(frontier(records))["png"])
    (PICTURES / "fewer.png").write_bytes(frontier_pictures(fewer(records))["png"])
    (PICTURES / "models.png").write_bytes(draw_models(current("peers-models", records)))


def frontier(records: list[Record]) -> dict[str, Any]:
    """Return sizes in their stages, partial binarization and the peers."""
    stages = [record for record in current("stages", records) if record["arm"] != "dense" and SEED not in record["arm"]]
    lines = {
        f"{name}, by gradient": [r for r in stages if mark in r["arm"] and PARTIAL not in r["arm"]]
        for mark, name in STAGES.items()
    }
    lines["calibration alone, by attention"] = [r for r in current("budgets", records) if r["arm"].count(",") == 0]
    lines[PARTIAL] = [record for record in stages if PARTIAL in record["arm"]]
    peers = [record for record in current("peers", records) if record["tool"] not in ("dense", "llmcompress")]
    return {
        "axis": "bpw",
        "dense": _point(next(record for record in current("stages", records) if record["arm"] == "dense")),
        "series": [{"recipe": name, "points": _drawn(rows)} for name, rows in lines.items()],
        "peers": [point | {"name": _name(r)} for r in peers for point in _drawn([r])],
    }


def fewer(records: list[Record]) -> dict[str, Any]:
    """Return what fewer matrices, blocks, neurons or weights came to after 142,800 tokens of distillation, and beside
    them fewer bits without any."""
    methods = {record["recipe"]: record["numbers"] for record in current("methods", records)}
    lines: dict[str, list[dict[str, Any]]] = {kind: [] for kind in (DROPPED, *FEWER.values())}
    for table, kind in FEWER.items():
        student: Record = {}
        for record in current(table, records):
            if record["text"] == TEXT and record["student"]:
                student = record
            elif record["text"] == TEXT and record["arm"] == "then distilled":
                size, perplexity = _megabytes(student, methods), record["numbers"]["perplexity"]
                if size is not None:
                    lines[DROPPED if DROPPED in student["arm"] else kind].append(_sized(size, perplexity))
    lines[BITS] = [_sized(_size(methods[name]), methods[name]["perplexity"]) for name in RECIPES]
    return {
        "axis": "bytes",
        "dense": _sized(_size(methods["dense"]), methods["dense"]["perplexity"]),
        "series": [{"recipe": name, "points": points} for name, points in lines.items() if points],
        "peers": [],
    }


def draw_models(records: list[Record]) -> bytes:
    """Return a PNG of the mean KL on six kinds of text over bits of the decoder's linears, a part for each model."""
    names = list(dict.fromkeys(record["model"] for record in records))
    rows = {
        name: [r["numbers"] for r in records if r["model"] == name and r["numbers"]["kl"] < WORST_KL] for name in names
    }
    figure = new_figure()
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
    from matplotlib.transforms import Bbox

    figure.set_size_inches(5 * len(names), 5)
    parts = figure.subplots(1, len(names), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, points) in zip(parts, rows.items(), strict=True):
        axes.set(title=name, xlabel="bits per weight of the decoder's linears", yscale="log")
        for tool, color in (("llmcompress", "tab:blue"), (None, "black")):
            part = [(n["bpw"], n["kl"]) for n in points if (n["tool"] == "llmcompress") == (tool is not None)]
            axes.plot([x for x, _ in part], [y for _, y in part], "x" if tool is None else "o", color=color)
        axes.grid(alpha=0.3)
        axes.margins(0.15)
    parts[0].set_ylabel("mean KL to dense on six kinds of text, nats/token")
    parts[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    parts[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    parts[0].yaxis.set_minor_formatter(NullFormatter())
    figure.draw_without_rendering()  # names are placed by where the points are in the end
    for axes, points in zip(parts, rows.values(), strict=True):
        corners = axes.transData.transform([(numbers["bpw"], numbers["kl"]) for numbers in points])
        covered = [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in corners]
        for numbers in points:
            covered.append(write_name(axes, (numbers["bpw"], numbers["kl"]), _name_arm(numbers), covered))
    return png_bytes(figure)


def _name_arm(numbers: Record) -> str:
    own = numbers["tool"] == "llmcompress"
    return str(numbers["tool_arm"]) if own else f"{numbers['tool']} {numbers['tool_arm']}"


def _megabytes(student: Record, methods: dict[str, dict[str, Any]]) -> float | None:
    """Return the size of a student: its record or name has it, or its name has its recipe's; None for a control of
    another's size."""
    if "megabytes" in student["numbers"]:
        return _size(student["numbers"])
    if found := re.search(r"([\d.]+) MB", student["arm"]):
        return float(found[1])
    recipe = re.search(r"`(.+?)`", student["arm"])
    return _size(methods[recipe[1]]) if recipe else None


def _size(numbers: dict[str, Any]) -> float:
    """Return megabytes of a recipe's row, whichever way it tells them."""
    return float(numbers["megabytes"] if "megabytes" in numbers else numbers["bytes"] / 1e6)


def _sized(megabytes: float, perplexity: float) -> dict[str, Any]:
    return {"bytes": megabytes * 1e6, "perplexity": perplexity, "tasks": {}}


def _drawn(records: list[Record]) -> list[dict[str, Any]]:
    """Return the points of records, without ruined models and without the dense one."""
    return [_point(r) for r in records if r["numbers"]["perplexity"] < WORST and r.get("arm") != "dense"]


def _point(record: Record) -> dict[str, Any]:
    numbers = record["numbers"]
    scores = {"blimp": {"acc": numbers["blimp"]}} if "blimp" in numbers else {}
    return {"bpw": numbers["bpw"], "perplexity": numbers["perplexity"], "tasks": scores}


def _name(record: Record) -> str:
    return f"{record['tool']} {record['arm'].partition(',')[0]}"


if __name__ == "__main__":
    main()
