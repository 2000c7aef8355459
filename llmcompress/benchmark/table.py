"""Speeds as tables, for a terminal and in Markdown."""

from __future__ import annotations

from typing import Any

from llmcompress.reporting.formatting import byte_count
from llmcompress.reporting.tables import Row, markdown_table, number

RATIO = "ratio"  # the heading of columns that are left out where there is nothing to compare with


def speed_markdown(found: Row) -> str:
    """Return a measurement as Markdown: its two tables, what the numbers mean, and where they were measured."""
    headings, rows = speed_cells(found)
    said = [f"- {note}" for note in speed_notes(found)]
    parts = (*markdown_table(headings, rows), "", *markdown_table(*size_cells(found)), "", *said)
    return "\n".join(parts) + "\n"


def speed_cells(found: Row) -> tuple[list[str], list[list[str]]]:
    """Return (headings, rows) of the speeds: a row for each number of threads and model."""
    headings = ["threads", "model", "decode tokens/s", RATIO, "of bandwidth", "prefill tokens/s", RATIO]
    headings += ["first token s", RATIO]
    rows = []
    for threads in map(str, found["protocol"]["threads"]):
        for one in found["models"]:
            speed = one["threads"][threads]
            ratios = {name: f"{value['median']:.2f}" for name, value in (speed["ratios"] or {}).items()}
            row = [threads, one["model"], ranged(speed["decode"]), ratios.get("decode", "")]
            row += [f"{speed['bandwidth_share']['median']:.0%}", ranged(speed["prefill"]), ratios.get("prefill", "")]
            row += [ranged(speed["first_token_seconds"]), ratios.get("first_token_seconds", "")]
            rows.append(row)
    return _shown(found, headings, rows)


def size_cells(found: Row) -> tuple[list[str], list[list[str]]]:
    """Return (headings, rows) of sizes, memory and seconds: a row for each model."""
    headings = ["model", "bytes", RATIO, "bpw", "engine", "load s", "resident", RATIO, "peak", RATIO, "peak loading"]
    headings += ["first ever s"]
    rows = []
    for one in found["models"]:
        memory = one["memory"]
        held = {name: byte_count(memory[name] - memory["empty"]) for name in ("resident", "peak", "peak_loading")}
        ratios = {name: number(value) for name, value in (one["ratios"] or {}).items()}
        bpw = "" if one["bpw"] is None else number(one["bpw"])
        row = [one["model"], byte_count(one["bytes"]), ratios.get("bytes", ""), bpw, one["engine"]]
        row += [f"{one['load_seconds']:.2f}", held["resident"], ratios.get("resident", "")]
        row += [held["peak"], ratios.get("peak", ""), held["peak_loading"], digits(one["first_ever_seconds"])]
        rows.append(row)
    return _shown(found, headings, rows)


def _shown(found: Row, headings: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Return a table without ratios where there is nothing to compare with."""
    kept = [place for place, heading in enumerate(headings) if heading != RATIO or found["against"] is not None]
    return [headings[place] for place in kept], [[row[place] for place in kept] for row in rows]


def speed_notes(found: Row) -> list[str]:
    """Return what the numbers mean, what to know about these, and where they were measured."""
    asked, bandwidth, machine = found["protocol"], found["bandwidth"], found["machine"]
    empty = max(one["memory"]["empty"] for one in found["models"])
    rounds = f"{asked['rounds']} round" + "s" * (asked["rounds"] > 1)
    notes = [
        f"median of {rounds} [lowest-highest]; the models took turns, each in a process of its own",
        f"prefill: a prompt of {asked['prompt']} tokens at once; decode: {asked['tokens']} more, greedy, one by one, "
        f"batch 1, with a cache of keys and values",
        f"memory: more than the {byte_count(empty)} (at most) that the process held before it loaded the model; a "
        f"file's pages count once they are touched; peak: while it generated",
        "load: the files had been read before, once for each model; first ever: the first token of a new process",
    ]
    if found["against"] is not None:
        notes.append(f"ratio: to {found['against']} in the same round; the median of that; of sizes, to its sizes")
    read = ", ".join(
        f"{speed['median'] / 1e9:.1f} GB/s with {count} thread" + "s" * (count != "1")
        for count, speed in bandwidth["threads"].items()
    )
    notes.append(
        f"of bandwidth: bytes of weights that a token reads x tokens/s / read bandwidth: {read}, measured in every "
        f"round on {byte_count(bandwidth['buffer_bytes'])}"
    )
    plain = ["compressed models ran without kernels (--plain)"] * bool(asked["plain"])
    where = f"{machine['cpu']}, {machine['cores']} cores, {byte_count(machine['memory_bytes'])} of memory"
    made = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    typed = [f"command: `{found['command']}`"] * bool(found["command"])
    return [*notes, *plain, *found["notes"], f"machine: {where}", f"versions: {made}", *typed]


def ranged(value: dict[str, Any]) -> str:
    """Return a spread as "8.31 [8.02-8.40]"."""
    return f"{digits(value['median'])} [{digits(value['lowest'])}-{digits(value['highest'])}]"


def digits(value: float) -> str:
    """Return a number with three digits or so."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
