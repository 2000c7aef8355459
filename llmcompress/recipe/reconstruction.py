"""The section `reconstruct:` of a compression: how every block learns, once its layers are set, to match the dense one.

# what is stored beside the codes
reconstruct: {rates: {scales: 3.0e-3, norms: 3.0e-3}}
# and, layer by layer, what is still to be compressed
reconstruct: {rates: {scales: 3.0e-3, norms: 3.0e-3, weights: 1.0e-3}}
# rounding, as AutoRound does
reconstruct: {rates: {codes: 5.0e-3}, latents: weights, optimizer: sign, steps: 200}
# plain rounding that moves with few numbers, two blocks at a time, as CBQ does
reconstruct: {rates: {codes: 5.0e-2, scales: 3.0e-3}, latents: weights, offsets: {rank: 5}, window: 2}
# rounding by division, as FlexRound does
reconstruct: {rates: {codes: 3.0e-3, scales: 3.0e-3}, latents: divided}
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llmcompress.recipe.distillation import Kind, Rate
from llmcompress.recipe.freezing import Freezing


class LowRankOffsets(BaseModel):
    """Latent codes that move together (LoRA-Rounding of CBQ, arXiv 2312.07950)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    rank: int = Field(default=5, ge=1, description="numbers that train for each row and each column of a layer")


class Reconstruction(BaseModel):
    """The training of a model's blocks while it is compressed, on the calibration text."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: Literal[1] = Field(default=1, description="of the format of recipes")
    name: str = Field(default="reconstruct", description="by default that of the recipe")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of the order of sequences; by default that of the recipe")
    rates: dict[Kind, Rate] = Field(
        default={"scales": 3e-3, "norms": 3e-3, "weights": 1e-2},
        min_length=1,
        description="learning rates of what trains, in shares of the size of its numbers: latent codes, scales, values "
        "kept as they are, low-rank factors, norms and biases; weights: those of the block's linears that are still to "
        "be compressed, which then make up for the ones that are (QuIP#, arXiv 2402.04396)",
    )
    window: int = Field(
        default=1,
        ge=1,
        le=2,
        description="blocks that learn together, in windows that overlap: 1, each alone; 2, each also with the one "
        "before it, once its own layers are set (CBQ, arXiv 2312.07950)",
    )
    latents: Literal["codes", "weights", "divided"] = Field(
        default="codes",
        description="where latent codes start: at the codes, or at the weights within the codes' cells; "
        "divided: at the weights, and what each of them, and each row, is divided by learns (FlexRound, arXiv "
        "2306.00317)",
    )
    offsets: LowRankOffsets | None = Field(
        default=None, description="latents move by a product of two factors of this rank; null: each by itself"
    )
    estimator: Literal["plain", "reste", "biper"] = Field(default="plain", description="gradient through rounding")
    freezing: Freezing | None = Field(default=None, description="of codes that oscillate; null: none")
    optimizer: Literal["adam", "sign"] = Field(
        default="adam", description="sign: a step is the rate times the gradient's sign (AutoRound, arXiv 2309.05516)"
    )
    batch: int = Field(default=1, ge=1, description="sequences of an optimizer step")
    micro_batch: int = Field(default=1, ge=1, description="sequences of one forward")
    steps: int | None = Field(
        default=None, ge=1, description="optimizer steps each time; null: one pass over the calibration sequences"
    )
    warmup: float = Field(default=0.05, ge=0, le=1, description="share of the steps in which rates rise from 0")
    final_rate: float = Field(default=0.1, ge=0, le=1, description="what is left of the rates at the end of a cosine")
    clip: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="largest norm of a gradient")
    evaluate_every: int = Field(default=16, ge=1, description="steps between looks at the held-out sequences")

    @property
    def between(self) -> bool:
        """True if a block also learns after each group of its layers, while later ones are dense."""
        return "weights" in self.rates

    @model_validator(mode="after")
    def _consistent(self) -> Reconstruction:
        if "projections" in self.rates:
            raise ValueError("rates: a block's outputs are as wide as the dense block's, so there are no projections")
        if self.batch % self.micro_batch:
            raise ValueError(f"batch {self.batch} is no multiple of micro_batch {self.micro_batch}")
        given = self.latents != "codes" or self.offsets is not None or self.freezing is not None
        if "codes" not in self.rates and given:
            raise ValueError("latents, offsets and freezing are of codes that train, and rates has nothing for codes")
        if self.latents == "divided" and self.offsets is not None:
            raise ValueError("latents that are divided learn their divisors, so no offsets; leave one of them out")
        if self.freezing is not None and (self.latents == "divided" or self.offsets is not None):
            raise ValueError("freezing holds latents one by one, which share what they are made of here; leave it out")
        if set(self.rates) == {"weights"}:
            raise ValueError(
                "rates: weights are those of layers still to be compressed, so of the last ones nothing trains; give a "
                "rate for scales too"
            )
        return self
