"""The command that makes decoder blocks narrower; `app` lists it among the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmcompress.cli.options import AsJson, Device, Model, Quiet, Revision, TrustRemoteCode, Verbose, planned_output
from llmcompress.cli.terminal import Terminal
from llmcompress.cli.views import narrowed_view
from llmcompress.reporting.tables import summarized


def narrow(
    model: Model,
    output: Annotated[
        Path | None, typer.Option("--output-dir", "-o", metavar="OUT", help="A new or an empty folder.")
    ] = None,
    neurons: Annotated[
        float | None, typer.Option(help="Neurons of each feed-forward layer that stay, or their share below 1.")
    ] = None,
    kv_heads: Annotated[
        int | None, typer.Option(help="Key-value heads that stay in each block, with the query heads that read them.")
    ] = None,
    per_block: Annotated[
        bool,
        typer.Option("--per-block", help="Units of each block as predictions need them there, as many bytes in all."),
    ] = False,
    by: Annotated[
        str, typer.Option(metavar="SCORE", help="energy, subset (least error of the layer), or random as a control.")
    ] = "energy",
    text: Annotated[str, typer.Option(help="What is read to choose by: a file, a data set, or stdlib.")] = "stdlib",
    samples: Annotated[
        int, typer.Option(min=2, help="Sequences of text that are read, a ninth of them to judge on.")
    ] = 36,
    seed: Annotated[int, typer.Option(min=0, help="Of --by random.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the predicted damage and the size; write nothing.")
    ] = False,
    revision: Revision = None,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Write MODEL with fewer neurons or heads in every block: faster in any engine, and a student for `distill`.

    Example: llmcompress narrow smollm2 --neurons 0.75 -o slim
    """
    with Terminal(as_json, verbose, quiet) as terminal:
        from llmcompress.surgery.width.narrow import narrow as run

        report = run(
            model,
            planned_output(output, dry_run),
            neurons=neurons,
            kv_heads=kv_heads,
            per_block=per_block,
            by=by,
            text=text,
            samples=samples,
            seed=seed,
            revision=revision,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=terminal.progress,
        )
        terminal.warn(summarized(report.warnings))
        terminal.show(report.to_json(), narrowed_view)
