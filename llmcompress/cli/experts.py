"""The commands on the experts of a mixture; each shows its plan, and writes it unless it is a dry run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcompress.cli.options import AsJson, Device, Model, Quiet, Revision, Verbose, planned_output
from llmcompress.cli.terminal import Terminal
from llmcompress.cli.views import experts_view
from llmcompress.reporting.tables import summarized

if TYPE_CHECKING:
    from llmcompress.surgery.experts.report import ExpertsReport

Out = Annotated[Path | None, typer.Option("--output-dir", "-o", metavar="OUT", help="A new or an empty folder.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show which experts go and the predicted damage; write nothing.")
]
Judged = Annotated[
    str,
    typer.Option("--by", metavar="SCORE", help="reap (router weight times output), frequency, or random as a control."),
]
Read = Annotated[str, typer.Option("--text", help="What is read to judge experts: a file, a data set, or stdlib.")]
Samples = Annotated[int, typer.Option(min=2, help="Sequences of text that are read, a fifth of them to judge on.")]
RandomSeed = Annotated[int, typer.Option("--seed", min=0, help="Of --by random.")]

experts = typer.Typer(
    help="Remove, merge, condense or replace the experts of a mixture; the router and config follow.",
    no_args_is_help=True,
)


@experts.command()
def prune(
    model: Model,
    keep: Annotated[float, typer.Option(help="Experts that stay in each block, or their share below 1.")],
    output: Out = None,
    by: Judged = "reap",
    text: Read = "stdlib",
    samples: Samples = 20,
    seed: RandomSeed = 0,
    dry_run: DryRun = False,
    revision: Revision = None,
    device: Device = "cpu",
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Keep the most useful experts of every block of MODEL. Any engine that reads MODEL reads the result.

    Example: llmcompress experts prune Qwen/Qwen3-30B-A3B --keep 96 -o fewer
    """
    with Terminal(as_json, verbose, quiet) as terminal:
        from llmcompress.surgery.experts.prune import prune_experts

        how = _how(terminal, output, dry_run, text, samples, revision, device)
        _show(terminal, prune_experts(model, keep=keep, by=by, seed=seed, **how))


@experts.command()
def merge(
    model: Model,
    keep: Annotated[float, typer.Option(help="Experts that each block has then, or their share below 1.")],
    output: Out = None,
    text: Read = "stdlib",
    samples: Samples = 20,
    dry_run: DryRun = False,
    revision: Revision = None,
    device: Device = "cpu",
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Average experts of MODEL whose outputs are alike. Any engine that reads MODEL reads the result.

    Example: llmcompress experts merge Qwen/Qwen3-30B-A3B --keep 96 -o merged
    """
    with Terminal(as_json, verbose, quiet) as terminal:
        from llmcompress.surgery.experts.merge import merge_experts

        _show(
            terminal,
            merge_experts(model, keep=keep, **_how(terminal, output, dry_run, text, samples, revision, device)),
        )


@experts.command()
def condense(
    model: Model,
    output: Out = None,
    blocks: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="Of the blocks to condense: 13-18 or 4,7-9.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="Condense so many blocks, those that it changes least.")] = None,
    number: Annotated[
        int | None,
        typer.Option("--experts", help="Experts that stay on in each, beside shared ones; by default a token's."),
    ] = None,
    text: Read = "stdlib",
    samples: Samples = 20,
    dry_run: DryRun = False,
    revision: Revision = None,
    device: Device = "cpu",
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Put one dense layer of a few always-on experts in the place of routers and experts in some blocks of MODEL.

    Example: llmcompress experts condense Qwen/Qwen3-30B-A3B --count 6 -o condensed
    """
    with Terminal(as_json, verbose, quiet) as terminal:
        from llmcompress.surgery.depth.choose import block_numbers
        from llmcompress.surgery.experts.condense import condense_experts

        how = _how(terminal, output, dry_run, text, samples, revision, device)
        some = None if blocks is None else block_numbers(blocks)
        _show(terminal, condense_experts(model, blocks=some, count=count, experts=number, **how))


@experts.command()
def replace(
    model: Model,
    count: Annotated[float, typer.Option(help="Experts to replace in each block, or their share below 1.")],
    output: Out = None,
    share: Annotated[
        float | None, typer.Option(help="Of its bfloat16 size that a replaced expert takes; 0.25 by default.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the factors, instead of --share.")] = None,
    by: Judged = "reap",
    text: Read = "stdlib",
    samples: Samples = 20,
    seed: RandomSeed = 0,
    dry_run: DryRun = False,
    revision: Revision = None,
    device: Device = "cpu",
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Store the least useful experts of every block of MODEL as low-rank factors: a checkpoint as `compress` writes it.

    Example: llmcompress experts replace Qwen/Qwen3-30B-A3B --count 0.5 -o lighter
    """
    with Terminal(as_json, verbose, quiet) as terminal:
        from llmcompress.surgery.experts.replace import replace_experts

        how = _how(terminal, output, dry_run, text, samples, revision, device)
        _show(terminal, replace_experts(model, count=count, share=share, rank=rank, by=by, seed=seed, **how))


def _how(
    terminal: Terminal, output: Path | None, dry_run: bool, text: str, samples: int, revision: str | None, device: str
) -> dict[str, Any]:
    """Return the arguments that all ways share. Raises RecipeError for neither an output nor a dry run."""
    asked = {"text": text, "samples": samples, "revision": revision, "device": device}
    return asked | {"output": planned_output(output, dry_run), "progress": terminal.progress}


def _show(terminal: Terminal, report: ExpertsReport) -> None:
    terminal.warn(summarized(report.warnings))
    terminal.show(report.to_json(), experts_view)
