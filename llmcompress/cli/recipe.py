"""The commands on recipes themselves: their JSON schema, and one of them with every value."""

from __future__ import annotations

from typing import Annotated

import typer

from llmcompress.cli.options import AsJson, RecipeFile, Settings
from llmcompress.cli.terminal import Terminal

IsDistillation = Annotated[
    bool, typer.Option("--distillation", help="Of `distill` rather than of `compress`.", show_default=False)
]

recipe = typer.Typer(help="Show the schema of recipes, or one recipe with every value.", no_args_is_help=True)


@recipe.command()
def schema(distillation: IsDistillation = False) -> None:
    """Print the JSON schema of recipes: every key, method and loss. Editors complete and check recipes by it.

    Example: llmcompress recipe schema > recipe.schema.json
    """
    with Terminal(as_json=True) as terminal:
        from llmcompress.recipe.compression import Recipe
        from llmcompress.recipe.distillation import Distillation
        from llmcompress.recipe.json_schema import json_schema

        terminal.show(json_schema(Distillation if distillation else Recipe), lambda _values, _every: ())


@recipe.command()
def show(
    recipe: RecipeFile,
    distillation: IsDistillation = False,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Check RECIPE and print it with every value, defaults too.

    Example: llmcompress recipe show gptq-4-g64 --set rules[0].steps[0].bits=3
    """
    with Terminal(as_json) as terminal:
        from pydantic import BaseModel

        from llmcompress.recipe.compression import Recipe
        from llmcompress.recipe.distillation import Distillation
        from llmcompress.recipe.read import dump, read_as

        found: BaseModel = read_as(Distillation if distillation else Recipe, recipe, settings or ())
        terminal.show(found.model_dump(mode="json"), lambda _values, _every: [dump(found).rstrip()])
