"""Speed and memory of models side by side, for `llmcompress bench`: a process for each, and turns among them.

The models take turns, round after round, in the opposite order every other round. So a disturbance of the machine hits
all of them alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from llmcompress.benchmark.candidate import Candidate, draw_prompt, find_candidates
from llmcompress.benchmark.protocol import SEED, WARM_UP, SpeedProtocol, buffer_bytes, machine_facts
from llmcompress.benchmark.summary import speed_markdown, summary
from llmcompress.benchmark.worker import Worker
from llmcompress.errors import RecipeError
from llmcompress.evaluation.evaluate import Scoring
from llmcompress.models.files.output import check_new_file, write_new_file
from llmcompress.reporting.plots import check_matplotlib, speed_png
from llmcompress.runtime.engines import untried_version
from llmcompress.runtime.facts import versions
from llmcompress.runtime.json_values import replace_nonfinite
from llmcompress.runtime.load import busy_note

MEMORY = "memory"  # the engine, and the name, of the process that measures the read bandwidth
FAST = "LLMCOMPRESS_FAST"  # 0: compressed models run without kernels


@dataclass(frozen=True)
class TurnTaker:
    """A process with everything loaded. `model`: the model's number, None for the read bandwidth; `threads`: numbers
    of threads that it has turns with; `ask`: sends it a request and returns the answer; `loading`: its first answer."""

    model: int | None
    threads: tuple[int, ...]
    ask: Callable[[dict[str, Any]], dict[str, Any]]
    loading: Mapping[str, Any]


def bench(
    models: Sequence[str | Path],
    protocol: SpeedProtocol,
    *,
    against: str | Path | None = None,
    ggufs: Sequence[str | Path] = (),
    table: str | Path | None = None,
    numbers: str | Path | None = None,
    plot: str | Path | None = None,
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
    against = None if against is None else str(against)
    candidates = find_candidates(models, ggufs, protocol, against, trust_remote_code)
    machine, load = machine_facts(), busy_note()
    size, short_memory = buffer_bytes(machine["cache_bytes"], machine["available_bytes"])
    with ExitStack() as stack:
        takers = _start_workers(stack, candidates, protocol, size, progress)
        turns = list(take_turns(takers, protocol, draw_prompt(candidates, protocol.prompt, SEED), progress))
        memory = _memory(takers, len(candidates))
    result = replace_nonfinite(
        {"command": command, "machine": machine, "versions": _versions(ggufs), "protocol": protocol.to_json()}
        | summary(candidates, turns, memory, against, machine["cache_bytes"], size)
        | {"turns": turns}
    )
    result["notes"] += [] if load is None else [f"{load}: measure again on a quiet one"]
    result["notes"] += [note for candidate in candidates for note in candidate.notes]
    result["notes"] += filter(None, [untried_version("llama.cpp") if ggufs else None, short_memory])
    if (most := max(protocol.threads)) > machine["cores"]:
        result["notes"].append(f"{most} threads are more than the {machine['cores']} cores that this process may use")
    _write_outputs(result, table, numbers, plot)
    return result


def _write_outputs(
    result: dict[str, Any], table: str | Path | None, numbers: str | Path | None, plot: str | Path | None
) -> None:
    if table is not None:
        write_new_file(Path(table), speed_markdown(result))
    if numbers is not None:
        write_new_file(Path(numbers), json.dumps(result, indent=2) + "\n")
    if plot is not None:
        write_new_file(Path(plot), speed_png(result))


def _check_outputs(table: str | Path | None, numbers: str | Path | None, plot: str | Path | None) -> None:
    """Raise for outputs that cannot be written, before anything is measured."""
    if plot is not None:
        check_matplotlib()
    outputs = {"a table": (table, ".md"), "a list of all numbers": (numbers, ".json"), "a plot": (plot, ".png")}
    for content, (path, kind) in outputs.items():
        if path is not None:
            check_new_file(Path(path), (kind,), content)


def _start_workers(
    stack: ExitStack, models: Sequence[Candidate], protocol: SpeedProtocol, buffer: int, progress: Scoring | None
) -> list[TurnTaker]:
    """Return a process for the read bandwidth, of a buffer of so many bytes, and those of the models, all loaded.

    llama.cpp sets its threads as it loads, so a GGUF file has a process for each number of them.
    """
    environment = {FAST: "0"} if protocol.plain else {}

    def start(name: str, model: int | None, threads: tuple[int, ...], request: dict[str, Any]) -> TurnTaker:
        ask = stack.enter_context(Worker(name, environment)).ask
        return TurnTaker(model, threads, ask, ask({"ask": "load", **request}))

    memory = {"engine": MEMORY, "name": MEMORY, "bytes": buffer}
    takers = [start("the read bandwidth", None, protocol.threads, memory)]
    if progress is not None:
        progress("model loaded", 0, len(models))
    for number, model in enumerate(models):
        request: dict[str, Any] = {"engine": model.engine, "name": model.name, "path": str(model.path)}
        request |= {"dtype": model.dtype, "trust_remote_code": model.trust_remote_code, "context": protocol.context}
        counts = [(threads,) for threads in protocol.threads] if model.kind == "gguf" else [protocol.threads]
        takers += [start(model.name, number, threads, request | {"threads": threads[0]}) for threads in counts]
        if progress is not None:
            progress("model loaded", number + 1, len(models))
    return takers


def take_turns(
    takers: Sequence[TurnTaker], protocol: SpeedProtocol, prompt: Sequence[int], progress: Scoring | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the answers of all processes, round by round, with the round's number; round 0 is a short warm-up."""
    for number in range(protocol.rounds + 1):
        order = takers if number % 2 else takers[::-1]
        tokens = protocol.tokens if number else WARM_UP
        for threads in protocol.threads:
            for taker in order:
                if threads not in taker.threads:
                    continue
                turn = taker.ask({"ask": "turn", "threads": threads, "prompt": list(prompt), "tokens": tokens})
                if turn["threads"] != threads:
                    raise RecipeError(
                        f"{threads} threads were asked for, and {turn['threads']} computed; give another number"
                    )
                yield {"round": number, "model": taker.model, **turn}
        if progress is not None:
            progress("round", number, protocol.rounds)


def _memory(takers: Sequence[TurnTaker], count: int) -> list[dict[str, Any]]:
    """Return for each model what loading and generating took; of several processes, the one with the highest peak."""
    memory: list[dict[str, Any]] = [{}] * count
    for taker in takers:
        if taker.model is not None:
            own = {**taker.loading, **taker.ask({"ask": "memory"})}
            memory[taker.model] = max(memory[taker.model], own, key=lambda entry: entry.get("peak", 0))
    return memory


def _versions(ggufs: Sequence[object]) -> dict[str, str]:
    return versions() | ({"xllamacpp": metadata.version("xllamacpp")} if ggufs else {})
