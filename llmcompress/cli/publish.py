"""The commands that check a compressed model and hand it on: `verify`, `export` and `push`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcompress.cli.options import Checkpoint, Length, Out, Text, Windows, command
from llmcompress.cli.terminal import Terminal, build_table, size_change
from llmcompress.errors import RecipeError, format_bytes
from llmcompress.reporting.tables import Row

if TYPE_CHECKING:
    from rich.console import RenderableType


@command("device", "trust_remote_code")
def verify(
    terminal: Terminal,
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="A compressed model: a folder that compress or save_pretrained wrote, with --for too, or a GGUF file.",
        ),
    ],
    against: Annotated[
        str | None, typer.Option(metavar="DENSE", help="Also measure KL and top-1 agreement with this model.")
    ] = None,
    text: Text = None,
    windows: Windows = 4,
    length: Length = 512,
    **access: Any,
) -> None:
    """Check that the files of FOLDER are bit for bit as they were written, and that the model loads and runs.

    For what an engine loads, the numbers in its files are run here; the engine need not be installed.

    Example: llmcompress verify small --against smollm2
    """
    from llmcompress.evaluation.verify import verify as run

    result = run(folder, against, text, windows, length, progress=terminal.scoring, **access)
    terminal.warn(result.notes)
    terminal.show(result.to_json(), verified_view)


@command("trust_remote_code")
def export(
    terminal: Terminal,
    folder: Checkpoint,
    to: Annotated[
        str,
        typer.Option("--to", metavar="FORMAT", help="dense (bfloat16), compressed-tensors, gguf, mlx, exl3 or peft."),
    ],
    output: Out,
    allow_dense: Annotated[
        bool, typer.Option("--allow-dense", help="Store weights that the format cannot hold as 16-bit floats.")
    ] = False,
    round_to: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE", help="Round weights that gguf cannot hold to Q8_0, Q5_0 or Q4_0, where their width allows."
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=0, help="Components of low-rank terms to export, as shrink leaves them.")
    ] = None,
    **access: Any,
) -> None:
    """Write FOLDER in a format that other engines read, and say what that changed.

    Example: llmcompress export small --to dense -o small-dense
    """
    from llmcompress.formats.export import export as run

    if allow_dense and to in ("dense", "peft"):
        raise RecipeError(f"--allow-dense is for formats of few bits, and {to} is none; leave --allow-dense out")
    terminal.scoring(f"export to {to}", 0, 0)
    terminal.show(run(folder, output, to, allow_dense, round_to, rank=rank, **access).to_json(), exported_view)


@command("trust_remote_code")
def push(
    terminal: Terminal,
    folder: Checkpoint,
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub; created if it does not exist.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a repository that is created private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; created if it does not exist.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Verify FOLDER and list the files and their bytes; send nothing.")
    ] = False,
    **access: Any,
) -> None:
    """Verify FOLDER and publish it on the Hub with a model card, in one commit.

    The token comes from the environment.

    Example: llmcompress push small me/small --dry-run
    """
    from llmcompress.formats.hub import push as run

    terminal.scoring("verify" if dry_run else "verify and upload", 0, 0)

    def announce(files: Mapping[str, int]) -> None:
        lines = "".join(f"\n  {name}  {size:,}" for name, size in files.items())
        terminal.stage(f"{len(files)} files go to {repository}, with these bytes:{lines}")

    result = run(folder, repository, private=private, revision=revision, dry_run=dry_run, announce=announce, **access)
    terminal.show(result.to_json(), pushed_view)


def verified_view(result: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the findings of `verify` on a valid checkpoint."""
    yield f"files   {result['files']} as they were written · {format_bytes(result['bytes'])} of weights"
    yield f"model   {result['layers']} compressed layers, all tensors there and finite"
    if result["perplexity"] is None:
        yield f"text    finite numbers for {result['tokens']:,} tokens, of which none predicts the next"
    else:
        yield f"text    perplexity {result['perplexity']:.3f} over {result['tokens']:,} tokens"
    if result["kl"] is not None:
        yield f"dense   KL {result['kl']:.4f} nats/token · top-1 agreement {result['top1_agreement']:.4f}"


def exported_view(result: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the sizes of an export, and the properties it kept and changed."""
    yield f"sizes   {size_change(result)} of weights in {result['output']}"
    yield from (f"kept    {sentence}" for sentence in result["kept"])
    yield from (f"changed {sentence}" for sentence in result["changed"])


def pushed_view(result: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the files sent to the Hub; for a dry run, those it would send."""
    files = result["files"]
    yield build_table(("file", "bytes"), [(name, f"{size:,}") for name, size in files.items()], right=(1,))
    yield from (f"lacks   {name}" for name in result["unmeasured"])
    total = format_bytes(sum(files.values()))
    yield f"commit  {result['commit']} · {total}" if result["commit"] else f"nothing was sent · {total} would be"
