"""Turns summed up: medians over rounds, ratios to another model, and shares of the read bandwidth.

A ratio is taken within each round, where both models met the same machine, before the median is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from llmcompress.benchmark.candidate import Candidate

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Spread:
    """A quantity over the rounds of one run."""

    median: float
    lowest: float
    highest: float


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the fields of `Spread` of one or more values."""
    return asdict(Spread(median(values), min(values), max(values)))


def summary(
    found: Sequence[Candidate],
    turns: Sequence[Row],
    memory: Sequence[Row],
    against: str | None,
    cache: int | None,
    buffer: int,
) -> dict[str, Any]:
    """Return {"against", "bandwidth", "models", "notes"}, plain values.

    Args:
        found: the models.
        turns: answers as `take_turns` yields them; in round 0 the first one of a model is its first in that process.
        memory: bytes and load seconds of each model, as its process said.
        against: the name of the model that ratios are taken to.
        cache: bytes of the last-level cache, None where unknown.
        buffer: bytes of what was read for the bandwidth.
    """
    threads = sorted({turn["threads"] for turn in turns})
    reference = next((number for number, one in enumerate(found) if one.name == against), None)
    read = {count: [turn["bandwidth"] for turn in _counted(turns, None, count)] for count in threads}
    bandwidth = {str(count): spread(values) for count, values in read.items()}
    models = []
    for number, one in enumerate(found):
        speeds = {}
        for count in threads:
            rates = _rates(_counted(turns, number, count))
            others = None if reference is None else _rates(_counted(turns, reference, count))
            speeds[str(count)] = _speed(rates, others, [one.token_bytes / value for value in read[count]])
        first = next(turn for turn in turns if turn["model"] == number)
        own = _described(one, memory[number]) | {"first_ever_seconds": first["first_token"]}
        base = None if reference is None else _described(found[reference], memory[reference])
        models.append(own | {"ratios": None if base is None else _ratios(own, base), "threads": speeds})
    notes = [f"{one.name}: {NO_PEAK}" for one, held in zip(found, memory) if not held["peak_of_generation"]]
    notes += [
        f"{one.name}: what a token reads ({one.token_bytes / 1e6:,.1f} MB) fits into the last-level cache "
        f"({cache / 1e6:,.0f} MB), so its share of the memory's bandwidth is no bound"
        for one in found
        if cache is not None and one.token_bytes < cache
    ]
    return {
        "against": against,
        "bandwidth": {"buffer_bytes": buffer, "cache_bytes": cache, "threads": bandwidth},
        "models": models,
        "notes": notes,
    }


NO_PEAK = "its peak of memory includes loading, since the system does not let a peak begin anew"


def _counted(turns: Sequence[Row], model: int | None, threads: int) -> list[Row]:
    """Return the turns of a model that count, in the order of rounds."""
    wanted = [turn for turn in turns if (turn["model"], turn["threads"]) == (model, threads) and turn["round"] > 0]
    return sorted(wanted, key=lambda turn: turn["round"])


def _rates(turns: Sequence[Row]) -> dict[str, list[float]]:
    """Return tokens/s of decoding and of the prompt, and seconds to the first token, one for each round."""
    return {
        "decode": [turn["tokens"] / turn["decode"] for turn in turns],
        "prefill": [turn["prompt"] / turn["prefill"] for turn in turns],
        "first_token_seconds": [turn["first_token"] for turn in turns],
    }


def _speed(
    rates: Mapping[str, list[float]], base: Mapping[str, list[float]] | None, token_seconds: Sequence[float]
) -> dict[str, Any]:
    """Return the rates of one model with some threads, ratios to `base`, and the share of the bandwidth.

    `token_seconds`: for each round, how long the memory would take to give the weights of one token.
    """
    shares = [rate * seconds for rate, seconds in zip(rates["decode"], token_seconds, strict=True)]
    ratios = None
    if base is not None:
        ratios = {
            name: spread([own / other for own, other in zip(values, base[name], strict=True)])
            for name, values in rates.items()
        }
    return {name: spread(values) for name, values in rates.items()} | {
        "bandwidth_share": spread(shares),
        "ratios": ratios,
    }


def _ratios(own: Row, base: Row) -> dict[str, float]:
    """Return ratios of sizes: of files, and of what the processes held more than before they loaded the models."""
    sizes = [
        {"bytes": one["bytes"]} | {name: one["memory"][name] - one["memory"]["empty"] for name in ("resident", "peak")}
        for one in (own, base)
    ]
    return {name: value / sizes[1][name] if sizes[1][name] > 0 else math.nan for name, value in sizes[0].items()}


def _described(one: Candidate, held: Row) -> dict[str, Any]:
    """Return what holds for a model whatever the number of threads."""
    return {
        "model": one.name,
        "kind": one.kind,
        "engine": one.engine,
        "dtype": held["dtype"],
        "bytes": one.bytes,
        "bpw": one.bpw,
        "model_bpw": one.model_bpw,
        "token_bytes": one.token_bytes,
        "scores": one.scores,
        "load_seconds": held["load_seconds"],
        "memory": {name: held[name] for name in ("empty", "resident", "peak", "peak_loading", "peak_of_generation")},
    }
