"""The section `regrow:` of a distillation: pruned matrices that are dense for a phase."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llmcompress.recipe.patterns import Matching


class Regrowth(Matching):
    """The pruned matrices that train dense, and what decides which of their weights stay."""

    match: tuple[str, ...] = Field(default=("*",), min_length=1, description="as in the rules of a compression")
    start: Literal["zero", "teacher"] = Field(
        default="zero", description="where weights that come back start: at zero, or at the teacher's"
    )
    by: Literal["input_norms", "magnitude", "learned"] = Field(
        default="input_norms",
        description="what the weights that stay have most of: their size times the norm of their inputs on training "
        "text, their size alone, or the former with scores that learn, so that a mask is there from the first step on",
    )
    rank: int | None = Field(default=None, ge=1, description="of learned scores, which are low-rank; null: 4")
    penalty: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of itself that a weight loses in a step if it is much smaller than those that would stay; "
        "those much larger lose nothing; null: none do",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Regrowth:
        if self.by != "learned" and self.rank is not None:
            raise ValueError(f"rank is of learned scores, and by is {self.by}; leave it out, or set by to learned")
        if self.by == "learned" and self.start == "zero":
            raise ValueError("scores of weights that are zero have no gradient to learn from; set start to teacher")
        if self.by == "learned" and self.penalty is not None:
            raise ValueError("penalty is on weights that a learned mask leaves out anyway; leave out one of the two")
        return self

    @property
    def moves(self) -> bool:
        """True if masks change in every step, rather than at the end alone."""
        return self.by == "learned" or self.penalty is not None
