"""The recipe of a distillation: what trains, on which text, against which losses, for how long."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator

import llmcompress.losses  # noqa: F401 (registers them)
from llmcompress.losses.features import any_loss_config, reads_states
from llmcompress.losses.loss import LossConfig
from llmcompress.recipe.adaptation import Adaptation
from llmcompress.recipe.data import Mixture, Texts, TextSource
from llmcompress.recipe.freezing import Freezing
from llmcompress.recipe.on_policy import OnPolicy
from llmcompress.recipe.regrowth import Regrowth

Kind = Literal["codes", "scales", "values", "factors", "norms", "weights", "projections", "masks"]
Rate = Annotated[float, Field(gt=0, lt=1)]


def _loss(value: Any) -> Any:
    """A loss from its map of arguments. Raises ValueError (pydantic's kind is one) for what is not a loss."""
    if isinstance(value, LossConfig):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("loss"), str):
        raise ValueError("a loss is a map such as {loss: forward_kl}")
    return any_loss_config(value)


class Schedule(BaseModel):
    """A weight that goes from one number to another in a line, over the first share of the steps."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)
    start: float = Field(alias="from", ge=0, allow_inf_nan=False, description="the weight at the first step")
    to: float = Field(ge=0, allow_inf_nan=False, description="the weight it ends at")
    until: float = Field(default=1.0, gt=0, le=1, description="share of the steps after which it stays")


def _weight(value: Any) -> Any:
    """A weight from what a recipe says. Raises ValueError for what is none."""
    if isinstance(value, int | float | Schedule) and not isinstance(value, bool):
        return value
    try:
        return Schedule.model_validate(value)
    except ValidationError as error:
        raise ValueError("a weight is a number above 0, or a map such as {from: 1.0, to: 0.0, until: 0.5}") from error


def _layer(value: Any) -> Any:
    """A teacher's block, or a pair of blocks. Raises ValueError for what is neither."""
    blocks = value if isinstance(value, list | tuple) else [value, value]
    if len(blocks) != 2 or not all(type(block) is int and block >= 0 for block in blocks):
        raise ValueError(
            "a layer is a block of the teacher's such as 5, or a pair [2, 5]: the student's, the teacher's"
        )
    return value


Layers = tuple[Annotated[int | tuple[int, int], BeforeValidator(_layer)], ...]


