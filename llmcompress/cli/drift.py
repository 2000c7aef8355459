"""The command that shows where a model leaves its dense one; `app` lists it among the others."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from llmcompress.cli.options import AsJson, Device, Model, Quiet, Revision, Text, TrustRemoteCode, Verbose
from llmcompress.cli.terminal import Terminal
from llmcompress.cli.views import drift_view


def drift(
    model: Model,
    against: Annotated[str, typer.Option(metavar="DENSE", help="The model that it was made from.")],
    text: Text = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of text.")] = 8,
    length: Annotated[int, typer.Option(min=4, help="Tokens in a window.")] = 512,
    revision: Revision = None,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Show how far hidden states of MODEL are from those of the dense model, block by block.

    Example: llmcompress drift small --against smollm2
    """
    with Terminal(as_json, verbose, quiet) as terminal:
        from llmcompress.evaluation.drift import drift as run
        from llmcompress.evaluation.protocol import Protocol

        found = run(
            model,
            against,
            Protocol(text=text, windows=windows, length=length),
            revision=revision,
            device=device,
            progress=partial(terminal.scoring, "block"),
            trust_remote_code=trust_remote_code,
        )
        terminal.show(found.to_json(), drift_view)
