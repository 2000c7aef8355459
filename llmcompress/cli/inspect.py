"""The command that shows what is inside a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmcompress.cli.options import AsJson, Quiet, Verbose
from llmcompress.cli.terminal import Terminal
from llmcompress.cli.views import report_view
from llmcompress.models.files import file_names
from llmcompress.reporting.tables import summarized


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What compress wrote.")],
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Show what is inside a compressed checkpoint: expressions, bits and errors by layer, and its recipe.

    Example: llmcompress inspect small -v
    """
    with Terminal(as_json, verbose, quiet) as terminal:
        from llmcompress.recipe.read import dump, read_recipe
        from llmcompress.reporting import report

        values, recipe = report.gathered(folder), read_recipe(folder / file_names.RECIPE)
        terminal.warn(summarized(values["warnings"]))
        terminal.show(values | ({"recipe": recipe.model_dump(mode="json")} if as_json else {}), report_view)
        if not as_json and not quiet:
            typer.echo("\n" + dump(recipe), nl=False)
