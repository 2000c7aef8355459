"""The section `regrow:` of a distillation: pruned matrices that are dense for a phase."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmcompress.recipe.patterns import Matching


class Regrowth(Matching):
    """The pruned matrices that train dense, and what decides which of their weights stay."""

    match: tuple[str, ...] = Field(default=("*",), min_length=1, description="as in the rules of a compression")
    start: Literal["zero", "teacher"] = Field(
        default="zero", description="where weights that come back start: at zero, or at the teacher's"
    )
    by: Literal["input_norms", "magnitude"] = Field(
        default="input_norms",
        description="what the weights that stay have most of: their size times the norm of their inputs on training "
        "text, or their size alone",
    )
