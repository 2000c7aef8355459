"""The smaller sections of recipes; the larger ones have files of their own.

fuse: {rotation: true, untie: true, awq: true}
tie: {blocks: 15, start: average, term: {method: eora, rank: 64, factor_bits: 4}}
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from llmcompress.methods.layer import StepConfig
from llmcompress.methods.solvers.low_rank import LowRankConfig
from llmcompress.recipe.rules import Matching, Step

Kind = Literal["codes", "scales", "values", "factors", "norms", "weights", "projections", "masks"]
Rate = Annotated[float, Field(gt=0, lt=1)]
Rates = Annotated[dict[Kind, Rate], Field(min_length=1)]
Estimator = Literal["plain", "reste", "biper"]
Latents = Literal["codes", "teacher"]
Scales = Literal["learned", "median"]
PhaseKind = Literal["blockwise", "end_to_end"]
AS_IN_RECIPE = "as in the recipe; null: the recipe's value"
RANK = 4  # of learned scores: under 2 % as many numbers as a matrix of a small model has


def _check_layer(value: Any) -> Any:
    """Return a teacher's block, or a pair of blocks. Raises ValueError for anything else."""
    blocks = value if isinstance(value, list | tuple) else [value, value]
    if len(blocks) != 2 or not all(type(block) is int and block >= 0 for block in blocks):
        raise ValueError(
            "a layer is a block of the teacher such as 5, or a pair of blocks such as [2, 5], the student's and the "
            "teacher's"
        )
    return value


Layers = tuple[Annotated[int | tuple[int, int], BeforeValidator(_check_layer)], ...]


class Fuse(BaseModel, extra="forbid", frozen=True):
    """The section `fuse:`: changes to the dense model before it is compressed. At least one of rotation and awq."""

    rotation: bool = Field(False, description="turn the residual stream into a random basis (QuaRot)")
    untie: bool = Field(False, description="with rotation: give a head that is the token table its own matrix")
    awq: bool = Field(False, description="scale input channels before they are rounded (AWQ)")

    @model_validator(mode="after")
    def _check_something_to_fuse(self) -> Fuse:
        if not (self.rotation or self.awq):
            raise ValueError("it says nothing to fuse; set rotation: true or awq: true, or leave fuse: out")
        if self.untie and not self.rotation:
            raise ValueError("untie: only rotation: true needs a head of its own; leave untie: out")
        return self


class Tie(BaseModel, extra="forbid", frozen=True):
    """The section `tie:`: blocks that share their matrices, and the low-rank term that each adds to them.

    Relaxed Recursive Transformers (arXiv 2410.20672). The rules compress the shared matrices like any others.
    """

    blocks: int = Field(ge=1, description="number of blocks whose matrices are stored")
    pattern: Literal["neighbours", "loop"] = Field(
        default="neighbours",
        description="which blocks share: consecutive ones, or every blocks-th one, as if the model ran in a loop",
    )
    start: Literal["average", "first", "stepwise"] = Field(
        default="average",
        description="the shared matrix: the mean of its blocks' matrices, the matrix of the first of them, or that of "
        "one of `blocks` blocks that are evenly spaced from the model's first to its last",
    )
    term: Step | None = Field(
        default=None,
        description="a low-rank method with a rank, fitted to what each block loses by sharing; null: none",
    )

    @field_validator("term")
    @classmethod
    def _check_term(cls, term: StepConfig | None) -> StepConfig | None:
        if term is not None and (not isinstance(term, LowRankConfig) or term.method == "low_rank"):
            raise ValueError(f"{term.method} adds no low-rank term; take eora, lqer or svd")
        if term is not None and term.rank is None:
            raise ValueError("give its rank: a share is of what a matrix stores, and a tied block stores none")
        return term


class Gates(BaseModel, extra="forbid", frozen=True):
    """The section `gates:`: limits within which a run counts as done.

    Those of quality are measured at the end, after a distillation too, on at most 2,048 held-out tokens of the
    calibration; after a distillation on the same data set, on the text that it held out. A checkpoint outside of them
    is kept for inspection, and `push` refuses it.
    """

    max_fallback_layers: float = Field(
        default=0.02, ge=0, le=1, description="share of layers that may need a numeric fallback"
    )
    kl: float | None = Field(
        default=2.5, gt=0, allow_inf_nan=False, description="most KL to the dense model, in nats per token; null: any"
    )
    perplexity_ratio: float | None = Field(
        default=10.0,
        ge=1,
        allow_inf_nan=False,
        description="most perplexity, as a multiple of the dense model's; null: any",
    )

    @property
    def of_quality(self) -> dict[str, float]:
        """The limits that are measured at the end, by name; those that are switched off are absent."""
        limits = {"kl": self.kl, "perplexity_ratio": self.perplexity_ratio}
        return {name: limit for name, limit in limits.items() if limit is not None}


class Freezing(BaseModel, extra="forbid", frozen=True):
    """The section `freezing:`: codes that oscillate between neighbours are frozen above a frequency."""

    momentum: float = Field(default=0.01, gt=0, lt=1, description="weight of the last step in the moving averages")
    threshold: float = Field(default=0.04, gt=0, le=1, description="frequency above which a code is frozen, at first")
    final_threshold: float = Field(
        default=0.011, gt=0, le=1, description="the frequency at the last step, at the end of a half cosine"
    )

    @model_validator(mode="after")
    def _check_thresholds(self) -> Freezing:
        if self.final_threshold > self.threshold:
            raise ValueError(
                f"final_threshold {self.final_threshold:g} is above threshold {self.threshold:g}, which falls to it; "
                f"lower it"
            )
        return self

    def threshold_at(self, done: float) -> float:
        """Return the threshold when a share `done` of the steps, 0 to 1, is done."""
        return self.final_threshold + (self.threshold - self.final_threshold) * (1 + math.cos(math.pi * done)) / 2


