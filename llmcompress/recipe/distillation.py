"""The recipe of a distillation: what trains, on which text, against which losses, for how long."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator

import llmcompress.losses  # noqa: F401 (registers them)
from llmcompress.losses.loss import LossConfig, loss_config, reads_states
from llmcompress.recipe.calibration import TRIAL, Mixture, Texts, TextSource, shorten_text
from llmcompress.recipe.sections import (
    Adaptation,
    Estimator,
    Freezing,
    Kind,
    Latents,
    Layers,
    OnPolicy,
    Phase,
    PhaseKind,
    Rate,
    Regrowth,
    Scales,
    Schedule,
    Teacher,
)
from llmcompress.recipe.trial import FEWEST, fewest_steps


def _read_loss(value: Any) -> Any:
    """Return a loss from its map of arguments. Raises ValueError (pydantic's error is one) for what is not a loss."""
    if isinstance(value, LossConfig):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("loss"), str):
        raise ValueError("a loss is a map such as {loss: forward_kl}")
    return loss_config(value)


def _read_weight(value: Any) -> Any:
    """Return a number or a schedule. Raises ValueError for anything else."""
    if isinstance(value, int | float | Schedule) and not isinstance(value, bool):
        return value
    try:
        return Schedule.model_validate(value)
    except ValidationError as error:
        raise ValueError("a weight is a number above 0, or a map such as {from: 1.0, to: 0.0, until: 0.5}") from error


class Term(BaseModel, extra="forbid", frozen=True):
    """One loss, and its share of the objective."""

    of: Annotated[SerializeAsAny[LossConfig], BeforeValidator(_read_loss)] = Field(
        description="the loss and its arguments"
    )
    weight: Annotated[float | Schedule, BeforeValidator(_read_weight)] = Field(
        default=1.0, description="share of the objective: a number above 0, or a schedule"
    )
    layers: Layers | None = Field(
        default=None,
        min_length=1,
        description="for a loss on hidden states: blocks whose inputs are compared. 5 is block 5 of both models, "
        "[2, 5] is block 2 of the student and 5 of the teacher; null: all blocks of the student but the first",
    )
    exits: tuple[int, ...] | None = Field(
        default=None,
        min_length=1,
        description="for a loss on predictions: numbers of blocks after which the student's hidden states are read as "
        "predictions, instead of after the last; the loss is the mean over them",
    )
    branch: bool = Field(
        default=False,
        description="with exits: a square matrix before the norm of each exit, trained at the rate of projections and "
        "dropped after the run",
    )

    @model_validator(mode="after")
    def _check_term(self) -> Term:
        if isinstance(self.weight, float) and not 0 < self.weight < math.inf:
            raise ValueError(f"weight is {self.weight:g}; it must be a number above 0")
        if self.layers is not None and not reads_states(self.of):
            raise ValueError(f"{self.of.loss} reads predictions, which belong to no layer; leave layers out")
        if self.exits is not None and reads_states(self.of):
            raise ValueError(f"{self.of.loss} reads hidden states, not predictions at exits; name blocks in layers")
        if self.branch and self.exits is None:
            raise ValueError("branch needs exits, and there are none; name them, or leave it out")
        if self.exits is not None and (len(set(self.exits)) < len(self.exits) or min(self.exits) < 1):
            raise ValueError(f"exits {', '.join(map(str, self.exits))} must be different numbers of blocks, from 1 on")
        if reads_states(self.of) and not self.of.counts_tokens and len(self.layers or ()) != 1:
            raise ValueError(
                f"{self.of.loss} per layer takes one layer; name it in layers, and write one loss for each"
            )
        return self

    def weight_in_words(self) -> float | str:
        """Return the weight for a report: a number, or its start and its end."""
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


