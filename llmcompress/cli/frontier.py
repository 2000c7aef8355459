"""The command that compresses a model to many sizes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcompress.cli.compress import build_recipe
from llmcompress.cli.options import (
    BatchSize,
    Length,
    Limit,
    Model,
    Revision,
    Seed,
    Settings,
    Tasks,
    Text,
    Tune,
    Windows,
    command,
)
from llmcompress.cli.scores import build_protocol
from llmcompress.cli.tables import build_table
from llmcompress.cli.terminal import Terminal
from llmcompress.evaluation.protocol import Protocol
from llmcompress.reporting.tables import Row, frontier_table

if TYPE_CHECKING:
    from rich.console import RenderableType


@command("device", "trust_remote_code")
def frontier(
    terminal: Terminal,
    model: Model,
    output: Annotated[
        Path, typer.Option("--output-dir", "-o", metavar="OUT", help="A new folder, or that of a sweep to resume.")
    ],
    recipes: Annotated[
        list[str] | None,
        typer.Argument(metavar="RECIPE...", help="YAML files or names, one line in the plot each. Optional."),
    ] = None,
    bpw: Annotated[
        str | None,
        typer.Option("--bpw", help="Budgets in bits per weight of the decoder's linear layers: 1.25,1.6,2."),
    ] = None,
    sizes: Annotated[str | None, typer.Option("--sizes", help="Budgets for all weight files: 30MB,40MB.")] = None,
    peers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON file with results of other tools, to plot beside yours.")
    ] = None,
    text: Text = None,
    windows: Windows = Protocol.windows,
    length: Length = Protocol.length,
    tasks: Tasks = None,
    limit: Limit = None,
    batch_size: BatchSize = Protocol.batch_size,
    tune: Tune = False,
    settings: Settings = None,
    revision: Revision = None,
    seed: Seed = None,
    **access: Any,
) -> None:
    """Compress MODEL to several sizes, score each, and plot quality over size.

    The options for layers are measured once for all sizes. An interrupted sweep resumes.

    Example: llmcompress frontier smollm2 --bpw 1.25,1.6,2,2.5,3 -o curve
    """
    from llmcompress.pipeline.frontier import SweepCallbacks
    from llmcompress.pipeline.frontier import frontier as run
    from llmcompress.pipeline.frontier_inputs import budgets, read_peers
    from llmcompress.recipe.overrides import Change

    wanted = budgets(bpw, sizes)
    first = wanted[0].target.model_dump(exclude_none=True)
    target = Change("target", first, "--sizes" if bpw is None else "--bpw", stay=("engine",))
    built = [build_recipe(recipe, settings, seed, target, tune) for recipe in recipes or (None,)]
    results = () if peers is None else read_peers(peers, "bytes" if bpw is None else "bpw")
    protocol = build_protocol(text, windows, length, tasks, limit, None, batch_size)
    callbacks = SweepCallbacks(terminal.stage, terminal.pricing, terminal.progress, terminal.training)
    access["revision"] = revision
    points = run(model, built, wanted, output, protocol, peers=results, callbacks=callbacks, **access)
    terminal.show(points, frontier_view)
    terminal.say(f"plot    {output / 'frontier.png'} and .svg; table {output / 'frontier.md'}")


def frontier_view(result: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the table of a frontier: one model at many sizes."""
    table = frontier_table(result)
    yield build_table(table.headings, table.rows, table.numbers)
    yield from table.notes
