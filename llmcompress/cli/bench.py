"""The command that measures speed and memory."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmcompress.cli.options import Quiet, TrustRemoteCode, Verbose
from llmcompress.cli.terminal import Terminal
from llmcompress.cli.views import new_table
from llmcompress.reporting.tables import Row

if TYPE_CHECKING:
    from rich.console import RenderableType

STANDARD_OUTPUT = Path("-")


def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders, Hub ids or smollm2.")],
    against: Annotated[
        str | None, typer.Option(metavar="DENSE", help="Measured too; everything also as a ratio to it.")
    ] = None,
    gguf: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Also this file in llama.cpp, by the package xllamacpp; repeatable."),
    ] = None,
    threads: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="As in 1,2; by default one thread and all cores.")
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate after the first one.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every model.")] = 5,
    dtype: Annotated[str, typer.Option(help="Of dense models: bfloat16, float16 or float32.")] = "bfloat16",
    plain: Annotated[bool, typer.Option("--plain", help="Compressed models run without kernels.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="A new .md file for the tables.")
    ] = None,
    numbers: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="A new .json file for every number; - for standard output."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A new .png file: speed over size, quality as colour.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Measure how fast models generate here, what memory they take, and how much of the memory's bandwidth they use.
    They take turns, each in a process of its own.

    Example: llmcompress bench small --against smollm2 --threads 1,2
    """
    as_json = numbers == STANDARD_OUTPUT
    with Terminal(as_json, verbose, quiet) as terminal:
        from llmcompress.benchmark.measure import bench as run
        from llmcompress.benchmark.protocol import SpeedProtocol, parse_threads
        from llmcompress.runtime.load import usable_cores

        counts = parse_threads(threads, usable_cores())
        found = run(
            models,
            SpeedProtocol(counts, prompt, tokens, rounds, dtype, plain),
            against=against,
            ggufs=gguf or (),
            table=output,
            numbers=None if as_json else numbers,
            plot=plot,
            command=_typed(),
            progress=terminal.scoring,
            trust_remote_code=trust_remote_code,
        )
        terminal.show(found, speed_view)


def _typed() -> str | None:
    """Return the command as it was typed; None where another program runs it."""
    words = sys.argv[1:]
    return shlex.join(["llmcompress", *words]) if words[:1] == ["bench"] else None


def speed_view(found: Row, _every: bool) -> Iterator[RenderableType]:
    """Yield speeds by threads and model, sizes and memory, and what the numbers mean."""
    from llmcompress.benchmark.table import size_cells, speed_cells, speed_notes

    for names, cells in (speed_cells(found), size_cells(found)):
        table = new_table(names, right=[place for place, name in enumerate(names) if name not in ("model", "engine")])
        for row in cells:
            table.add_row(*row)
        yield table
        yield ""
    yield from speed_notes(found)
