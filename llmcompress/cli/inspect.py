"""The commands that show what a folder holds: `inspect` on the terminal, `report` as an HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmcompress.cli.compress import report_view
from llmcompress.cli.options import Checkpoint, command
from llmcompress.cli.terminal import Terminal
from llmcompress.models.files import file_names
from llmcompress.reporting.tables import Row, merge_sentences

if TYPE_CHECKING:
    from rich.console import RenderableType


@command()
def inspect(terminal: Terminal, folder: Checkpoint) -> None:
    """Show what is inside a compressed model: how layers are stored, their bits and errors, and the recipe.

    Example: llmcompress inspect small -v
    """
    from llmcompress.recipe.read import dump, read_recipe
    from llmcompress.reporting.report import read_all

    values, recipe = read_all(folder), read_recipe(folder / file_names.RECIPE)
    terminal.warn(merge_sentences(values["warnings"]))
    if terminal.as_json:
        values["recipe"] = recipe.model_dump(mode="json")
    terminal.show(values, report_view)
    terminal.say("\n" + dump(recipe).rstrip())


@command()
def report(
    terminal: Terminal,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that compress or distill wrote.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="A new .html file, outside of FOLDER.")
    ],
    generations: Annotated[
        Path | None,
        typer.Option(
            metavar="JSON", help='File of sentences to show side by side: {"prompt": {"model": "continuation"}}.'
        ),
    ] = None,
) -> None:
    """Write the report of FOLDER as one HTML page that needs no network: sizes, quality, layers, distillation, recipe.

    Example: llmcompress report small -o small.html
    """
    from llmcompress.reporting.html.page import read_generations, write_page

    texts = None if generations is None else read_generations(generations)
    terminal.show(write_page(folder, output, texts).to_json(), page_view)


def page_view(result: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the path and the size of a page, and the sections that it could not fill."""
    yield f"page    {result['output']} · {result['bytes'] / 1000:,.0f} kB"
    yield from (f"missing {sentence}" for sentence in result["missing"])