class Adaptation(Matching):
    """The section `adapt:` of a distillation: low-rank terms that compressed linear layers get, and their storage."""

    match: tuple[str, ...] = Field(default=("*",), min_length=1, description="layers, as in the rules of a compression")
    rank: int = Field(ge=1, description="columns of the left factor")
    factor_bits: Literal[4, 8, 16] = Field(default=16, description="16 keeps bfloat16; fewer are rounded at the end")
    start: Literal["zero", "residual"] = Field(
        default="zero", description="zero: nothing changes at first; residual: the SVD of what the weight lost"
    )


class Regrowth(Matching):
    """The section `regrow:` of a distillation: pruned matrices that train dense, and how they are pruned again."""

    match: tuple[str, ...] = Field(default=("*",), min_length=1, description="layers, as in the rules of a compression")
    start: Literal["zero", "teacher"] = Field(
        default="zero",
        description="where weights that come back start: at zero, or at the teacher's weights; with by: learned, all "
        "weights start at the teacher's",
    )
    by: Literal["input_norms", "magnitude", "learned"] = Field(
        default="input_norms",
        description="which weights stay: those of the largest size times norm of their inputs on training text, those "
        "of the largest size, or by scores that start at the former and learn, with a mask from the first step on",
    )
    rank: int | None = Field(default=None, ge=1, description=f"rank of learned scores; null: {RANK} if scores learn")

    @model_validator(mode="after")
    def _check_scores(self) -> Regrowth:
        if self.by != "learned" and self.rank is not None:
            raise ValueError(f"rank is of learned scores, and by is {self.by}; leave it out, or set by to learned")
        if self.by == "learned" and self.start == "zero":
            raise ValueError("scores of weights that are zero have no gradient to learn from; set start to teacher")
        return self


class OnPolicy(BaseModel, extra="forbid", frozen=True):
    """The section `on_policy:` of a distillation: sequences that the student continues and the teacher judges."""

    share: float = Field(default=0.5, gt=0, le=1, description="share of a step's sequences; the others are data")
    prompt: int = Field(
        default=32,
        ge=1,
        description="tokens of data that the student continues; in chats, all up to the answer if that is more",
    )
    every: int = Field(default=8, ge=1, description="steps between times that the student writes, for all of them")
    temperature: float = Field(default=1.0, gt=0, le=10, description="sampling temperature of the student")

    def rows(self, batch: int) -> list[int]:
        """Return the places in a batch of the sequences that the student writes, spread evenly."""
        ends = [int((row + 1) * self.share + 1e-9) for row in range(batch)]
        return [row for row, (before, end) in enumerate(zip([0, *ends], ends)) if end > before]


class Teacher(BaseModel, extra="forbid", frozen=True):
    """The source of the teacher's predictions: the model itself, or a cache of its likeliest tokens."""

    kind: Literal["online", "cached"] = Field(
        default="online", description="online: run the teacher in every step; cached: store its predictions once"
    )
    k: int = Field(default=64, ge=1, description="number of likeliest tokens to cache for each position")
    folder: str | None = Field(
        default=None,
        min_length=1,
        description="folder of the cache, to share it between runs on the same tokens; null: a temporary one beside "
        "the output",
    )
    bits: Literal[8, 4] | None = Field(
        default=None, description="precision of the teacher's linear layers, by bitsandbytes; null: as they are"
    )

    @model_validator(mode="after")
    def _check_kind(self) -> Teacher:
        online = Teacher.model_construct(bits=self.bits)
        if self.kind == "online" and self != online:  # a recipe that was written has the defaults
            raise ValueError("k and folder apply to a cached teacher only; remove them, or set kind: cached")
        return self


class Schedule(BaseModel):
    """A weight that changes linearly over the first part of the steps."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)
    start: float = Field(alias="from", ge=0, allow_inf_nan=False, description="the weight at the first step")
    to: float = Field(ge=0, allow_inf_nan=False, description="the weight that it ends at")
    until: float = Field(default=1.0, gt=0, le=1, description="share of the steps after which it stays")


class Phase(BaseModel, extra="forbid", frozen=True):
    """One part of a distillation that has several. Values that are null are the recipe's. Every phase starts from the
    compressed weights of the one before."""

    kind: PhaseKind = Field(description="train each decoder block by itself, or the whole model")
    rates: Rates | None = Field(default=None, description=AS_IN_RECIPE)
    adapt: Adaptation | None = Field(default=None, description="low-rank terms to add before it; null: none")
    regrow: Regrowth | None = Field(default=None, description="pruned matrices to train dense during it; null: none")
    estimator: Estimator | None = Field(default=None, description=AS_IN_RECIPE)
    latents: Latents | None = Field(default=None, description=AS_IN_RECIPE)
    scales: Scales | None = Field(default=None, description=AS_IN_RECIPE)
    freezing: Freezing | None = Field(default=None, description=AS_IN_RECIPE)
    batch: int | None = Field(default=None, ge=1, description=AS_IN_RECIPE)
    micro_batch: int | None = Field(default=None, ge=1, description=AS_IN_RECIPE)
    steps: int | None = Field(default=None, ge=1, description="optimizer steps; if blockwise, of every block")
    warmup: float | None = Field(default=None, ge=0, le=1, description=AS_IN_RECIPE)
    final_rate: float | None = Field(default=None, ge=0, le=1, description=AS_IN_RECIPE)
    evaluate_every: int | None = Field(default=None, ge=1, description=AS_IN_RECIPE)
