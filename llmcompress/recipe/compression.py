"""The recipe of a compression: steps for layers, calibration text, and everything else that a user may ask for.

    version: 1
    name: pb-eora
    calibration: {dataset: builtin, samples: 64}
    rules:                                   # the first rule that matches a layer wins
      - match: ['*.mlp.down_proj']           # globs on module paths; 're:' starts a regular expression
        steps: [{method: gptq, bits: 3, group_size: 64}]
      - role: value                          # or what a layer does, whatever its family calls it
        steps: [{method: gptq, bits: 6}]
        inputs: {format: int8}               # and its inputs are rounded, as an engine will
      - match: '*'
        steps: []                            # stays dense, said on purpose
    distill: {steps: 100}                    # then the dense model teaches it

The same classes can be built in Python. `read.py` turns a file into one: any mistake is one sentence with its line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from llmcompress.recipe.calibration import Calibration, TokenWeights, shorten_text
from llmcompress.recipe.distillation import Distillation
from llmcompress.recipe.reconstruction import Reconstruction
from llmcompress.recipe.rules import Rule, Step
from llmcompress.recipe.sections import Fuse, Gates, Tie
from llmcompress.recipe.target import Target
from llmcompress.recipe.trial import FEWEST
from llmcompress.recipe.yaml import Path, Places, at

Option = Annotated[tuple[Step, ...], Field(min_length=1)]
Damage = Literal["distortion", "noise", "kl"]


@dataclass(frozen=True)
class Origin:
    """The places that a recipe was read from. All origins are equal, so recipes compare by what they ask for."""

    places: Places = field(default_factory=dict, compare=False)


class Recipe(BaseModel, extra="forbid", frozen=True):
    """A compression run. `compress` and `plan` also read one from a file or from plain values."""

    version: Literal[1] = Field(default=1, description="version of the recipe format")
    name: str = Field(
        default="recipe", min_length=1, max_length=200, description="name in reports; by default the file's name"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="random seed of the run")
    calibration: Calibration | None = Field(
        default=None, description="text for the statistics; null: no method needs any"
    )
    trial: bool = Field(
        default=False, description="true: read the least text and take the fewest steps, to see that all works"
    )
    prefix: Literal["compressed", "dense"] = Field(
        default="compressed", description="whether the inputs of a layer come from the compressed or the dense model"
    )
    asymmetric: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="how far a layer is fitted to the outputs of the dense model: 0 not at all, 1 fully (GPTAQ)",
    )
    compute: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="dtype of matrix products in calibration; auto: bfloat16 where it is faster"
    )
    exact_errors: bool = Field(
        default=False, description="report errors over all rows of large layers instead of 512 rows"
    )
    cap: float | None = Field(
        default=4.0,
        gt=0,
        allow_inf_nan=False,
        description="most that a token's norm counts, in medians of its sequence; null: no limit",
    )
    token_weights: TokenWeights | None = Field(
        default=None, description="how much each calibration token counts; null: all the same"
    )
    fuse: Fuse | None = Field(default=None, description="changes to the dense model before compression; null: none")
    tie: Tie | None = Field(default=None, description="blocks that share their matrices; null: none")
    target: Target | None = Field(
        default=None, description="a size or a quality, for which the steps of layers without a rule are chosen"
    )
    options: tuple[Option, ...] | None = Field(
        default=None, min_length=1, description="lists of steps to choose from for a target; null: trellises"
    )
    damage: Damage = Field(
        default="distortion",
        description="how an option is judged for a target. distortion: its output error, times the damage of an error "
        "in that layer, measured once with one option; noise: the same, measured with noise; kl: the KL of the "
        "model's predictions with each option in turn, which takes three times as many measurements",
    )
    rules: tuple[Rule, ...] = Field(default=(), description="steps by layer; optional with a target")
    embeddings: tuple[Step, ...] = Field(
        default=(),
        description="steps for the token table and the output head. A table that is not also the head gets steps that "
        "store the same without statistics of inputs, such as rtn for gptq",
    )
    head: tuple[Step, ...] | None = Field(
        default=None,
        description="steps for an output head that is not also the token table; null: as embeddings; []: stays dense",
    )
    table: tuple[Step, ...] | None = Field(
        default=None,
        description="steps for a token table that is not also the head; null: as embeddings; []: stays dense",
    )
    kv_cache: Literal["fp8"] | None = Field(
        default=None,
        description="numbers that vLLM keeps keys and values in, by scales from the calibration text; null: no scales",
    )
    gates: Gates = Field(default=Gates(), description="limits within which the run counts as done")
    reconstruct: Reconstruction | None = Field(
        default=None, description="training of every block once its layers are compressed; null: none"
    )
    distill: Distillation | None = Field(
        default=None, description="a distillation of the compressed model, taught by the dense one; null: none"
    )
    _origin: Origin = PrivateAttr(default_factory=Origin)

    def at(self, path: Path) -> str:
        """Return the place of the entry at `path`, such as "recipe.yaml:14: "; "" for a recipe without places."""
        return at(path, self._origin.places) if self._origin.places else ""

    def keeps_dense(self, table: str) -> bool:
        """True if a rule without steps names the token table or the output head."""
        return any(rule.covers(table) for rule in self.rules if not rule.steps)

    @field_validator("reconstruct", "distill", mode="before")
    @classmethod
    def _inherit_values(cls, section: Any, info: ValidationInfo) -> Any:
        """Give a section the version, name and seed of the recipe, unless it has its own."""
        inherited = {key: info.data[key] for key in ("version", "name", "seed") if key in info.data}
        return inherited | section if isinstance(section, dict) else section

    @model_validator(mode="before")
    @classmethod
    def _shorten(cls, values: Any) -> Any:
        """Shorten the text, the training of blocks and the distillation of a trial."""
        if not isinstance(values, dict) or values.get("trial") is not True:
            return values
        distill, blocks, few = values.get("distill"), values.get("reconstruct"), FEWEST["steps"]
        shorter = {"distill": distill | {"trial": True}} if isinstance(distill, dict) else {}
        if isinstance(blocks, dict):
            steps = few if blocks.get("steps") is None else blocks["steps"]
            shorter["reconstruct"] = blocks | {"steps": min(steps, few) if isinstance(steps, int) else steps}
        return values | {"calibration": shorten_text(values.get("calibration"))} | shorter

    @field_validator("rules")
    @classmethod
    def _check_rules(cls, rules: tuple[Rule, ...], info: ValidationInfo) -> tuple[Rule, ...]:
        if not rules and info.data.get("target", ()) is None and info.data.get("tie", ()) is None:
            raise ValueError("rules is []; it must not be empty")
        return rules

    @model_validator(mode="after")
    def _check_sections(self) -> Recipe:
        if self.target is None and self.tie is None and not self.rules:
            raise ValueError('the key "rules" is missing')
        if self.tie is not None:
            self._check_tied()
        if self.options is not None and self.target is None:
            raise ValueError(
                "options: they are the choices for a target, and there is none; set target, or leave options out"
            )
        if self.damage != "distortion" and self.target is None:
            raise ValueError(
                "damage: it says how options are judged, and there is no target; set target, or leave damage out"
            )
        if self.target is not None and (self.calibration is None or not self.calibration.held_out):
            raise ValueError("target: options are judged on held-out text; add calibration with held_out more than 0")
        if self.target is not None and self.fuse is not None:
            raise ValueError("fuse: a target measures the model as it is; leave one of them out")
        is_sized = self.target is not None and (self.target.bytes is not None or self.target.bpw is not None)
        if is_sized and self.distill is not None and any(stage.adapt for _, stage in self.distill.stages()):
            raise ValueError("distill: adapt adds low-rank terms, which a size has no room for; leave one of them out")
        if any(rule.inputs for rule in self.rules):
            self._check_inputs()
        if self.reconstruct is not None and (self.calibration is None or not self.calibration.held_out):
            raise ValueError("reconstruct: blocks are judged on held-out text; add calibration with held_out over 0")
        if self.reconstruct is not None and self.prefix == "dense":
            raise ValueError(
                "reconstruct: blocks make up for those before them, which prefix: dense hides; leave one of them out"
            )
        if self.token_weights is not None and self.calibration is None:
            raise ValueError("token_weights: there are no tokens to weigh; add calibration, or leave token_weights out")
        if self.asymmetric and self.prefix == "dense":
            raise ValueError("asymmetric: with prefix: dense every layer sees dense inputs anyway; set one of them")
        return self

    def _check_inputs(self) -> None:
        """Raise ValueError for sections that do not go with inputs that are rounded."""
        for name in (name for name in ("target", "tie") if getattr(self, name) is not None):
            raise ValueError(
                f"rules: inputs are rounded for rules of their own, not with {name}; leave one of them out"
            )
        if self.calibration is None and any(rule.inputs and rule.inputs.is_calibrated for rule in self.rules):
            raise ValueError(
                "rules: a scale of inputs for all tokens is calibrated; add calibration, or let scale be token"
            )

    def _check_tied(self) -> None:
        """Raise ValueError for sections that do not work on blocks that share matrices."""
        given = {"target": self.target, "reconstruct": self.reconstruct, "fuse": self.fuse and self.fuse.awq}
        reasons = {
            "target": "prices are those of a matrix for itself; choose the steps by rules",
            "reconstruct": "a block would move the matrices of others; let distill: train them together",
            "fuse": "awq gives every block scales of its own; leave it out",
        }
        for name in (name for name, section in given.items() if section):
            raise ValueError(f"tie: {name} does not go with blocks that share matrices, since {reasons[name]}")
