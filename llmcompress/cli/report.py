"""The command that writes a checkpoint's report as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmcompress.cli.options import AsJson, Quiet, Verbose
from llmcompress.cli.terminal import Terminal
from llmcompress.reporting.tables import Row

if TYPE_CHECKING:
    from rich.console import RenderableType


def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that compress or distill wrote.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="A new .html file, outside of FOLDER.")
    ],
    generations: Annotated[
        Path | None,
        typer.Option(metavar="JSON", help='Sentences to show side by side: {"prompt": {"model": "continuation"}}.'),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Write the report of FOLDER as one HTML page that needs no network: sizes, quality, layers, distillation, recipe.

    Example: llmcompress report small -o small.html
    """
    with Terminal(as_json, verbose, quiet) as terminal:
        from llmcompress.reporting.html.files import read_generations
        from llmcompress.reporting.html.write import write_page

        texts = None if generations is None else read_generations(generations)
        terminal.show(write_page(folder, output, texts).to_json(), page_view)


def page_view(written: Row, _every: bool) -> Iterator[RenderableType]:
    """Yield the path and the size of a page, and the sections that it could not fill."""
    yield f"page    {written['output']} · {written['bytes'] / 1000:,.0f} kB"
    yield from (f"missing {sentence}" for sentence in written["missing"])
