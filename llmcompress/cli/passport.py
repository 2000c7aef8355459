"""The command that tells what adapters of the dense model are worth; `app` lists it among the others."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from llmcompress.cli.options import AsJson, Device, Model, Quiet, Text, TrustRemoteCode, Verbose
from llmcompress.cli.terminal import Terminal
from llmcompress.cli.views import passport_view


def passport(
    model: Model,
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Folders or Hub ids of PEFT adapters.")],
    against: Annotated[str, typer.Option(metavar="DENSE", help="The model that both were made from.")],
    text: Text = None,
    windows: Annotated[int, typer.Option(min=2, help="Windows of text.")] = 8,
    length: Annotated[int, typer.Option(min=4, help="Tokens in a window.")] = 256,
    save: Annotated[bool, typer.Option("--save", help="Keep it in MODEL, for its card.")] = False,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Show how much of its gain each LoRA adapter that was trained on DENSE keeps on MODEL.

    Example: llmcompress passport small my-lora --against smollm2 --text mine.txt
    """
    with Terminal(as_json, verbose, quiet) as terminal:
        from llmcompress.evaluation.adapter_transfer import passport as run
        from llmcompress.evaluation.adapter_transfer import save_passport
        from llmcompress.evaluation.protocol import Protocol

        found = run(
            model,
            adapters,
            against,
            Protocol(text=text, windows=windows, length=length),
            device=device,
            progress=partial(terminal.scoring, "adapter"),
            trust_remote_code=trust_remote_code,
        )
        if save:
            save_passport(Path(model), found)
        terminal.show(found.to_json(), passport_view)
