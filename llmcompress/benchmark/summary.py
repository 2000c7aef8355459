"""The summary of a measurement, and its tables: medians over rounds, ratios to another model, shares of the bandwidth.

Ratios are taken within each round, where both models met the same machine; their median follows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from llmcompress.benchmark.candidate import Candidate
from llmcompress.errors import format_bytes
from llmcompress.reporting.formatting import number
from llmcompress.reporting.tables import Table

Row = Mapping[str, Any]
RATIO = "ratio"  # the heading of columns that are left out if there is nothing to compare with
NO_PEAK = "its peak of memory includes loading, since the system does not let a peak begin anew"


def summary(
    models: Sequence[Candidate],
    turns: Sequence[Row],
    memory: Sequence[Row],
    against: str | None,
    cache: int | None,
    buffer: int,
) -> dict[str, Any]:
    """Return {"against", "bandwidth", "models", "notes"}, plain values.

    Args:
        models: the measured models.
        turns: answers as `take_turns` yields them; in round 0 the first one of a model is its first in that process.
        memory: bytes and load seconds of each model, as its process gave them.
        against: the name of the model that ratios are taken to.
        cache: bytes of the last-level cache, None where unknown.
        buffer: bytes that were read for the bandwidth.
    """
    threads = sorted({turn["threads"] for turn in turns})
    reference = next((index for index, model in enumerate(models) if model.name == against), None)
    bandwidths = {count: [turn["bandwidth"] for turn in _counted_turns(turns, None, count)] for count in threads}
    facts = [_model_facts(model, held) for model, held in zip(models, memory)]
    rows = []
    for index, model in enumerate(models):
        speeds = {}
        for count in threads:
            rates = _rates(_counted_turns(turns, index, count))
            base = None if reference is None else _rates(_counted_turns(turns, reference, count))
            speeds[str(count)] = _speed(rates, base, [model.token_bytes / value for value in bandwidths[count]])
        first = next(turn for turn in turns if turn["model"] == index)
        ratios = None if reference is None else _size_ratios(facts[index], facts[reference])
        rows.append(facts[index] | {"first_ever_seconds": first["first_token"], "ratios": ratios, "threads": speeds})
    notes = [f"{model.name}: {NO_PEAK}" for model, held in zip(models, memory) if not held["peak_of_generation"]]
    notes += [
        f"{model.name}: what a token reads ({model.token_bytes / 1e6:,.1f} MB) fits into the last-level cache "
        f"({cache / 1e6:,.0f} MB), so its share of the memory's bandwidth is no bound"
        for model in models
        if cache is not None and model.token_bytes < cache
    ]
    read = {str(count): round_spread(values) for count, values in bandwidths.items()}
    return {
        "against": against,
        "bandwidth": {"buffer_bytes": buffer, "cache_bytes": cache, "threads": read},
        "models": rows,
        "notes": notes,
    }


def round_spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the ends of a quantity over the rounds of one run."""
    return {"median": median(values), "lowest": min(values), "highest": max(values)}


def _counted_turns(turns: Sequence[Row], model: int | None, threads: int) -> list[Row]:
    """Return the turns of a model after the warm-up, in the order of rounds."""
    wanted = [turn for turn in turns if (turn["model"], turn["threads"]) == (model, threads) and turn["round"] > 0]
    return sorted(wanted, key=lambda turn: turn["round"])


def _rates(turns: Sequence[Row]) -> dict[str, list[float]]:
    """Return tokens/s of decoding and of the prompt, and seconds to the first token, for each round."""
    return {
        "decode": [turn["tokens"] / turn["decode"] for turn in turns],
        "prefill": [turn["prompt"] / turn["prefill"] for turn in turns],
        "first_token_seconds": [turn["first_token"] for turn in turns],
    }


def _speed(
    rates: Mapping[str, list[float]], base: Mapping[str, list[float]] | None, token_seconds: Sequence[float]
) -> dict[str, Any]:
    """Return the rates of one model with some threads, ratios to `base`, and the share of the bandwidth.

    `token_seconds`: for each round, the least time in which memory can give the weights of one token.
    """
    shares = [rate * seconds for rate, seconds in zip(rates["decode"], token_seconds, strict=True)]
    ratios = None
    if base is not None:
        ratios = {
            name: round_spread([own / other for own, other in zip(values, base[name], strict=True)])
            for name, values in rates.items()
        }
    return {name: round_spread(values) for name, values in rates.items()} | {
        "bandwidth_share": round_spread(shares),
        "ratios": ratios,
    }


def _size_ratios(own: Row, base: Row) -> dict[str, float]:
    """Return ratios of the bytes of files, and of memory beyond that of the empty process."""
    sizes = [
        {"bytes": row["bytes"]} | {name: row["memory"][name] - row["memory"]["empty"] for name in ("resident", "peak")}
        for row in (own, base)
    ]
    return {name: value / sizes[1][name] if sizes[1][name] > 0 else math.nan for name, value in sizes[0].items()}


