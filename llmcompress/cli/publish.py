"""Commands that check what was made and hand it on; `cli` lists them among the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from llmcompress.cli.options import AsJson, Device, Length, Quiet, Text, TrustRemoteCode, Verbose, Windows
from llmcompress.cli.terminal import Terminal
from llmcompress.cli.views import exported_view, pushed_view, verified_view


def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What compress or save_pretrained wrote.")],
    against: Annotated[
        str | None, typer.Option(metavar="DENSE", help="Also KL and top-1 agreement with this model.")
    ] = None,
    text: Text = None,
    windows: Windows = 4,
    length: Length = 512,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Check that FOLDER is as it was written, bit for bit, that it loads, and that it runs.

    Example: llmcompress verify small --against smollm2
    """
    with Terminal(as_json, verbose, quiet) as terminal:
        from llmcompress.evaluation.verify import verify as run

        found = run(folder, against, text, windows, length, device, terminal.scoring, trust_remote_code)
        terminal.warn(found.notes)
        terminal.show(found.to_json(), verified_view)


def export(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What compress wrote.")],
    to: Annotated[
        str,
        typer.Option("--to", metavar="FORMAT", help="dense (bfloat16), compressed-tensors, gguf, mlx, exl3 or peft."),
    ],
    output: Annotated[Path, typer.Option("--output-dir", "-o", metavar="OUT", help="A new or an empty folder.")],
    allow_dense: Annotated[
        bool, typer.Option("--allow-dense", help="What the format cannot hold becomes 16-bit floats.")
    ] = False,
    round_to: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="What gguf cannot hold is rounded to Q8_0, Q5_0 or Q4_0, where that fits."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Write FOLDER in a format that other engines read, and say what that changed.

    Example: llmcompress export small --to dense -o small-dense
    """
    with Terminal(as_json, verbose, quiet) as terminal:
        from llmcompress.formats.formats import export as run

        terminal.scoring(f"export to {to}", 0, 0)
        found = run(folder, output, to, allow_dense, round_to, trust_remote_code)
        terminal.show(found.to_json(), exported_view)


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What compress wrote.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="On the Hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="If it is made, make it private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; made if it is not there.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Verify, list files and bytes, send nothing.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Verify FOLDER and publish it on the Hub with a model card, in one commit; the token comes from the environment.

    Example: llmcompress push small me/small --dry-run
    """
    with Terminal(as_json, verbose, quiet) as terminal:
        from llmcompress.formats.hub import push as run

        terminal.scoring("verify" if dry_run else "verify and upload", 0, 0)

        def announce(files: Mapping[str, int]) -> None:
            listed = "".join(f"\n  {name}  {size:,}" for name, size in files.items())
            terminal.stage(f"to {repository} go {len(files)} files, with their bytes:{listed}")

        how: dict[str, Any] = {"private": private, "revision": revision, "trust_remote_code": trust_remote_code}
        found = run(folder, repository, dry_run=dry_run, announce=announce, **how)
        terminal.show(found.to_json(), pushed_view)