class Distillation(BaseModel, extra="forbid", frozen=True):
    """The distillation of a dense teacher into a student: a compressed model, or one with fewer or narrower blocks."""

    version: Literal[1] = Field(default=1, description="version of the recipe format")
    name: str = Field(
        default="distillation", min_length=1, max_length=200, description="name in reports; by default the file's name"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="random seed of the run")
    trial: bool = Field(
        default=False, description="true: read the least text and take the fewest steps, to see that all works"
    )
    data: Texts = Field(
        default=TextSource(samples=528, length=256, held_out=16),
        description="the text to learn from, or a list of texts",
    )
    mixture: Mixture = Field(default=Mixture(), description="how several texts share the steps")
    on_policy: OnPolicy | None = Field(
        default=None, description="sequences that the student continues itself; null: all text is data"
    )
    losses: tuple[Term, ...] = Field(
        default=(Term(of={"loss": "forward_kl"}),), min_length=1, description="terms of the objective, which are added"
    )
    balance: bool = Field(
        default=False,
        description="true: weights are proportions of the losses' gradient norms, measured at every look at the "
        "held-out sequences; false: of the losses themselves",
    )
    controls: tuple[Control, ...] = Field(
        default=(),
        description="runs to compare with in the report, by the same student on the same tokens: without a teacher "
        "(no_teacher), or with forward KL alone (vanilla)",
    )
    teacher: Teacher = Field(default=Teacher(), description="where the teacher's predictions come from")
    rates: dict[Kind, Rate] = Field(
        default={"scales": 1e-3, "factors": 1e-3, "norms": 1e-3},
        min_length=1,
        description="learning rates of what trains, relative to the size of its numbers: of each by itself for scales "
        "and norms, of their root mean square for others. codes: latent codes; scales: "
        "scales of grids; values: weights kept as they are; factors: low-rank factors; norms: norms, and biases of "
        "layers that are not compressed; "
        "weights: dense linear layers; projections: of hidden states to the teacher's width, and branches of exits; "
        "masks: scores of learned masks. What has no rate stays as it is",
    )
    adapt: Adaptation | None = Field(
        default=None, description="low-rank terms to add to compressed linear layers; they train at the rate of factors"
    )
    regrow: Regrowth | None = Field(
        default=None, description="pruned matrices that train dense, and are pruned again at the end"
    )
    nested: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(),
        description="smaller sizes that train together with the whole, as shrink makes them: numbers of components of "
        "low-rank terms. The sequences of a step go to all sizes in turn; end to end",
    )
    estimator: Estimator = Field(default="plain", description="gradient through rounding")
    latents: Latents = Field(
        default="codes",
        description="where latent codes start: at the codes, or at the teacher's weights if these round to the same "
        "codes",
    )
    scales: Scales = Field(
        default="learned",
        description="scales of symmetric grids with two or three levels whose codes train: learned at their rate, or "
        "the median of the absolute latents after every step",
    )
    freezing: Freezing | None = Field(
        default=None, description="when to freeze codes that oscillate between neighbours; null: never"
    )
    batch: int = Field(default=8, ge=1, description="sequences in an optimizer step, over all processes")
    micro_batch: int = Field(default=2, ge=1, description="sequences in one forward pass of one process")
    steps: int | None = Field(default=None, ge=1, description="optimizer steps; null: one pass over the data")
    phases: tuple[Phase, ...] = Field(default=(), description="parts that run in turn; []: one, end to end")
    warmup: float = Field(default=0.05, ge=0, le=1, description="share of the steps in which rates rise from 0")
    final_rate: float = Field(
        default=0.1, ge=0, le=1, description="share of the rates that is left at the end of the cosine schedule"
    )
    clip: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="largest gradient norm")
    compute: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="dtype of matrix products; auto: bfloat16 where it is faster"
    )
    checkpointing: bool = Field(
        default=False, description="end to end: recompute activations instead of keeping them, to save memory"
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        default="adamw",
        description="end to end; 8-bit: 2 bytes of moments for each number instead of 8, by bitsandbytes",
    )
    trackers: tuple[str, ...] = Field(
        default=(), description="where accelerate also sends the metrics, such as tensorboard; a file always has them"
    )
    evaluate_every: int = Field(default=25, ge=1, description="steps between looks at the held-out sequences")
    save_every: int | None = Field(
        default=None,
        ge=1,
        description="steps between states that a run can resume from; null: chosen so that writing takes a twentieth "
        "of the time",
    )
    save_minutes: float = Field(
        default=10, gt=0, allow_inf_nan=False, description="most minutes between states that a run can resume from"
    )

    @model_validator(mode="before")
    @classmethod
    def _shorten(cls, values: Any) -> Any:
        """Shorten the texts and the phases of a trial."""
        if not isinstance(values, dict) or values.get("trial") is not True:
            return values
        phases = [
            each | fewest_steps(each, values) if isinstance(each, dict) else each for each in values.get("phases") or ()
        ]
        data = shorten_text(values.get("data", {}), fewest_steps()["batch"] + 1)
        few: dict[str, Any] = {"data": data, "phases": phases} | fewest_steps(values)
        if isinstance(teacher := values.get("teacher"), dict) and teacher.get("kind") == "cached":
            few["teacher"] = teacher | {"folder": None}  # of predictions of all the text
        if isinstance(own := values.get("on_policy"), dict):  # at least a sequence of a batch, and half of it to write
            share, prompt = own.get("share"), own.get("prompt")
            least = {"share": max(share, 1 / FEWEST["batch"])} if isinstance(share, float) else {}
            most = {"prompt": min(prompt, TRIAL["length"] // 2)} if isinstance(prompt, int) else {}
            few["on_policy"] = own | least | most
        if isinstance(sizes := values.get("nested"), list | tuple):
            few["nested"] = sizes[: FEWEST["batch"] - 1]
        return values | few

    def texts(self) -> tuple[TextSource, ...]:
        """Return the texts to read: one, or those of the domains."""
        return self.data if isinstance(self.data, tuple) else (self.data,)

    def stages(self) -> tuple[tuple[PhaseKind, Distillation], ...]:
        """Return the kind of each phase, and the recipe of that phase alone."""
        if not self.phases:
            return (("end_to_end", self),)
        return tuple((phase.kind, self._recipe_of(phase)) for phase in self.phases)

    def _recipe_of(self, phase: Phase) -> Distillation:
        given = {name: value for name in type(phase).model_fields if (value := getattr(phase, name)) is not None}
        del given["kind"]
        return self.model_copy(update={"phases": (), **given})

    @model_validator(mode="after")
    def _check_sections(self) -> Distillation:
        for option, given in {"adapt": self.adapt, "regrow": self.regrow}.items():
            if self.phases and given is not None:
                raise ValueError(f"{option} does not go with phases; write it inside the phase that it is for")
        for kind, stage in self.stages():
            if stage.batch % stage.micro_batch:
                raise ValueError(f"batch {stage.batch} is no multiple of micro_batch {stage.micro_batch}")
            stage._check_regrow(kind)
            if any(term.branch for term in self.losses) and "projections" not in stage.rates:
                raise ValueError("branches of exits train at the rate of projections, which rates lacks; add it")
            if stage.adapt is not None and "factors" not in stage.rates:
                raise ValueError("adapt adds low-rank factors, and rates has none for them; add a rate for factors")
            stage._check_latents()
        for option, default in {"latents": "codes", "estimator": "plain"}.items():
            users = [stage for _, stage in self.stages() if getattr(stage, option) != default]
            if users and all("codes" not in stage.rates for stage in users):
                raise ValueError(f"{option} needs codes that train, and rates has none for them; add a rate for codes")
        self._check_blockwise()
        if self.mixture.reweight != "none" and isinstance(self.data, TextSource):
            raise ValueError(
                "mixture: there is one text, so no shares to move; list several in data, or leave mixture out"
            )
        if all(reads_states(term.of) for term in self.losses):
            raise ValueError("losses: hidden states alone teach no predictions; add a loss such as forward_kl")
        if all(reads_states(term.of) or term.exits for term in self.losses):
            raise ValueError(
                "losses: exits do not train the blocks after them; add a loss without exits, such as forward_kl"
            )
        if self.balance and len(self.losses) == 1:
            raise ValueError("balance needs several losses, and there is one; leave it out")
        self._check_nested()
        self._check_controls()
        self._check_on_policy()
        if self.teacher.kind == "cached":
            self._check_cached()
        return self

    def _check_blockwise(self) -> None:
        """Raise ValueError for documents that a blockwise phase cannot keep apart, and for what no phase reads."""
        kinds = {kind for kind, _ in self.stages()}
        if "blockwise" in kinds and any(text.boundaries for text in self.texts()):
            raise ValueError(
                "a blockwise phase cannot keep documents apart; set boundaries: false in data, or leave it out"
            )
        end_to_end = {
            "losses": self.losses != CONTROLS["vanilla"],  # the default
            "balance": self.balance,
            "mixture: {reweight: ddk}": self.mixture.reweight == "ddk",
            "controls": bool(self.controls),
            "on_policy": self.on_policy is not None,
            "teacher": self.teacher != Teacher(),
        }
        if kinds == {"blockwise"} and (given := [option for option, is_given in end_to_end.items() if is_given]):
            raise ValueError(
                f"{given[0]}: blockwise phases read no predictions, but all text; leave it out, or add an end_to_end "
                f"phase"
            )

    def _check_nested(self) -> None:
        """Raise ValueError for a size that is there twice, or that no sequence of a step is left for."""
        if len(set(self.nested)) < len(self.nested):
            raise ValueError("nested: a number of components is there twice; leave one out")
        if self.nested and len(self.nested) >= min((s.batch for k, s in self.stages() if k == "end_to_end"), default=0):
            raise ValueError(
                f"nested: {len(self.nested) + 1} sizes, with the whole, need as many sequences in the batch of an "
                f"end_to_end phase; raise batch, or name fewer"
            )

    def _check_controls(self) -> None:
        """Raise ValueError for controls that would be this distillation itself, or each other."""
        if len(set(self.controls)) < len(self.controls):
            raise ValueError("controls: each runs once; name no_teacher and vanilla at most once")
        if self.controls and self.mixture.reweight == "ddk":
            raise ValueError("controls read the recipe's tokens, and those of ddk follow its student; leave one out")
        own = None if self.on_policy else self.losses
        if same := [name for name in self.controls if CONTROLS[name] == own]:
            raise ValueError(f"controls: {same[0]} has the same losses as the recipe; leave it out")

    def _check_on_policy(self) -> None:
        """Raise ValueError for what does not work on text that the student writes."""
        if self.on_policy is None:
            return
        share = self.on_policy.share
        for batch in (stage.batch for kind, stage in self.stages() if kind == "end_to_end"):
            if not self.on_policy.rows(batch):
                raise ValueError(
                    f"on_policy: a share of {share:g} is less than one sequence of a batch of {batch}; raise it"
                )
        if truth := sorted({term.of.loss for term in self.losses if term.of.reads_truth}):
            raise ValueError(
                f"on_policy: {' and '.join(truth)} learns the next token as the truth, and the student wrote it; "
                f"use losses between predictions, such as forward_kl"
            )
        if self.teacher.kind == "cached":
            raise ValueError("on_policy: text that the student writes cannot be cached; use `teacher: {kind: online}`")
        if self.checkpointing:
            raise ValueError(
                "on_policy needs generation, which checkpointing does not support; set checkpointing: false"
            )

    def _check_regrow(self, kind: PhaseKind) -> None:
        """Raise ValueError for masks and kept weights that have no rate, and for learned masks in a blockwise phase."""
        if self.regrow is None:
            return
        learned = self.regrow.by == "learned"
        if learned and "masks" not in self.rates:
            raise ValueError("regrow learns masks, and rates has none for them; add a rate for masks, such as 1.0e-2")
        if not learned and "values" not in self.rates:
            raise ValueError("regrow trains kept weights, and rates has none for them; add a rate for values")
        if learned and kind == "blockwise":
            raise ValueError("masks learn end to end; leave by: learned out of a blockwise phase")

    def _check_latents(self) -> None:
        """Raise ValueError for options of latent codes that do not train, or do not start at weights."""
        for option, given in {"freezing": self.freezing is not None, "scales: median": self.scales == "median"}.items():
            if given and "codes" not in self.rates:
                raise ValueError(f"{option} needs codes that train, and rates has none for them; add a rate for codes")
        if self.scales == "median" and self.latents == "codes":
            raise ValueError(
                "scales: median needs latents that are weights, and latents that start at the codes are not; set "
                "latents: teacher"
            )
        if self.scales == "median" and self.estimator == "biper":
            raise ValueError(
                "scales: median does not go with estimator: biper, whose latents are angles, not sizes; use plain or "
                "reste"
            )

    def _check_cached(self) -> None:
        """Raise ValueError for losses that need more of a teacher than is cached."""
        if states := sorted({term.of.loss for term in self.losses if reads_states(term.of)}):
            raise ValueError(
                f"losses: {' and '.join(states)} cannot be computed from a cached teacher, which has no hidden states; "
                f"use `teacher: {{kind: online}}`"
            )
        if whole := sorted({term.of.loss for term in self.losses if term.of.reads() == "whole"}):
            raise ValueError(
                f"losses: {' and '.join(whole)}, with these arguments, cannot be computed from a cached teacher, which "
                f"lacks the unlikely tokens; use `teacher: {{kind: online}}`, or forward_kl at temperature 1"
            )