def _model_facts(model: Candidate, memory: Row) -> dict[str, Any]:
    """Return the facts on a model that hold for any number of threads."""
    return {
        "model": model.name,
        "kind": model.kind,
        "engine": model.engine,
        "dtype": memory["dtype"],
        "bytes": model.bytes,
        "bpw": model.bpw,
        "model_bpw": model.model_bpw,
        "token_bytes": model.token_bytes,
        "scores": model.scores,
        "load_seconds": memory["load_seconds"],
        "memory": {name: memory[name] for name in ("empty", "resident", "peak", "peak_loading", "peak_of_generation")},
    }


def speed_markdown(results: Row) -> str:
    """Return a measurement as Markdown: its two tables, what the numbers mean, and where they were measured."""
    notes = "".join(f"- {note}\n" for note in speed_notes(results))
    return f"{speed_table(results).markdown()}\n\n{size_table(results).markdown()}\n\n{notes}"


def speed_table(results: Row) -> Table:
    """Return the speeds: a row for each number of threads and model."""
    headings = ["threads", "model", "decode tokens/s", RATIO, "of bandwidth", "prefill tokens/s", RATIO]
    headings += ["first token s", RATIO]
    rows = []
    for threads in map(str, results["protocol"]["threads"]):
        for model in results["models"]:
            speed = model["threads"][threads]
            ratios = {name: f"{value['median']:.2f}" for name, value in (speed["ratios"] or {}).items()}
            row = [threads, model["model"], _spread_text(speed["decode"]), ratios.get("decode", "")]
            row += [f"{speed['bandwidth_share']['median']:.0%}", _spread_text(speed["prefill"])]
            row += [ratios.get("prefill", ""), _spread_text(speed["first_token_seconds"])]
            rows.append([*row, ratios.get("first_token_seconds", "")])
    return _without_empty_ratios(results, headings, rows)


def size_table(results: Row) -> Table:
    """Return sizes, memory and seconds: a row for each model."""
    headings = ["model", "bytes", RATIO, "bpw", "engine", "load s", "resident", RATIO, "peak", RATIO, "peak loading"]
    headings += ["first ever s"]
    rows = []
    for model in results["models"]:
        memory = model["memory"]
        added = {name: format_bytes(memory[name] - memory["empty"]) for name in ("resident", "peak", "peak_loading")}
        ratios = {name: number(value) for name, value in (model["ratios"] or {}).items()}
        bpw = "" if model["bpw"] is None else number(model["bpw"])
        row = [model["model"], format_bytes(model["bytes"]), ratios.get("bytes", ""), bpw, model["engine"]]
        row += [f"{model['load_seconds']:.2f}", added["resident"], ratios.get("resident", "")]
        row += [added["peak"], ratios.get("peak", ""), added["peak_loading"], digits(model["first_ever_seconds"])]
        rows.append(row)
    return _without_empty_ratios(results, headings, rows)


def _without_empty_ratios(results: Row, headings: list[str], rows: list[list[str]]) -> Table:
    """Return a table, without ratios if there is nothing to compare with."""
    places = [place for place, name in enumerate(headings) if name != RATIO or results["against"] is not None]
    names = [headings[place] for place in places]
    numbers = [place for place, name in enumerate(names) if name not in ("model", "engine")]
    return Table(names, [[row[place] for place in places] for row in rows], numbers)


def speed_notes(results: Row) -> list[str]:
    """Return sentences on the meaning of the numbers, on this measurement, and on its machine."""
    protocol, bandwidth, machine = results["protocol"], results["bandwidth"], results["machine"]
    empty = max(model["memory"]["empty"] for model in results["models"])
    rounds = f"{protocol['rounds']} round" + "s" * (protocol["rounds"] > 1)
    notes = [
        f"median of {rounds} [lowest-highest]; the models took turns, each in a process of its own",
        f"prefill: a prompt of {protocol['prompt']} tokens at once; decode: {protocol['tokens']} more, greedy, one by "
        f"one, batch 1, with a cache of keys and values",
        f"memory: more than the {format_bytes(empty)} (at most) that the process held before it loaded the model; a "
        f"file's pages count once they are touched; peak: while it generated",
        "load: the files had been read before, once for each model; first ever: the first token of a new process",
    ]
    if results["against"] is not None:
        notes.append(f"ratio: to {results['against']} in the same round; the median of that; of sizes, to its sizes")
    read = ", ".join(
        f"{speed['median'] / 1e9:.1f} GB/s with {count} thread" + "s" * (count != "1")
        for count, speed in bandwidth["threads"].items()
    )
    notes.append(
        f"of bandwidth: bytes of weights that a token reads x tokens/s / read bandwidth: {read}, measured in every "
        f"round on {format_bytes(bandwidth['buffer_bytes'])}"
    )
    notes += ["compressed models ran without kernels (--plain)"] * bool(protocol["plain"])
    where = f"{machine['cpu']}, {machine['cores']} cores, {format_bytes(machine['memory_bytes'])} of memory"
    packages = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    notes += [*results["notes"], f"machine: {where}", f"versions: {packages}"]
    return [*notes, f"command: `{results['command']}`"] if results["command"] else notes


def _spread_text(value: Row) -> str:
    """Return a spread as "8.31 [8.02-8.40]"."""
    return f"{digits(value['median'])} [{digits(value['lowest'])}-{digits(value['highest'])}]"


def digits(value: float) -> str:
    """Return a number with about three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
