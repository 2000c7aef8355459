"""The command that leaves decoder blocks out; `app` lists it among the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmcompress.cli.options import AsJson, Device, Model, Quiet, Revision, TrustRemoteCode, Verbose
from llmcompress.cli.terminal import Terminal
from llmcompress.cli.views import dropped_view


def drop(
    model: Model,
    output: Annotated[Path, typer.Option("--output-dir", "-o", metavar="OUT", help="A new or an empty folder.")],
    blocks: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="Of the blocks to drop: 13-18 or 4,7-9.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="Drop so many blocks, as --by chooses them.")] = None,
    by: Annotated[
        str,
        typer.Option(
            metavar="MEASURE",
            help="Of --count: similarity (blocks in a row that change hidden states least) or damage (what predictions "
            "lose, found by trying; minutes).",
        ),
    ] = "similarity",
    text: Annotated[
        str | None, typer.Option(help="What --count reads: a file or a data set; else stdlib, or builtin for damage.")
    ] = None,
    revision: Revision = None,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Write MODEL without some of its decoder blocks: a student for `distill`, which mends it.

    Example: llmcompress drop smollm2 --count 6 -o short
    """
    with Terminal(as_json, verbose, quiet) as terminal:
        from llmcompress.models.files.staging import check_output
        from llmcompress.surgery.depth.choose import chosen_blocks
        from llmcompress.surgery.depth.drop import drop_blocks

        check_output(output, 0)
        how: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        read = {} if text is None else {"text": text}
        chosen = chosen_blocks(model, blocks, count, by, terminal.choosing, device=device, **read, **how)
        done = drop_blocks(model, chosen.blocks, output, **how)
        terminal.show(done.to_json() | {"damage": chosen.damage}, dropped_view)
