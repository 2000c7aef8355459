"""The commands that show what there is: `recipes` and `recipe`, `inspect` on the terminal, `report` as an HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmcompress.cli.compress import report_view
from llmcompress.cli.options import AsJson, Checkpoint, RecipeFile, Settings, command
from llmcompress.cli.terminal import Terminal, build_table
from llmcompress.models.files import file_names
from llmcompress.reporting.tables import Row, merge_sentences

if TYPE_CHECKING:
    from rich.console import RenderableType

UNMEASURED = "-"
IsDistillation = Annotated[
    bool,
    typer.Option("--distillation", help="For recipes of `distill` instead of `compress`.", show_default=False),
]
recipe = typer.Typer(help="Print the schema of recipes, or one recipe with every value.", no_args_is_help=True)


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


@command(output=("as_json", "quiet"))
def recipes(terminal: Terminal) -> None:
    """List the recipes that come with llmcompress: what each is for, and what it measured on SmolLM2.

    Example: llmcompress recipes
    """
    from llmcompress.recipe.library import GROUPS, PROTOCOL, library, measurements

    rows = [{**asdict(entry), "path": str(entry.path)} for entry in library()]
    dense = asdict(measurements()["dense"])
    terminal.show({"protocol": PROTOCOL, "dense": dense, "groups": GROUPS, "recipes": rows}, recipes_view)


def recipes_view(values: Row, every: bool) -> Iterator[RenderableType]:
    """Yield a table for each group, and below them how the numbers were measured."""
    headings = ("bpw", "MB", "perplexity")
    for group, purpose in values["groups"].items():
        rows = [row for row in values["recipes"] if row["group"] == group]
        shown = headings if any(row["measured"] for row in rows) else ()
        cells = [(row["name"], *_numbers(row["measured"])[: len(shown)], row["purpose"]) for row in rows]
        yield f"{group}: {purpose}"
        table = build_table(("name", *shown, "for"), cells, right=range(1, 1 + len(shown)))
        table.columns[0].no_wrap = True
        yield table
        yield ""
    dense = ", ".join(map(" ".join, zip(_numbers(values["dense"]), headings, strict=True)))
    yield f"{values['protocol']} (dense: {dense}). {UNMEASURED}: not measured like that; see docs/results/."
    yield "A name serves in place of a file: llmcompress compress MODEL gptq-4-g64 -o OUT"


def _numbers(measured: Row | None) -> tuple[str, str, str]:
    if measured is None:
        return UNMEASURED, UNMEASURED, UNMEASURED
    perplexity = measured["perplexity"]
    shown = f"{perplexity:.2f}" if perplexity < 1e4 else f"{perplexity:.1e}"
    return f"{measured['bpw']:.3f}", f"{measured['megabytes']:.1f}", shown


@recipe.command()
def schema(distillation: IsDistillation = False, as_json: AsJson = True) -> None:
    """Print the JSON schema of recipes: every key, method and loss. Editors complete and check recipes with it.

    Example: llmcompress recipe schema > recipe.schema.json
    """
    with Terminal(as_json) as terminal:
        from llmcompress.recipe.compression import Recipe
        from llmcompress.recipe.distillation import Distillation
        from llmcompress.recipe.read import json_schema

        terminal.show(json_schema(Distillation if distillation else Recipe), lambda _values, _every: ())


@recipe.command()
@command(output=("as_json",))
def show(
    terminal: Terminal, recipe: RecipeFile, distillation: IsDistillation = False, settings: Settings = None
) -> None:
    """Check RECIPE and print it with every value, also those it leaves to their defaults.

    Example: llmcompress recipe show gptq-4-g64 --set 'rules[0].steps[0].bits=3'
    """
    from pydantic import BaseModel

    from llmcompress.recipe.compression import Recipe
    from llmcompress.recipe.distillation import Distillation
    from llmcompress.recipe.read import dump, read_as

    checked: BaseModel = read_as(Distillation if distillation else Recipe, recipe, settings or ())
    terminal.show(checked.model_dump(mode="json"), lambda _values, _every: [dump(checked).rstrip()])
