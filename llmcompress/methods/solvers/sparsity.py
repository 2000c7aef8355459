"""The amount of pruning as recipes state it: a sparsity, or an n:m pattern."""

import math
import re
from collections.abc import Callable
from typing import Any, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from llmcompress.errors import RecipeError
from llmcompress.methods.layer import StepConfig, base_and_term, join
from llmcompress.methods.solvers.projection import largest
from llmcompress.weight.nodes import Bitmap, Dense, Index, Pattern, Weight, Where, Zero, shape

SPAN = 128  # columns over which the share of chosen elements is even, in the feedback loop


class PruneConfig(StepConfig):
    """Arguments of every pruning method."""

    sparsity: float | None = Field(None, ge=0, le=1, description="fraction of zeros")
    pattern: str | None = Field(None, description="'2:4' keeps 2 of every 4 consecutive input columns")

    @field_validator("pattern", mode="before")
    @classmethod
    def _refuse_time(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ValueError(f"the number {value}: YAML reads 2:4 as a time, write pattern: '2:4'")
        return value

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, value: str | None) -> str | None:
        if value is not None:
            parse_pattern(value)
        return value

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError("give either sparsity or pattern")
        return self

    def structure(self) -> tuple[int, int] | None:
        """Return `(kept, group)` of the pattern, or None."""
        return None if self.pattern is None else parse_pattern(self.pattern)

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`: of methods that prune a whole layer to a sparsity."""
        return prune_sketch(approx, self, lambda out, width: [out * width])

    def index(self, keep: Tensor) -> Index:
        """Return the index that stores `keep [out, in]` (true = not pruned)."""
        structure = self.structure()
        return Bitmap(keep) if structure is None else Pattern(keep, *structure)


def parse_pattern(text: str) -> tuple[int, int]:
    """Return `(kept, group)` of "kept:group". Raises ValueError for another form, or for more than 256 patterns."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found:
        raise ValueError(f"pattern {text!r} is not of the form '2:4'")
    kept, group = int(found[1]), int(found[2])
    if not 0 < kept < group <= 16 or math.comb(group, kept) > 256:
        raise ValueError(f"pattern {text!r} must keep fewer than all of at most 16 columns, in at most 256 ways")
    return kept, group


def check_pattern(kept: int, group: int, width: int) -> None:
    """Raise RecipeError if a row of `width` does not divide into groups."""
    if width % group:
        raise RecipeError(f"pattern {kept}:{group} does not divide the width {width}; choose a group that does")


def span_of_choices(group: int, width: int) -> int:
    """Return the number of columns over which a choice of elements is made; a group of scales lies in one span."""
    return min(group if group > SPAN else SPAN // group * group, width)


def keep_largest(scores: Tensor, config: PruneConfig) -> Tensor:
    """Return a mask of the largest `scores [out, in]` of the layer, or of every n:m group; exact counts."""
    if config.sparsity is None:
        return keep_largest_of_rows(scores, config)
    return largest(scores, kept_count(scores.numel(), config.sparsity))


def keep_largest_of_rows(scores: Tensor, config: PruneConfig) -> Tensor:
    """Return a mask of the largest `scores [out, in]` of every row, or of every n:m group; exact counts."""
    width = scores.shape[1]
    structure = config.structure()
    if structure is not None:
        check_pattern(*structure, width)
        grouped = scores.reshape(len(scores), -1, structure[1])
        kept = structure[0]
    else:
        grouped = scores[:, None, :]
        kept = kept_count(width, config.sparsity or 0.0)
    ranked = grouped.argsort(dim=2, descending=True, stable=True)[..., :kept]
    return (
        torch.zeros(grouped.shape, dtype=torch.bool, device=scores.device)
        .scatter_(2, ranked, True)
        .reshape(scores.shape)
    )


def prune(values: Tensor, keep: Tensor, config: PruneConfig) -> Weight:
    """Return `values [out, in]` in bfloat16 where `keep` is true, zero elsewhere."""
    return Where(config.index(keep), Dense(values.to(torch.bfloat16)), Zero((values.shape[0], values.shape[1])))


def kept_count(count: int, sparsity: float) -> int:
    """Return the number of weights that stay of `count`; exact for decimal fractions: 0.29 prunes 29 of 100."""
    return count - int(count * sparsity + 1e-9)


def prune_sketch(
    approx: Weight, config: PruneConfig, sets: Callable[[int, int], list[int]], values: Weight | None = None
) -> Weight:
    """Return a pruned base without values, for `plan` to count its bits.

    `sets(out, in)`: the sizes of the sets of weights that are pruned to the sparsity one by one. `values`: the form of
    the kept part, by default bfloat16.
    """
    base, term = base_and_term(approx)
    size = shape(base)
    inside = Dense(torch.empty(size, dtype=torch.bfloat16, device="meta")) if values is None else values
    structure = config.structure()
    if structure is None:
        keep = torch.zeros(size, dtype=torch.bool)
        keep.view(-1)[: sum(kept_count(count, config.sparsity or 0.0) for count in sets(*size))] = True
        return join(Where(Bitmap(keep), inside, Zero(size)), term)
    check_pattern(*structure, size[1])
    keep = (torch.arange(size[1]) % structure[1] < structure[0]).expand(size)
    return join(Where(Pattern(keep, *structure), inside, Zero(size)), term)
