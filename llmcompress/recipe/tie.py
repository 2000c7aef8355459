"""The section `tie:` of a recipe: decoder blocks that have their matrices in common, each with a term of its own.

    tie: {blocks: 15, start: average, term: {method: eora, rank: 64, factor_bits: 4}}

Relaxed Recursive Transformers (arXiv 2410.20672): one block's matrices serve several depths, loosened at each depth by
a low-rank term. The recipe's rules compress what blocks have in common, as they compress any other matrix.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from llmcompress.methods.layer import StepConfig
from llmcompress.methods.solvers.low_rank import LowRankConfig
from llmcompress.recipe.step import Step


class Tie(BaseModel):
    """The blocks that are tied, the start of their common matrices, and the term that each block adds."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    blocks: int = Field(ge=1, description="how many blocks' worth of matrices is stored")
    pattern: Literal["neighbours", "loop"] = Field(
        default="neighbours",
        description="tie consecutive blocks, or every blocks-th one, as if the model ran in a loop",
    )
    start: Literal["average", "first", "stepwise"] = Field(
        default="average",
        description="a common matrix: the mean of its blocks' matrices, that of the first of them, or that of one of "
        "so many blocks, evenly spaced from the first of the model to its last",
    )
    term: Step | None = Field(
        default=None,
        description="a low-rank method with a rank, for what the common matrix leaves of each block's; null: nothing",
    )

    @field_validator("term")
    @classmethod
    def _low_rank(cls, term: StepConfig | None) -> StepConfig | None:
        if term is not None and not isinstance(term, LowRankConfig):
            raise ValueError(f"{term.method} adds no low-rank term; take eora, lqer or svd")
        if term is not None and term.rank is None:
            raise ValueError("give its rank: a share is of what a matrix stores, and a tied block stores none")
        return term