class Term(BaseModel):
    """One loss and its share of the objective."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    of: Annotated[SerializeAsAny[LossConfig], BeforeValidator(_loss)] = Field(description="the loss and its arguments")
    weight: Annotated[float | Schedule, BeforeValidator(_weight)] = Field(
        default=1.0, description="share of the objective: a number above 0, or a schedule"
    )
    layers: Layers | None = Field(
        default=None,
        min_length=1,
        description="of a loss on hidden states: the teacher's blocks whose inputs it compares with those of the "
        "student's same blocks, or pairs such as [2, 5], the student's and the teacher's; null: all that the student "
        "has, but for the first",
    )
    exits: tuple[int, ...] | None = Field(
        default=None,
        min_length=1,
        description="of a loss on predictions: behind how many of the student's blocks its hidden states are read as "
        "predictions, in place of behind the last; the loss is the mean over them",
    )
    branch: bool = Field(
        default=False,
        description="of exits: a square matrix before the norm of each, which trains at the rate of projections and is "
        "dropped after the run",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Term:
        if isinstance(self.weight, float) and not 0 < self.weight < math.inf:
            raise ValueError(f"weight is {self.weight:g}; it must be a number above 0")
        if self.layers is not None and not reads_states(self.of):
            raise ValueError(f"{self.of.loss} reads predictions, which are no layer's; leave layers out")
        if self.exits is not None and reads_states(self.of):
            raise ValueError(f"{self.of.loss} reads hidden states, no predictions at exits; name blocks in layers")
        if self.branch and self.exits is None:
            raise ValueError("branch is of exits, and there are none; name them, or leave it out")
        if self.exits is not None and (len(set(self.exits)) < len(self.exits) or min(self.exits) < 1):
            raise ValueError(f"exits {', '.join(map(str, self.exits))} must be different numbers of blocks, from 1 on")
        if reads_states(self.of) and not self.of.counts_tokens and len(self.layers or ()) != 1:
            raise ValueError(f"{self.of.loss} per layer is of one layer; name it in layers, and write one for each")
        return self

    def weight_in_words(self) -> float | str:
        """Return the weight for a reader: a number, or its start and its end."""
        return self.weight if isinstance(self.weight, float) else f"{self.weight.start:g} to {self.weight.to:g}"

    def weight_at(self, step: int, steps: int) -> float:
        """Return the weight at step `step` (from 0) of `steps`."""
        if isinstance(self.weight, float):
            return self.weight
        done = min(1.0, step / (self.weight.until * steps))
        return self.weight.start + done * (self.weight.to - self.weight.start)


Control = Literal["no_teacher", "vanilla"]
CONTROLS: dict[Control, tuple[Term, ...]] = {
    "no_teacher": (Term(of={"loss": "cross_entropy"}),),
    "vanilla": (Term(of={"loss": "forward_kl"}),),
}

Rates = Annotated[dict[Kind, Rate], Field(min_length=1)]
Estimators = Literal["plain", "reste", "biper"]
Latents = Literal["codes", "teacher"]
Scales = Literal["learned", "median"]
PhaseKind = Literal["blockwise", "end_to_end"]
AS_IN_RECIPE = "as in the recipe, whose value null keeps"


class Phase(BaseModel):
    """One part of a distillation that has several; what is null is as the recipe says. Every phase starts from the
    compressed weights that the one before left."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: PhaseKind = Field(description="each decoder block by itself, or the whole model")
    rates: Rates | None = Field(default=None, description=AS_IN_RECIPE)
    adapt: Adaptation | None = Field(default=None, description="low-rank terms that are added before it; null: none")
    regrow: Regrowth | None = Field(default=None, description="pruned matrices that are dense during it; null: none")
    estimator: Estimators | None = Field(default=None, description=AS_IN_RECIPE)
    latents: Latents | None = Field(default=None, description=AS_IN_RECIPE)
    scales: Scales | None = Field(default=None, description=AS_IN_RECIPE)
    freezing: Freezing | None = Field(default=None, description=AS_IN_RECIPE)
    batch: int | None = Field(default=None, ge=1, description=AS_IN_RECIPE)
    micro_batch: int | None = Field(default=None, ge=1, description=AS_IN_RECIPE)
    steps: int | None = Field(default=None, ge=1, description="optimizer steps, of every block if it is blockwise")
    warmup: float | None = Field(default=None, ge=0, le=1, description=AS_IN_RECIPE)
    final_rate: float | None = Field(default=None, ge=0, le=1, description=AS_IN_RECIPE)
    evaluate_every: int | None = Field(default=None, ge=1, description=AS_IN_RECIPE)


