"""The command that writes a smaller size of a compressed checkpoint; `app` lists it among the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmcompress.cli.options import AsJson, Quiet, TrustRemoteCode, Verbose
from llmcompress.cli.terminal import Terminal
from llmcompress.cli.views import shrunk_view


def shrink(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What compress or distill wrote.")],
    rank: Annotated[int, typer.Option(min=0, help="Components that stay in each low-rank term; 0: none.")],
    output: Annotated[Path, typer.Option("--output-dir", "-o", metavar="OUT", help="A new or an empty folder.")],
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Write FOLDER at a smaller size, with the first components of its low-rank terms alone.

    Example: llmcompress shrink small --rank 16 -o smaller
    """
    with Terminal(as_json, verbose, quiet) as terminal:
        from llmcompress.surgery.shrink import shrink as run

        found = run(folder, rank, output, trust_remote_code=trust_remote_code)
        terminal.show(found.to_json(), shrunk_view)
