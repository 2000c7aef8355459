"""The commands about this machine: `bench` measures the speed of models on it, `doctor` checks it."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmcompress.cli.options import AsJson, Quiet, TrustRemoteCode, Verbose, command
from llmcompress.cli.terminal import Terminal, build_table
from llmcompress.reporting.tables import Row

if TYPE_CHECKING:
    from rich.console import RenderableType

UNHEALTHY = 1  # the exit code where something is wrong


def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders, Hub ids, or smollm2.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="DENSE", help="Measure this model too, and show every number as a ratio to it."),
    ] = None,
    gguf: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Also run this file in llama.cpp (package xllamacpp). Repeatable."),
    ] = None,
    threads: Annotated[
        str | None,
        typer.Option(metavar="NUMBERS", help="Numbers of threads, such as 1,2; by default one, and all cores."),
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate after the first one.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Times that every model is measured.")] = 5,
    dtype: Annotated[str, typer.Option(help="Precision of dense models: bfloat16, float16 or float32.")] = "bfloat16",
    plain: Annotated[bool, typer.Option("--plain", help="Run compressed models without fast kernels.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="A new .md file for the tables, or .json for all numbers."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A new .png file: speed over size, with quality as colour.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Measure speed and memory of models on this machine, and their use of its memory bandwidth.

    The models take turns, each in its own process.

    Example: llmcompress bench small --against smollm2 --threads 1,2
    """
    old = [word for word in models if as_json and (word == "-" or word.endswith(".json"))]  # `--json FILE`
    files = [Path(word) for word in (output, *old) if word not in (None, "-")]
    with Terminal(as_json and old in ([], ["-"]), verbose, quiet) as terminal:
        if old:
            terminal.warn([f"--json no longer takes {old[0]}: it prints the numbers, and -o FILE.json writes them"])
        from llmcompress.benchmark.measure import bench as run
        from llmcompress.benchmark.protocol import SpeedProtocol, parse_threads
        from llmcompress.runtime.load import usable_cores

        counts = parse_threads(threads, usable_cores())
        result = run(
            [model for model in models if model not in old],
            SpeedProtocol(counts, prompt, tokens, rounds, dtype, plain),
            against=against,
            ggufs=gguf or (),
            table=next((file for file in files if file.suffix != ".json"), None),
            numbers=next((file for file in files if file.suffix == ".json"), None),
            plot=plot,
            command=_command_line(),
            progress=terminal.scoring,
            trust_remote_code=trust_remote_code,
        )
        terminal.show(result, speed_view)


def _command_line() -> str | None:
    """Return the command as it was typed, or None if another program runs it."""
    words = sys.argv[1:]
    return shlex.join(["llmcompress", *words]) if words[:1] == ["bench"] else None


def speed_view(result: Row, every: bool) -> Iterator[RenderableType]:
    """Yield speeds by threads and model, sizes and memory, and what the numbers mean."""
    from llmcompress.benchmark.summary import size_table, speed_notes, speed_table

    for table in (speed_table(result), size_table(result)):
        yield build_table(table.headings, table.rows, table.numbers)
        yield ""
    yield from speed_notes(result)


@command(output=("as_json", "quiet"))
def doctor(terminal: Terminal) -> None:
    """Check this machine and environment for what is missing or known to fail.

    Looks at Python, torch, cores, memory, disk, GPU and packages. Exits with 1 if there is an error; warnings do not
    count.

    Example: llmcompress doctor
    """
    from huggingface_hub import constants

    from llmcompress.models.dense.gguf_model import cache_folder
    from llmcompress.runtime.doctor import OPTIONAL, find_faults
    from llmcompress.runtime.facts import gather

    facts = gather(cache_folder(), Path(constants.HF_HUB_CACHE), tuple(OPTIONAL))
    findings = find_faults(facts)
    healthy = all(finding.level != "error" for finding in findings)
    packages = [
        {"package": name, "version": facts.packages[name], "enables": enables, "install": install}
        for name, (enables, install) in OPTIONAL.items()
    ]
    result = {"healthy": healthy, "findings": list(map(asdict, findings)), "optional": packages}
    terminal.show({**result, "facts": asdict(facts)}, doctor_view)
    if not healthy:
        raise typer.Exit(UNHEALTHY)


def doctor_view(result: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the parts of the machine, the features of optional packages, and what is wrong."""
    yield from _machine_lines(result["facts"])
    cells = []
    for row in result["optional"]:
        enables = row["enables"] if row["version"] else f"{row['enables']}: {row['install']}"
        cells.append((row["package"], row["version"] or "-", enables))
    yield ""
    yield build_table(("optional package", "version", "enables"), cells)
    yield ""
    for finding in result["findings"]:
        yield f"{finding['level']}: {finding['sentence']}"
    count = Counter(finding["level"] for finding in result["findings"])
    yield f"{_count(count['error'], 'error')}, {_count(count['warning'], 'warning')}"


def _machine_lines(facts: Row) -> Iterator[str]:
    """Yield a line for each part of the machine."""
    packages, torch = facts["packages"], facts["torch"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers") if packages.get(name))
    yield f"python  {'.'.join(map(str, facts['python']))} on {facts['system']}; {versions}"
    if torch["error"] is None:
        libraries = f"{torch['blas']} {'with' if torch['onednn'] else 'without'} oneDNN, {torch['capability']} kernels"
        products = f"float32 products {'precise' if torch['precise'] else 'rounded'}"
        threads = _count(torch["threads"], "thread")
        yield f"torch   for {torch['gpu_build'] or 'CPUs alone'}; {libraries}, {products}, {threads}"
        flags = ", ".join(torch["flags"]) or "none that torch knows of"
        yield f"cpu     {torch['cpu'] or 'unknown'}: {_count(facts['cores'], 'usable core')}; {flags}"
    yield f"memory  {_gigabytes(facts['memory'])} usable, {_gigabytes(facts['available'])} free"
    for name, key in (("cache", "cache"), ("hub", "hub_cache"), ("here", "current")):
        folder = facts[key]
        state = "" if folder["writable"] else ", not writable"
        yield f"{name:<8}{_gigabytes(folder['free'])} free at {folder['path']}{state}"
    gpus = [f"{gpu['name']} ({_gigabytes(gpu['memory'])})" for gpu in torch["gpus"]]
    if gpus:
        yield f"gpu     {', '.join(gpus)}; driver {facts['driver'] or 'unknown'}"
    else:
        yield f"gpu     none that torch finds; driver {facts['driver']}" if facts["driver"] else "gpu     none"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _count(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"