class Teacher(BaseModel):
    """The source of the teacher's predictions. Online, it runs in every step. Cached, its predictions are stored once:
    the likeliest tokens of each, and the mass of all others."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["online", "cached"] = Field(
        default="online", description="online: it runs in every step; cached: its likeliest tokens are stored once"
    )
    k: int = Field(default=64, ge=1, description="likeliest tokens that are cached; all of them if there are fewer")
    folder: str | None = Field(
        default=None,
        min_length=1,
        description="of the cache, for several runs on the same tokens; null: beside the output, until that is there",
    )
    bits: Literal[8, 4] | None = Field(
        default=None, description="of its linears while it teaches, by bitsandbytes; null: as many as they have"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Teacher:
        online = Teacher.model_construct(bits=self.bits)
        if self.kind == "online" and self != online:  # a recipe that was written has the defaults
            raise ValueError("k and folder are those of a cache; leave them out, or set kind to cached")
        return self


class Distillation(BaseModel):
    """A distillation of a dense teacher into a student, compressed or with fewer or narrower blocks."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: Literal[1] = Field(default=1, description="of the format of recipes")
    name: str = Field(
        default="distillation", min_length=1, max_length=200, description="in reports; by default that of the file"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="of everything random")
    data: Texts = Field(
        default=TextSource(samples=528, length=256, held_out=16),
        description="the text to learn from, or a list",
    )
    mixture: Mixture = Field(default=Mixture(), description="how several texts share the steps")
    on_policy: OnPolicy | None = Field(
        default=None, description="sequences that the student goes on with itself; null: all text is that of the data"
    )
    losses: tuple[Term, ...] = Field(
        default=(Term(of={"loss": "forward_kl"}),), min_length=1, description="terms of the objective, which are added"
    )
    balance: bool = Field(
        default=False,
        description="weights of losses are proportions of the norms of their gradients, measured at every look at the "
        "held-out sequences; false: of the losses themselves",
    )
    controls: tuple[Control, ...] = Field(
        default=(),
        description="run beside it, for the report: the same student on the same tokens without a teacher "
        "(no_teacher), by plain forward KL (vanilla)",
    )
    teacher: Teacher = Field(default=Teacher(), description="where the teacher's predictions come from")
    rates: dict[Kind, Rate] = Field(
        default={"scales": 1e-3, "factors": 1e-3, "norms": 1e-3},
        min_length=1,
        description="learning rates of what trains, in shares of the size of its numbers: latent codes, scales of "
        "grids, values kept as they are, low-rank factors, norms and biases, weights of linears that are "
        "dense, projections of hidden states to the teacher's width, branches of exits with them, scores of learned "
        "masks; what has no rate stays as it is",
    )
    adapt: Adaptation | None = Field(
        default=None, description="low-rank terms that are added to compressed linears, and trained with the factors"
    )
    regrow: Regrowth | None = Field(
        default=None, description="pruned matrices that train dense, and are pruned again at the end"
    )
    estimator: Literal["plain", "reste", "biper"] = Field(default="plain", description="gradient through rounding")
    latents: Literal["codes", "teacher"] = Field(
        default="codes",
        description="where latent codes start: at the codes, or at the teacher's weights where these are in the codes' "
        "cells",
    )
    scales: Literal["learned", "median"] = Field(
        default="learned",
        description="of symmetric grids with two or three levels whose codes train: learned at their rate, if they "
        "have one; or after every step the median of the absolute latents",
    )
    freezing: Freezing | None = Field(
        default=None, description="of codes that oscillate between their neighbours while they train; null: none"
    )
    batch: int = Field(default=8, ge=1, description="sequences of an optimizer step, over all processes")
    micro_batch: int = Field(default=2, ge=1, description="sequences of one forward in one process")
    steps: int | None = Field(default=None, ge=1, description="optimizer steps; null: one pass over the data")
    phases: tuple[Phase, ...] = Field(default=(), description="done one after the other; none: one end to end")
    warmup: float = Field(default=0.05, ge=0, le=1, description="share of the steps in which rates rise from 0")
    final_rate: float = Field(default=0.1, ge=0, le=1, description="what is left of the rates at the end of a cosine")
    clip: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="largest norm of a gradient")
    compute: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="dtype of matrix products; auto: bfloat16 where it is faster"
    )
    checkpointing: bool = Field(
        default=False, description="end to end: activations are computed again instead of being kept"
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        default="adamw",
        description="end to end; 8-bit: moments of 2 bytes for each number instead of 8, by bitsandbytes",
    )
    trackers: tuple[str, ...] = Field(
        default=(), description="where accelerate sends the metrics too, such as tensorboard; they are always in a file"
    )
    evaluate_every: int = Field(default=25, ge=1, description="steps between looks at the held-out sequences")
    save_every: int | None = Field(
        default=None,
        ge=1,
        description="steps between states that a run can resume from; null: as often as writing them takes a twentieth "
        "of the time",
    )
    save_minutes: float = Field(default=10, gt=0, allow_inf_nan=False, description="and minutes between them at most")

    def texts(self) -> tuple[TextSource, ...]:
        """Return the texts to read: one, or those of the domains."""
        return self.data if isinstance(self.data, tuple) else (self.data,)

    def stages(self) -> tuple[tuple[PhaseKind, Distillation], ...]:
        """Return the kind of each phase, and the recipe of that phase alone."""
        if not self.phases:
            return (("end_to_end", self),)
        return tuple((phase.kind, self._alone(phase)) for phase in self.phases)

    def _alone(self, phase: Phase) -> Distillation:
        given = {name: value for name in type(phase).model_fields if (value := getattr(phase, name)) is not None}
        del given["kind"]
        return self.model_copy(update={"phases": (), **given})

    @model_validator(mode="after")
    def _consistent(self) -> Distillation:
        for option, given in {"adapt": self.adapt, "regrow": self.regrow}.items():
            if self.phases and given is not None:
                raise ValueError(f"{option} stands beside phases; give it to the phase that it is for")
        for kind, stage in self.stages():
            if stage.batch % stage.micro_batch:
                raise ValueError(f"batch {stage.batch} is no multiple of micro_batch {stage.micro_batch}")
            stage._check_regrow(kind)
            if any(term.branch for term in self.losses) and "projections" not in stage.rates:
                raise ValueError("branches of exits train with the projections, which rates has nothing for; add them")
            if stage.adapt is not None and "factors" not in stage.rates:
                raise ValueError("adapt adds low-rank factors, which rates has nothing for; give rates one for factors")
            stage._check_latents()
        if self.mixture.reweight != "none" and isinstance(self.data, TextSource):
            raise ValueError("mixture: there is one text, so no shares to move; list domains in data, or leave it out")
        if all(reads_states(term.of) for term in self.losses):
            raise ValueError("losses: hidden states alone do not teach what follows; add a loss such as forward_kl")
        if all(reads_states(term.of) or term.exits for term in self.losses):
            raise ValueError(
                "losses: exits do not teach the blocks behind them; add a loss without, such as forward_kl"
            )
        if self.balance and len(self.losses) == 1:
            raise ValueError("balance is between several losses, and there is one; leave it out")
        self._check_controls()
        self._check_on_policy()
        if self.teacher.kind == "cached":
            self._check_cached()
        return self

    def _check_controls(self) -> None:
        """Raises ValueError for controls that would be this distillation itself, or each other."""
        if len(set(self.controls)) < len(self.controls):
            raise ValueError("controls: each of them runs once; name no_teacher and vanilla once")
        if self.controls and all(kind == "blockwise" for kind, _ in self.stages()):
            raise ValueError("controls differ in their losses, which blockwise phases do not have; leave them out")
        own = None if self.on_policy else self.losses
        if same := [name for name in self.controls if CONTROLS[name] == own]:
            raise ValueError(f"controls: {same[0]} has the losses that the recipe has itself; leave it out")

    def _check_on_policy(self) -> None:
        """Raises ValueError for what cannot learn from the student's own words."""
        if self.on_policy is None:
            return
        share = self.on_policy.share
        for batch in (stage.batch for kind, stage in self.stages() if kind == "end_to_end"):
            if not self.on_policy.rows(batch):
                raise ValueError(f"on_policy: a share of {share:g} is no sequence of a batch of {batch}; raise it")
        if truth := sorted({term.of.loss for term in self.losses if term.of.reads_truth}):
            raise ValueError(
                f"on_policy: {' and '.join(truth)} takes the next token for the truth, and the student wrote it; use "
                f"losses between predictions, such as forward_kl"
            )
        if self.teacher.kind == "cached":
            raise ValueError("on_policy: what the student will write cannot be cached; use `teacher: {kind: online}`")
        if self.checkpointing:
            raise ValueError("on_policy: a student that recomputes activations cannot write; set checkpointing: false")
        if all(kind == "blockwise" for kind, _ in self.stages()):
            raise ValueError("on_policy: blockwise phases read no predictions; leave it out, or add an end_to_end one")

    def _check_regrow(self, kind: PhaseKind) -> None:
        """Raises ValueError for masks that would not move as asked for."""
        if self.regrow is None:
            return
        learned = self.regrow.by == "learned"
        if learned and "masks" not in self.rates:
            raise ValueError("regrow learns masks, which rates has nothing for; give rates one for masks, as 1.0e-2")
        if not learned and "values" not in self.rates:
            raise ValueError("regrow lets kept weights train, which rates has nothing for; give rates one for values")
        if learned and kind == "blockwise":
            raise ValueError("masks learn end to end; leave by: learned out of a blockwise phase")

    def _check_latents(self) -> None:
        """Raises ValueError for what is asked of latent codes that there are none of, or not such ones."""
        asked = {"freezing": self.freezing is not None, "scales: median": self.scales == "median"}
        for option, there in asked.items():
            if there and "codes" not in self.rates:
                raise ValueError(f"{option} is of codes that train, and rates has nothing for codes; give it a rate")
        if self.scales == "median" and self.latents == "codes":
            raise ValueError(
                "scales: median is of latents that are weights, and those that start at the codes are not; set "
                "latents: teacher"
            )
        if self.scales == "median" and self.estimator == "biper":
            raise ValueError(
                "scales: median does not go with estimator: biper, whose latents are angles and no sizes; use plain "
                "or reste"
            )

    def _check_cached(self) -> None:
        """Raises ValueError for losses that ask for more than is cached of a teacher."""
        states = sorted({term.of.loss for term in self.losses if reads_states(term.of)})
        if states:
            raise ValueError(
                f"losses: {' and '.join(states)} cannot be computed from a cached teacher, which has no hidden states; "
                f"use `teacher: {{kind: online}}`"
            )
        whole = sorted({term.of.loss for term in self.losses if term.of.reads() == "whole"})
        if whole:
            raise ValueError(
                f"losses: {' and '.join(whole)}, as asked for, cannot be computed from a cached teacher, which lacks "
                f"the unlikely tokens; use `teacher: {{kind: online}}`, or a loss such as forward_kl at temperature 1"
            )
