"""The section `adapt:` of a distillation: low-rank terms that are added."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmcompress.recipe.patterns import Matching


class Adaptation(Matching):
    """The compressed linears that get a low-rank term, and how it is stored."""

    match: tuple[str, ...] = Field(default=("*",), min_length=1, description="as in the rules of a compression")
    rank: int = Field(ge=1, description="columns of the left factor")
    factor_bits: Literal[4, 8, 16] = Field(default=16, description="16 keeps bfloat16; fewer are rounded at the end")
    start: Literal["zero", "residual"] = Field(
        default="zero", description="zero: nothing changes at first; residual: the SVD of what the weight lost"
    )
