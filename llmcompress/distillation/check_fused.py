"""Checks for students whose dense weights were changed before compression, by `fuse:` in their recipe.

The teacher is the model as it was, so some of its weights and hidden states no longer compare with the student's.
"""

from __future__ import annotations

from pathlib import Path

from llmcompress.errors import RecipeError
from llmcompress.losses.loss import reads_states
from llmcompress.models.files.file_names import RECIPE
from llmcompress.recipe.distillation import Distillation
from llmcompress.recipe.read import read_recipe
from llmcompress.recipe.sections import Fuse


def fused_into(folder: Path) -> Fuse | None:
    """Return the `fuse:` of the recipe beside a student's weights. Raises RecipeError if the recipe cannot be read."""
    recipe = folder / RECIPE
    return read_recipe(recipe).fuse if recipe.is_file() else None


def check_fused(fuse: Fuse | None, recipe: Distillation) -> None:
    """Raise RecipeError if the recipe compares weights or hidden states in different bases."""
    if fuse is None:
        return
    stages = recipe.stages()
    if any(stage.latents == "teacher" for _, stage in stages):
        raise RecipeError(
            "latents: teacher requires the teacher's weights, and this student's were changed by fuse: before "
            "compression; set latents: codes"
        )
    if fuse.rotation and any(reads_states(term.of) for term in recipe.losses):
        raise RecipeError(
            "losses: fuse: rotated the hidden states of this student into another basis than its teacher's; leave "
            "losses on hidden states out"
        )
    if fuse.rotation and any(kind == "blockwise" for kind, _ in stages):
        raise RecipeError(
            "a blockwise phase compares hidden states, and fuse: rotated this student's into another basis than its "
            "teacher's; leave the phase out"
        )
