"""The section `regrow:` of a distillation: pruned matrices that are dense for a phase."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llmcompress.recipe.patterns import Matching

RANK = 4  # of learned scores: under 2 % as many numbers as a matrix of a small model has


class Regrowth(Matching):
    """The pruned matrices that train dense, and what decides which of their weights stay."""

    match: tuple[str, ...] = Field(default=("*",), min_length=1, description="as in the rules of a compression")
    start: Literal["zero", "teacher"] = Field(
        default="zero",
        description="where weights that come back start: at zero, or at the teacher's; there all do if masks learn",
    )
    by: Literal["input_norms", "magnitude", "learned"] = Field(
        default="input_norms",
        description="what the weights that stay have most of: their size times the norm of their inputs on training "
        "text, their size alone, or the former with scores that learn, so that a mask is there from the first step on",
    )
    rank: int | None = Field(
        default=None, ge=1, description=f"of learned scores, which are low-rank; null: {RANK} if scores learn"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Regrowth:
        if self.by != "learned" and self.rank is not None:
            raise ValueError(f"rank is of learned scores, and by is {self.by}; leave it out, or set by to learned")
        if self.by == "learned" and self.start == "zero":
            raise ValueError("scores of weights that are zero have no gradient to learn from; set start to teacher")
        return self
