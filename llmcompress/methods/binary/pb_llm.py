"""Partial binarization (PB-LLM, arXiv 2310.00034): a few salient weights kept at 4 or 8 bits, the rest +-scale.

Minimises tr(E H E^T) in the feedback loop (or |E|^2 without feedback). Stores Where(salient, Grid or Dense, binary
Grid).

Differs from the paper: the binary scale is mean |w| over the binarized entries alone, of the compensated weights; the
official code averages over the salient entries too. The salient set can also be whole columns (one bit a column) or n:m
(the number of the pattern), not only a bitmap (one bit a weight).
"""

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from llmcompress.errors import RecipeError
from llmcompress.methods.layer import Layer, StepConfig, base_and_term, base_target, join, method, with_base
from llmcompress.methods.solvers.feedback import feedback
from llmcompress.methods.solvers.grid import GridFormat, grid_sketch
from llmcompress.methods.solvers.hessian import channel_energy, inverse_factor
from llmcompress.methods.solvers.projection import (
    GridPoints,
    KeptValues,
    Selection,
    Side,
    columns,
    largest,
    largest_of_each,
)
from llmcompress.methods.solvers.sparsity import check_pattern, parse_pattern, span_of_choices
from llmcompress.weight.nodes import Bitmap, Columns, Dense, Index, Pattern, Weight, Where, shape


class PBLLM(StepConfig):
    """Arguments of `pb_llm`."""

    method: Literal["pb_llm"] = "pb_llm"
    salient: float | str = Field(0.1, description="fraction kept precise, or an n:m pattern such as '1:8'")
    structure: Literal["elements", "columns"] = Field("elements", description="salient weights, or whole columns")
    metric: Literal["magnitude", "hessian"] = Field(
        "hessian", description="salience of a weight: its magnitude, or that weighted by the inverse Hessian"
    )
    salient_bits: Literal[4, 8, 16] = Field(8, description="16 keeps bfloat16")
    group_size: int | None = Field(None, ge=1, description="columns per binary scale; null for one per row")
    feedback: bool = Field(True, description="columns make up for the errors of those before them (GPTQ)")
    damping: float = Field(0.1, gt=0, le=10, description="share of the mean Hessian diagonal that is added")
    examples = (
        {"salient": 0.1},
        {"salient": 0.2, "salient_bits": 4, "metric": "magnitude", "group_size": 16},
        {"salient": 0.1, "structure": "columns"},
        {"salient": "1:8", "salient_bits": 4},
        {"salient": 0.1, "salient_bits": 16, "feedback": False},
    )

    @field_validator("salient", mode="before")
    @classmethod
    def _refuse_time(cls, value: Any) -> Any:
        if isinstance(value, int) and value > 1:
            raise ValueError(f"the number {value}: YAML reads 1:8 as a time, write salient: '1:8'")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.salient, str):
            parse_pattern(self.salient)
            if self.structure == "columns":
                raise ValueError("salient is a pattern; structure: columns needs a fraction")
        elif not 0 <= self.salient <= 1:
            raise ValueError(f"salient is {self.salient}; a fraction lies in 0..1")
        return self

    @property
    def rowwise(self) -> bool:
        """See `StepConfig.rowwise`."""
        return isinstance(self.salient, str)

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        base, term = base_and_term(approx)
        size = shape(base)
        precise: Weight = Dense(torch.empty(size, dtype=torch.bfloat16, device="meta"))
        if self.salient_bits != 16:
            precise = grid_sketch(size, GridFormat(2**self.salient_bits))
        _check_salient(self, size[1])
        return join(Where(_index_sketch(self, size), precise, grid_sketch(size, self.binary())), term)

    def binary(self) -> GridFormat:
        """Return the format of the binarized part."""
        return GridFormat(2, self.group_size)

    def span(self, width: int) -> int:
        """Return the number of columns of one choice; a group of scales lies in one span."""
        return span_of_choices(self.binary().group(width), width)


@method("pb_llm", PBLLM, needs={"outer"})
def pb_llm(layer: Layer, config: PBLLM) -> Layer:
    """Keep the salient part at `salient_bits`, binarize the rest."""
    target = base_target(layer)
    width = target.shape[1]
    energy = channel_energy(layer.inputs).float()
    factor, notes = inverse_factor(layer.inputs, config.damping)
    weights = 1 / factor.diagonal().square() if config.metric == "hessian" else energy.new_ones(width)
    choose, span, index = _selection(config, target, weights)
    precise: Side = KeptValues()
    if config.salient_bits != 16:
        precise = GridPoints(GridFormat(2**config.salient_bits), width, energy)
    binary = GridPoints(config.binary(), width, energy)
    projection = Selection(precise, binary, choose, span, index)
    return with_base(layer, feedback(target, factor if config.feedback else None, projection), notes)


def _selection(
    config: PBLLM, target: Tensor, weights: Tensor
) -> tuple[Callable[[Tensor, int], Tensor], int, Callable[[Tensor], Index]]:
    """Return the choice of salient entries, the number of columns of a choice, and the index that stores it.

    A weight's score is w^2 times `weights [in]`, on compensated weights; a column's is the sum over the rows of the
    original weights.
    """
    width = target.shape[1]
    _check_salient(config, width)
    if isinstance(config.salient, str):
        kept, size = parse_pattern(config.salient)

        def by_pattern(current: Tensor, start: int) -> Tensor:
            return largest_of_each(current.square() * weights[start : start + len(current), None], kept, size)

        return by_pattern, size, lambda chosen: Pattern(chosen, kept, size)
    share = config.salient
    if config.structure == "columns":
        score = target.square().sum(0) * weights
        chosen = largest(score, round(width * share))[:, None].expand(width, len(target))
        return lambda current, start: chosen[start : start + len(current)], width, columns

    def by_element(current: Tensor, start: int) -> Tensor:
        return largest(current.square() * weights[start : start + len(current), None], round(current.numel() * share))

    return by_element, config.span(width), Bitmap


def _check_salient(config: PBLLM, width: int) -> None:
    """Raise RecipeError for a salient pattern that does not fit the width or the groups of scales."""
    if isinstance(config.salient, str):
        kept, size = parse_pattern(config.salient)
        check_pattern(kept, size, width)
        group = config.binary().group(width)
        if group % size and size % group:
            raise RecipeError(
                f"group_size {group} and the pattern {config.salient} do not divide each other; change one of them"
            )


def _index_sketch(config: PBLLM, size: tuple[int, int]) -> Index:
    if isinstance(config.salient, str):
        kept, group = parse_pattern(config.salient)
        return Pattern((torch.arange(size[1]) % group < kept).expand(size), kept, group)
    if config.structure == "columns":
        return Columns(torch.arange(size[1]) < round(size[1] * config.salient))
    inside = torch.zeros(size, dtype=torch.bool)
    span = config.span(size[1])
    spans = [size[0] * min(span, size[1] - start) for start in range(0, size[1], span)]
    inside.view(-1)[: sum(round(count * config.salient) for count in spans)] = True
    return Bitmap(inside)
