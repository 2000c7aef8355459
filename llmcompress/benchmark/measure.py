"""Speed and memory of models side by side, for `llmcompress bench`: a process for each, and turns among them.

The models are asked one after the other, round after round, and every other round in the opposite order: what else the
machine does meanwhile hits all of them alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcompress.benchmark.bandwidth import buffer_bytes
from llmcompress.benchmark.candidate import Candidate, candidates, prompt_of
from llmcompress.benchmark.machine import machine_facts
from llmcompress.benchmark.plot import check_plots, speed_png
from llmcompress.benchmark.process import FAST, Worker
from llmcompress.benchmark.protocol import SEED, WARM_UP, SpeedProtocol
from llmcompress.benchmark.summary import summary
from llmcompress.benchmark.table import speed_markdown
from llmcompress.errors import RecipeError
from llmcompress.evaluation.scores import Scoring
from llmcompress.reporting.output_file import check_new_file, write_new_file
from llmcompress.runtime.facts import versions
from llmcompress.runtime.json_values import replace_nonfinite
from llmcompress.runtime.load import busy_note

MEMORY = "memory"  # the engine, and the name, of what reads a buffer
Ask = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Seat:
    """A process in its turn. `model`: its number, None for that which reads memory; `ask`: reaches the process."""

    model: int | None
    threads: tuple[int, ...]  # that it is asked for
    ask: Ask


def bench(
    models: Sequence[str | Path],
    protocol: SpeedProtocol,
    *,
    against: str | None = None,
    ggufs: Sequence[Path] = (),
    table: Path | None = None,
    numbers: Path | None = None,
    plot: Path | None = None,
    command: str | None = None,
    progress: Scoring | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure how fast models generate on this machine's processor, and what memory they take.

    Args:
        models: folders, Hub ids or `smollm2`; dense, or compressed.
        protocol: threads, lengths and rounds.
        against: the model that ratios are taken to, measured too; None for no ratios.
        ggufs: files that llama.cpp runs, by the package xllamacpp.
        table: a new .md file for the tables; None for none.
        numbers: a new .json file for every number; None for none.
        plot: a new .png file: tokens/s over size, quality as colour; None for none.
        command: what was typed, to be kept with the numbers.
        progress: receives what is counted, how many are done, and how many there are.
        trust_remote_code: True to run the Python code that models bring along, if transformers lacks their class.

    Returns:
        {"command", "machine", "versions", "protocol", "against", "bandwidth", "models", "notes", "turns"}; for each
        model its sizes, memory in bytes, and by number of threads tokens/s, seconds, ratios and shares of the
        bandwidth, each as median, lowest and highest of the rounds.

    Raises:
        InputError: for a model or a file that is missing or cannot be loaded, and for a model that has another
            vocabulary than `against`.
        RecipeError: for a protocol that a model cannot follow, or a package that is missing.
        DiskError: for an output that cannot be written.
        MemoryLimitError: where memory runs out.
    """
    _check_outputs(table, numbers, plot)
    found = candidates(map(str, models), ggufs, protocol, against, trust_remote_code)
    machine, load = machine_facts(), busy_note()
    with ExitStack() as stack:
        seats, loaded, size = _seated(stack, found, protocol, machine, progress)
        turns = list(take_turns(seats, protocol, prompt_of(found, protocol.prompt, SEED), progress))
        memory = _memory(seats, loaded, len(found))
    result = replace_nonfinite(
        {"command": command, "machine": machine, "versions": _versions(ggufs), "protocol": protocol.to_json()}
        | summary(found, turns, memory, against, machine["cache_bytes"], size)
        | {"turns": turns}
    )
    result["notes"] += [] if load is None else [f"{load}: measure again on a quiet one"]
    result["notes"] += _notes(found, protocol, machine)
    if table is not None:
        write_new_file(table, speed_markdown(result))
    if numbers is not None:
        write_new_file(numbers, json.dumps(result, indent=2) + "\n")
    if plot is not None:
        write_new_file(plot, speed_png(result))
    return result


