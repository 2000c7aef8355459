"""Alternation of a base and a low-rank term, as in LoftQ (arXiv 2310.08659) and CALDERA (arXiv 2405.18886).

Each round fits the base to what the low-rank term leaves, then the low-rank term to what the base leaves. Neither
step is an exact minimiser, so the best round on the calibration inputs is kept. Stores Sum(base, LowRank).
"""

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator

from llmcompress.errors import RecipeError
from llmcompress.methods.layer import Layer, StepConfig, base_and_term, join, method, methods, relative_error, step
from llmcompress.methods.solvers.low_rank import LowRankConfig
from llmcompress.weight.nodes import RotatedInputs, Weight

ROTATES = "its base is a rotation; make that a step of its own, before alternate"


class Alternate(StepConfig):
    """Arguments of `alternate`: two steps, and how many rounds of them."""

    method: Literal["alternate"] = "alternate"
    base: SerializeAsAny[StepConfig] = Field(description="a step that makes a base, such as gptq or sparsegpt")
    low_rank: SerializeAsAny[StepConfig] = Field(description="a step that makes a low-rank term, such as eora or svd")
    rounds: int = Field(3, ge=1, le=50, description="of base, then low rank; the best one is kept")
    examples = (
        {"base": {"method": "gptq", "bits": 2}, "low_rank": {"method": "eora", "rank": 1}, "rounds": 2},
        {"base": {"method": "sparsegpt", "sparsity": 0.5}, "low_rank": {"method": "svd", "rank": 1}, "rounds": 2},
    )

    @field_validator("base", "low_rank", mode="before")
    @classmethod
    def _step(cls, value: Any) -> Any:
        return step(value) if isinstance(value, dict) else value

    @field_validator("base")
    @classmethod
    def _is_base(cls, value: StepConfig) -> StepConfig:
        if isinstance(value, LowRankConfig):
            raise ValueError(f"base is the method {value.method!r}, which makes no base")
        return value

    @field_validator("low_rank")
    @classmethod
    def _is_low_rank(cls, value: StepConfig) -> StepConfig:
        if not isinstance(value, LowRankConfig):
            raise ValueError(f"low_rank is the method {value.method!r}, which makes no low-rank term")
        return value

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        base = self.base.sketch(approx)
        if isinstance(base, RotatedInputs):
            raise RecipeError(ROTATES)
        return self.low_rank.sketch(base)


@method("alternate", Alternate, needs={"outer"})
def alternate(layer: Layer, config: Alternate) -> Layer:
    """Return the layer after the best of `rounds` rounds of base, then low rank."""
    best, best_error = layer, float("inf")
    start = base_and_term(layer.approx)[0]
    for _ in range(config.rounds):
        layer = replace(layer, approx=join(start, base_and_term(layer.approx)[1]))  # bases are made of the first one
        for half in (config.base, config.low_rank):
            layer = methods()[half.method].run(layer, half)
        if layer.rotation is not best.rotation:
            raise RecipeError(ROTATES)
        error = relative_error(layer.weight, layer.approx, layer.inputs)
        if error < best_error:
            best, best_error = layer, error
    return best
