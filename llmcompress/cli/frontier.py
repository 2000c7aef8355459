"""The command that makes a model at many sizes; `cli` lists it among the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmcompress.cli.options import (
    AsJson,
    BatchSize,
    Device,
    Length,
    Limit,
    Model,
    Quiet,
    Revision,
    Seed,
    Settings,
    Tasks,
    Text,
    TrustRemoteCode,
    Tune,
    Verbose,
    Windows,
    asked_recipe,
    protocol_of,
)
from llmcompress.cli.terminal import Terminal
from llmcompress.cli.views import frontier_view
from llmcompress.evaluation.protocol import Protocol


def frontier(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output-dir", "-o", metavar="OUT", help="A new folder, or that of a sweep to resume.")
    ],
    recipes: Annotated[
        list[str] | None,
        typer.Argument(metavar="RECIPE...", help="YAML files or names, a line of the plot for each; may be left out."),
    ] = None,
    bpw: Annotated[
        str | None, typer.Option("--bpw", help="Budgets in bits per weight of the decoder's linears: 1.25,1.6,2.")
    ] = None,
    sizes: Annotated[str | None, typer.Option("--sizes", help="Budgets in bytes of all files: 30MB,40MB.")] = None,
    peers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON: what other tools reached, to draw beside.")
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
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Compress MODEL to many sizes, score each, and plot quality over size. Options are priced once for all budgets.
    An interrupted sweep resumes.

    Example: llmcompress frontier smollm2 --bpw 1.25,1.6,2,2.5,3 -o curve
    """
    with Terminal(as_json, verbose, quiet) as terminal:
        from llmcompress.pipeline.frontier.budgets import budgets
        from llmcompress.pipeline.frontier.peers import read_peers
        from llmcompress.pipeline.frontier.sweep import SweepCallbacks
        from llmcompress.pipeline.frontier.sweep import frontier as run
        from llmcompress.recipe.overrides import Change

        wanted = budgets(bpw, sizes)
        first = wanted[0].target.model_dump(exclude_none=True)
        target = Change("target", first, "--sizes" if bpw is None else "--bpw", stay=("engine",))
        asked = [asked_recipe(one, settings, seed, target, tune) for one in recipes or (None,)]
        others = () if peers is None else read_peers(peers, "bytes" if bpw is None else "bpw")
        protocol = protocol_of(text, windows, length, tasks, limit, None, batch_size)
        told = SweepCallbacks(terminal.stage, terminal.pricing, terminal.progress, terminal.training)
        how: dict[str, Any] = {"revision": revision, "device": device, "trust_remote_code": trust_remote_code}
        found = run(model, asked, wanted, output, protocol, peers=others, told=told, **how)
        terminal.show(found, frontier_view)
        if not as_json and not quiet:
            typer.echo(f"plot    {output / 'frontier.png'} and .svg; table {output / 'frontier.md'}")
