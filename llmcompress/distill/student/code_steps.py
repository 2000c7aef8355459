"""Steps of single codes to their neighbours while a model learns, after PV-Tuning (arXiv 2405.14852).

Latents gather what many steps want, and cross the edges of their cells by the thousand. Here nothing is gathered: after
each backward pass a small share of every matrix's codes changes at once, those that gain most, each by one level, and
none of the others moves. Continuous numbers take their own step beside it. As in the paper there is no first moment.

The gain of a change is that of the loss's second-order model, |g| - h / 2, with the gradient g by the code. Fisher's
information stands for the curvature h: the number of tokens times the squared gradient of a step, taken as a product of
a mean over the row and one over the column. The paper instead ranks codes by an Adam step and bounds its size. Many
codes change together and want the same thing, so a code is charged for DAMPING times its own curvature (docs/log.md,
"codes that step").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcompress.weight.trainable.relax import RelaxedLinear

DAMPING = 3000.0


@dataclass(frozen=True, eq=False)
class StepwiseCodes:
    """The codes of one parameter, whole numbers below `levels` held as float32, flat; `rows`: of its matrix."""

    codes: nn.Parameter
    levels: int
    rows: int


@dataclass(frozen=True, eq=False)
class CodeSteps:
    """All codes of a student that take steps; none where they have latents, or do not train."""

    each: tuple[StepwiseCodes, ...] = ()

    @staticmethod
    def of(layers: Mapping[str, RelaxedLinear]) -> CodeSteps:
        """Find the codes of a student's layers, by name."""
        found = [
            (layer.relaxed, key, levels) for layer in layers.values() for key, levels in layer.relaxed.levels.items()
        ]
        return CodeSteps(
            tuple(StepwiseCodes(relaxed.get_parameter(key), levels, relaxed.size[0]) for relaxed, key, levels in found)
        )

    @torch.no_grad()
    def chosen(self, share: float, tokens: int) -> list[tuple[StepwiseCodes, Tensor, Tensor]]:
        """Choose the changes of a step, and take the gradients of codes away: for each parameter the places of codes
        and what is added to them. `share`: of a parameter's codes at most; `tokens`: that the loss is a mean over."""
        found = []
        for one in self.each:
            gradient, one.codes.grad = one.codes.grad, None
            if gradient is not None:
                found.append((one, *changes(one.codes, gradient, one.levels, one.rows, share, tokens)))
        return found

    @torch.no_grad()
    def take(self, chosen: list[tuple[StepwiseCodes, Tensor, Tensor]]) -> int:
        """Change codes as `chosen`; return how many these are."""
        for one, places, moves in chosen:
            one.codes[places] += moves
        return sum(len(places) for _, places, _ in chosen)


def changes(
    codes: Tensor, gradient: Tensor, levels: int, rows: int, share: float, tokens: int
) -> tuple[Tensor, Tensor]:
    """Return the places of the codes that gain most by a step, int64 `[n]`, and their steps, -1 or 1, float32 `[n]`.

    `codes`, `gradient`: flat, of a matrix of so many `rows`, or of some of its elements. At most `share` of the codes
    change, and only where there is a gain; none leaves its `levels`.
    """
    steps = -gradient.sign()
    able = torch.where(steps > 0, codes < levels - 1, codes > 0)
    gain = (gradient.abs() - DAMPING * curvature(gradient, rows, tokens) / 2).masked_fill_(~able, -math.inf)
    best = gain.topk(math.floor(share * gain.numel()))
    places = best.indices[best.values > 0]
    return places, steps[places]


def curvature(gradient: Tensor, rows: int, tokens: int) -> Tensor:
    """Return the curvature of the loss by each code, flat, from its gradient over so many `tokens`."""
    if gradient.numel() % rows:  # some elements of a matrix
        return tokens * gradient.square().mean().expand_as(gradient)
    square = gradient.view(rows, -1).square()
    by_row, by_column = square.mean(1, keepdim=True), square.mean(0, keepdim=True)
    return (tokens * by_row * by_column / by_row.mean().clamp_min(torch.finfo(torch.float32).tiny)).flatten()
