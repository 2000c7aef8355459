"""The commands that score models; `app` lists them among the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmcompress.cli.options import (
    AsJson,
    BatchSize,
    ChatTemplate,
    Device,
    Domains,
    Length,
    Limit,
    Model,
    Quiet,
    Revision,
    Shots,
    Tasks,
    TaskSeed,
    Text,
    TrustRemoteCode,
    Verbose,
    Windows,
    protocol_of,
    refuse_failed,
)
from llmcompress.cli.terminal import Terminal
from llmcompress.cli.views import comparison_view, score_view
from llmcompress.evaluation.protocol import Protocol


def evaluate(
    model: Model,
    text: Text = None,
    windows: Windows = Protocol.windows,
    length: Length = Protocol.length,
    tasks: Tasks = None,
    limit: Limit = None,
    num_fewshot: Shots = None,
    batch_size: BatchSize = Protocol.batch_size,
    chat_template: ChatTemplate = False,
    against: Annotated[
        str | None, typer.Option(metavar="DENSE", help="Also KL and top-1 agreement with this model.")
    ] = None,
    revision: Revision = None,
    seed: TaskSeed = Protocol.seed,
    domains: Domains = None,
    save: Annotated[bool, typer.Option("--save", help="Score DENSE too, keep both in MODEL for its card.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", metavar="OUT", help="A new folder for the scores and lm-eval's own files."),
    ] = None,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Score MODEL, dense or compressed: perplexity, tasks, and the distance to the dense model.

    Example: llmcompress eval small --against smollm2 --tasks arc_easy --limit 100
    """
    with Terminal(as_json, verbose, quiet) as terminal:
        from llmcompress.evaluation.processes import launched
        from llmcompress.evaluation.score import score

        others = num_fewshot, batch_size, chat_template, seed, domains
        protocol = protocol_of(text, windows, length, tasks, limit, *others)
        with launched(device) as processes:
            found = score(
                model,
                protocol,
                revision=revision,
                against=against,
                save=save,
                output=output,
                device=processes.device,
                processes=processes,
                progress=terminal.scoring,
                trust_remote_code=trust_remote_code,
            )
        terminal.warn(found.get("warnings", ()))
        terminal.show(found, score_view)
        refuse_failed([found])


def compare(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL MODEL...", help="The others are compared with the first.")
    ],
    text: Text = None,
    windows: Windows = Protocol.windows,
    length: Length = Protocol.length,
    tasks: Tasks = None,
    limit: Limit = None,
    num_fewshot: Shots = None,
    batch_size: BatchSize = Protocol.batch_size,
    chat_template: ChatTemplate = False,
    seed: TaskSeed = Protocol.seed,
    domains: Domains = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="A new .md file for the table, or .json for all numbers."),
    ] = None,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Score models side by side, and mark which differ from the first by more than noise.

    Example: llmcompress compare smollm2 small smaller --tasks llmcompress_pairs -o table.md
    """
    with Terminal(as_json, verbose, quiet) as terminal:
        from llmcompress.evaluation.compare import compare as run
        from llmcompress.evaluation.processes import launched

        others = num_fewshot, batch_size, chat_template, seed, domains
        protocol = protocol_of(text, windows, length, tasks, limit, *others)
        with launched(device) as processes:
            how: dict[str, Any] = {"processes": processes, "progress": terminal.scoring}
            how["trust_remote_code"] = trust_remote_code
            found = run(models, protocol, output=output, device=processes.device, **how)
        terminal.show(found, comparison_view)
        refuse_failed(found["models"])
