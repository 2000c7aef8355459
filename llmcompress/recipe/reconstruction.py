"""The section `reconstruct:` of a compression: every block trains to match the dense one, once it is compressed.

# train what is stored beside the codes
reconstruct: {rates: {scales: 3.0e-3, norms: 3.0e-3}}
# and, layer by layer, the weights that are still to be compressed
reconstruct: {rates: {scales: 3.0e-3, norms: 3.0e-3, weights: 1.0e-3}}
# train rounding, as AutoRound does
reconstruct: {rates: {codes: 5.0e-3}, latents: weights, optimizer: sign, steps: 200}
# train rounding with few numbers, two blocks at a time, as CBQ does
reconstruct: {rates: {codes: 5.0e-2, scales: 3.0e-3}, latents: weights, offsets: {rank: 5}, window: 2}
# train rounding by division, as FlexRound does
reconstruct: {rates: {codes: 3.0e-3, scales: 3.0e-3}, latents: divided}
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, model_validator

from llmcompress.recipe.sections import Estimator, Freezing, Kind, Rate


class LowRankOffsets(BaseModel, extra="forbid", frozen=True):
    """Latent codes that move together (LoRA-Rounding of CBQ, arXiv 2312.07950)."""

    rank: int = Field(default=5, ge=1, description="numbers that train for each row and each column of a layer")


class Reconstruction(BaseModel, extra="forbid", frozen=True):
    """The training of a model's blocks while it is compressed, on the calibration text."""

    version: Literal[1] = Field(default=1, description="version of the recipe format")
    name: str = Field(default="reconstruct", description="name in reports; by default the recipe's")
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="random seed for the order of sequences; by default the recipe's"
    )
    rates: dict[Kind, Rate] = Field(
        default={"scales": 3e-3, "norms": 3e-3, "weights": 1e-2},
        min_length=1,
        description="learning rates of what trains, relative to the size of its numbers: of each by itself for scales "
        "and norms, of their root mean square for others. codes: latent codes; scales: "
        "scales of grids; values: weights kept as they are; factors: low-rank factors; norms: norms, and biases of "
        "layers that are not compressed; "
        "weights: layers of the block that are still to be compressed, which make up for those that are (QuIP#, arXiv "
        "2402.04396)",
    )
    window: int = Field(
        default=1,
        ge=1,
        le=2,
        description="number of blocks that train together. 1: each alone; 2: each with the block before it, once its "
        "own layers are compressed (CBQ, arXiv 2312.07950)",
    )
    latents: Literal["codes", "weights", "divided"] = Field(
        default="codes",
        description="where latent codes start: at the codes, or at the weights within the cells of the codes. divided: "
        "at the weights, and a divisor of each weight and each row learns (FlexRound, arXiv 2306.00317)",
    )
    offsets: LowRankOffsets | None = Field(
        default=None, description="latent codes move by a product of two factors; null: each by itself"
    )
    estimator: Estimator = Field(default="plain", description="gradient through rounding")
    freezing: Freezing | None = Field(
        default=None, description="when to freeze codes that oscillate between neighbours; null: never"
    )
    optimizer: Literal["adam", "sign"] = Field(
        default="adam", description="sign: a step is the rate times the gradient's sign (AutoRound, arXiv 2309.05516)"
    )
    batch: int = Field(default=1, ge=1, description="sequences in an optimizer step")
    micro_batch: int = Field(default=1, ge=1, description="sequences in one forward pass")
    steps: int | None = Field(
        default=None, ge=1, description="optimizer steps each time; null: one pass over the calibration sequences"
    )
    warmup: float = Field(default=0.05, ge=0, le=1, description="share of the steps in which rates rise from 0")
    final_rate: float = Field(
        default=0.1, ge=0, le=1, description="share of the rates that is left at the end of the cosine schedule"
    )
    clip: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="largest gradient norm")
    evaluate_every: int = Field(default=16, ge=1, description="steps between looks at the held-out sequences")

    @property
    def between(self) -> bool:
        """True if a block also trains after each group of its layers, while later ones are dense."""
        return "weights" in self.rates

    @model_validator(mode="after")
    def _check_options(self) -> Reconstruction:
        if "projections" in self.rates:
            raise ValueError("rates: a block's outputs are as wide as the dense block's, so there are no projections")
        if self.batch % self.micro_batch:
            raise ValueError(f"batch {self.batch} is no multiple of micro_batch {self.micro_batch}")
        given = self.latents != "codes" or self.offsets is not None or self.freezing is not None
        if "codes" not in self.rates and given:
            raise ValueError("latents, offsets and freezing need codes that train; add a rate for codes")
        if self.latents == "divided" and self.offsets is not None:
            raise ValueError("latents that are divided learn divisors, so they have no offsets; leave one of them out")
        if self.freezing is not None and (self.latents == "divided" or self.offsets is not None):
            raise ValueError(
                "freezing holds single latents, and with divisors or offsets they share parameters; leave it out"
            )
        if set(self.rates) == {"weights"}:
            raise ValueError(
                "rates: weights are those of layers still to be compressed, so nothing trains after the last ones; add "
                "a rate for scales"
            )
        return self