def _check_outputs(table: Path | None, numbers: Path | None, plot: Path | None) -> None:
    """Raise before anything is measured for what could not be written after it."""
    if plot is not None:
        check_plots()
    outputs = {"a table": (table, ".md"), "a list of all numbers": (numbers, ".json"), "a plot": (plot, ".png")}
    for what, (path, kind) in outputs.items():
        if path is not None:
            check_new_file(path, (kind,), what)


def _seated(
    stack: ExitStack,
    found: Sequence[Candidate],
    protocol: SpeedProtocol,
    machine: Mapping[str, Any],
    progress: Scoring | None,
) -> tuple[list[Seat], dict[Seat, dict[str, Any]], int]:
    """Return the processes with everything loaded, what each said of that, and the bytes of the buffer that is read.

    llama.cpp sets its threads as it loads, so a GGUF file has a process for each number of them.
    """
    size, _ = buffer_bytes(*_room(machine))
    environment = {FAST: "0"} if protocol.plain else {}
    reader = Seat(None, protocol.threads, stack.enter_context(Worker("the read bandwidth", environment)).ask)
    loaded = {reader: reader.ask({"ask": "load", "engine": MEMORY, "name": MEMORY, "bytes": size})}
    for number, one in enumerate(found):
        each = [(threads,) for threads in protocol.threads] if one.kind == "gguf" else [protocol.threads]
        for threads in each:
            seat = Seat(number, threads, stack.enter_context(Worker(one.name, environment)).ask)
            asked: dict[str, Any] = {"engine": one.engine, "name": one.name, "path": str(one.path), "dtype": one.dtype}
            asked["trust_remote_code"] = one.trust_remote_code
            loaded[seat] = seat.ask({"ask": "load", **asked, "context": protocol.context, "threads": threads[0]})
        if progress is not None:
            progress("model loaded", number + 1, len(found))
    return list(loaded), loaded, size


def take_turns(
    seats: Sequence[Seat], protocol: SpeedProtocol, prompt: Sequence[int], progress: Scoring | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the answers of all seats, round by round and with its number; round 0, a short one, is there to warm up."""
    for number in range(protocol.rounds + 1):
        order = seats if number % 2 else seats[::-1]
        tokens = protocol.tokens if number else WARM_UP
        for threads in protocol.threads:
            for seat in order:
                if threads not in seat.threads:
                    continue
                given = seat.ask({"ask": "turn", "threads": threads, "prompt": list(prompt), "tokens": tokens})
                if given["threads"] != threads:
                    raise RecipeError(
                        f"{threads} threads were asked for, and {given['threads']} computed; give another number"
                    )
                yield {"round": number, "model": seat.model, **given}
        if progress is not None and number:
            progress("round", number, protocol.rounds)


def _memory(seats: Sequence[Seat], loaded: Mapping[Seat, dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return for each model what loading and generating took; of several processes, the one with the highest peak."""
    found: list[dict[str, Any]] = [{}] * count
    for seat in seats:
        if seat.model is not None:
            own = loaded[seat] | seat.ask({"ask": "memory"})
            found[seat.model] = max(found[seat.model], own, key=lambda one: one.get("peak", 0))
    return found


def _notes(found: Sequence[Candidate], protocol: SpeedProtocol, machine: Mapping[str, Any]) -> list[str]:
    """Return what to know about the models' places, and about this machine at the moment."""
    cores, most = machine["cores"], max(protocol.threads)
    notes = [note for one in found for note in one.notes]
    notes += filter(None, (buffer_bytes(*_room(machine))[1],))
    if most > cores:
        notes.append(f"{most} threads are more than the {cores} cores that this process may use")
    return notes


def _room(machine: Mapping[str, Any]) -> tuple[int | None, int]:
    return machine["cache_bytes"], machine["available_bytes"]


def _versions(ggufs: Sequence[Path]) -> dict[str, str]:
    from importlib import metadata

    return versions() | ({"xllamacpp": metadata.version("xllamacpp")} if ggufs else {})
