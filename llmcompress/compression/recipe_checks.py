"""Checks of a recipe against the model that it is for, before anything is planned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llmcompress.errors import RecipeError
from llmcompress.methods.layer import StepConfig, methods
from llmcompress.models.auto_class import check_causal
from llmcompress.models.dense import DenseModel
from llmcompress.models.families import Architecture
from llmcompress.recipe.compression import Recipe
from llmcompress.weight.modules import row_scale


def check_task(source: DenseModel, recipe: Recipe) -> None:
    """Raise InputError for what a recipe asks of a model that does not predict the next token."""
    asked = {
        "target:": recipe.target,
        "distill:": recipe.distill,
        "fuse:": recipe.fuse,
        "embeddings:": recipe.embeddings,
        "head:": recipe.head,
        "calibration by dataset: self": recipe.calibration is not None and recipe.calibration.dataset == "self",
    }
    for name in (name for name, value in asked.items() if value):
        check_causal(source.config, name)


def check_calibration(recipe: Recipe) -> None:
    """Raise RecipeError if a method requires data and the recipe has none."""
    if recipe.calibration is not None:
        return
    lists = (*(rule.steps for rule in recipe.rules), recipe.embeddings, recipe.head)
    hungry = sorted({name for steps in lists for name in _hungry(steps)})
    others = {"asymmetric": recipe.asymmetric, "fuse: awq": recipe.fuse is not None and recipe.fuse.awq}
    for name in (name for name, asked in others.items() if asked and not hungry):
        raise RecipeError(f"{name} requires calibration; add it to the recipe, or leave {name.split(':')[0]} out")
    if hungry:
        frugal = ", ".join(name for name, one in sorted(methods().items()) if one.data_free)
        raise RecipeError(
            f"{', '.join(hungry)} requires calibration; add it to the recipe, such as calibration: {{dataset: stdlib}} "
            f"(or self: the model writes the text), or use methods that need none: {frugal}"
        )


def _hungry(steps: Sequence[StepConfig]) -> Iterator[str]:
    """Yield the methods of these steps that require calibration."""
    for step in steps:
        if step.presumes:
            return
        if not methods()[step.method].data_free:
            yield step.method


def check_tables(recipe: Recipe, arch: Architecture, source: DenseModel) -> None:
    """Raise RecipeError for steps that the token table or the output head of this model cannot have."""
    if recipe.head and arch.tied:
        raise RecipeError(f"head: the output head of {source.name} is its token table; give its steps as embeddings:")
    if recipe.head and (not arch.head or f"{arch.head}.weight" not in source.tensors):
        raise RecipeError(f"head: {source.name} has no output head of its own; leave head: out")
    if not recipe.embeddings:
        return
    try:
        row_scale(source.skeleton().get_input_embeddings())
    except TypeError as error:
        raise RecipeError(f"embeddings: {error}; leave embeddings: out") from error
    hungry = list(_hungry(recipe.embeddings))
    if hungry and not arch.tied:
        raise RecipeError(
            f"embeddings: {hungry[0]} learns from a layer's inputs, and a table that is only looked up has none; "
            f"use rtn"
        )
