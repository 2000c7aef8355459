"""The recipe of a compression: steps for layers, calibration text, and everything else a user may ask for.

    version: 1
    name: pb-eora
    calibration: {dataset: stdlib, samples: 64}
    rules:                                   # the first rule that matches a layer wins
      - match: ['*.mlp.down_proj']           # globs on module paths; 're:' starts a regular expression
        steps: [{method: gptq, bits: 3, group_size: 64}]
      - role: value                          # or what a linear does, whatever its family calls it
        steps: [{method: gptq, bits: 6}]
      - match: '*'
        steps: []                            # stays dense, said on purpose
    distill: {steps: 100}                    # then the dense model teaches it

The same classes can be built in Python. `read` turns a file into one, and is strict: one sentence names the line of
whatever is wrong. The recipe is saved with the result.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from llmcompress.recipe.calibration import Calibration, TokenWeights
from llmcompress.recipe.distillation import Distillation
from llmcompress.recipe.fuse import Fuse
from llmcompress.recipe.patterns import Matching, matches
from llmcompress.recipe.reconstruction import Reconstruction
from llmcompress.recipe.step import Step
from llmcompress.recipe.target import Target
from llmcompress.recipe.tie import Tie
from llmcompress.recipe.yaml import Path, Places, at

VERSION = 1


Option = Annotated[tuple[Step, ...], Field(min_length=1)]
Damage = Literal["distortion", "noise", "kl"]
Role = Literal["query", "key", "value", "output", "gate", "up", "down"]


class Rule(Matching):
    """The steps for the layers that match one of the patterns or have one of the roles. No steps: these stay dense.

    A fused layer has several roles; see `matching.assign`.
    """

    match: tuple[str, ...] = Field(
        default=(),
        min_length=1,
        description="globs on module paths, or regular expressions as 're:…'; in the place of role",
    )
    role: tuple[Role, ...] = Field(
        default=(),
        min_length=1,
        description="what layers do in their block, whatever the family calls them; in the place of match",
    )
    steps: tuple[Step, ...] = Field(description="methods in their order; none: the layers stay dense")

    @field_validator("role", mode="before", json_schema_input_type=Role | tuple[Role, ...])
    @classmethod
    def _one_role_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _match_or_role(self) -> Rule:
        if bool(self.match) == bool(self.role):
            raise ValueError("give either match or role")
        return self

    @model_serializer(mode="wrap")
    def _without_unused(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unused = "role" if self.match else "match"
        return {key: value for key, value in plain(self).items() if key != unused}

    def covers(self, name: str, role: str | None = None) -> bool:
        """True if the rule is about the layer `name`, or about its part that has `role`."""
        return role in self.role or any(matches(pattern, name) for pattern in self.match)


class Gates(BaseModel):
    """Limits that a run must keep to count as done.

    Both of quality are measured at the end, after a distillation too, on at most 2,048 held-out tokens of the
    calibration. A checkpoint outside of them stays as evidence, and is not pushed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    max_fallback_layers: float = Field(
        default=0.02, ge=0, le=1, description="share of layers that may need a numeric fallback"
    )
    kl: float | None = Field(
        default=2.5,
        gt=0,
        allow_inf_nan=False,
        description="most KL to the dense model, in nats per token; null switches it off",
    )
    perplexity_ratio: float | None = Field(
        default=10.0,
        ge=1,
        allow_inf_nan=False,
        description="most perplexity, in multiples of the dense model's; null switches it off",
    )

    @property
    def of_quality(self) -> dict[str, float]:
        """The limits that are measured at the end, by name; those that are switched off are absent."""
        limits = {"kl": self.kl, "perplexity_ratio": self.perplexity_ratio}
        return {name: limit for name, limit in limits.items() if limit is not None}


@dataclass(frozen=True)
class Origin:
    """The places that a recipe was read from. All origins are equal, so recipes compare by what they ask for."""

    places: Places = field(default_factory=dict, compare=False)


class Recipe(BaseModel):
    """A compression run; `compress` and `plan` read one from a file or from plain values, too."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: Literal[1] = Field(default=1, description="of the format of recipes")
    name: str = Field(
        default="recipe", min_length=1, max_length=200, description="in reports; by default that of the file"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="of everything random")
    calibration: Calibration | None = Field(
        default=None, description="text for the statistics; null: no method needs any"
    )
    prefix: Literal["compressed", "dense"] = Field(
        default="compressed", description="what the inputs of a layer went through"
    )
    asymmetric: float = Field(
        default=0.0, ge=0, le=1, description="share of the way to the dense layer's outputs (GPTAQ)"
    )
    compute: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="products in calibration's forward; auto: bfloat16 where it is faster"
    )
    exact_errors: bool = Field(
        default=False, description="report errors of all rows of large layers, not of 512 of them"
    )
    cap: float | None = Field(
        default=4.0,
        gt=0,
        allow_inf_nan=False,
        description="most a token's norm counts, in medians of its sequence; null: all",
    )
    token_weights: TokenWeights | None = Field(default=None, description="what calibration's tokens count; null: alike")
    fuse: Fuse | None = Field(default=None, description="what is fused into the dense model before; null: nothing")
    tie: Tie | None = Field(default=None, description="which blocks have their matrices in common; null: none")
    target: Target | None = Field(default=None, description="how large or how good: the other layers' steps are chosen")
    options: tuple[Option, ...] | None = Field(
        default=None, min_length=1, description="lists of steps to choose from for a target; null: trellises"
    )
    damage: Damage = Field(
        default="distortion",
        description="what an option is judged by: its output error times what errors of that layer cost, measured "
        "once, by one option or (noise) by noise; or the KL of the model's predictions with each option in it, in "
        "three times the probes",
    )
    rules: tuple[Rule, ...] = Field(default=(), description="may be left out where there is a target")
    embeddings: tuple[Step, ...] = Field(
        default=(),
        description="steps for the token table and the output head; a table that is not the head has those that store "
        "the same without statistics of inputs, such as rtn for gptq",
    )
    head: tuple[Step, ...] | None = Field(
        default=None, description="steps for an output head that is not tied; null: those of embeddings, none: dense"
    )
    table: tuple[Step, ...] | None = Field(
        default=None, description="steps for a token table that is not the head; null: as embeddings says, none: dense"
    )
    gates: Gates = Field(default=Gates(), description="what the run must reach to count as done")
    reconstruct: Reconstruction | None = Field(
        default=None, description="how every block learns once its layers are set; null: it does not"
    )
    distill: Distillation | None = Field(
        default=None, description="a distillation of what was compressed, towards the same model; null: none"
    )
    _origin: Origin = PrivateAttr(default_factory=Origin)

    def at(self, path: Path) -> str:
        """Return the place of the entry at `path` such as "recipe.yaml:14: ", or "" for a recipe without places."""
        return at(path, self._origin.places) if self._origin.places else ""

    def keeps_dense(self, table: str) -> bool:
        """True if a rule without steps names the token table or the output head."""
        return any(rule.covers(table) for rule in self.rules if not rule.steps)

    @field_validator("reconstruct", "distill", mode="before")
    @classmethod
    def _inherit(cls, section: Any, info: ValidationInfo) -> Any:
        """Give a section the recipe's version, name and seed where it has none of its own."""
        inherited = {key: info.data[key] for key in ("version", "name", "seed") if key in info.data}
        return inherited | section if isinstance(section, dict) else section

    @field_validator("rules")
    @classmethod
    def _some(cls, rules: tuple[Rule, ...], info: ValidationInfo) -> tuple[Rule, ...]:
        if not rules and info.data.get("target", ()) is None and info.data.get("tie", ()) is None:
            raise ValueError("rules is []; it must not be empty")
        return rules

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.target is None and self.tie is None and not self.rules:
            raise ValueError('the key "rules" is missing')
        if self.tie is not None:
            self._check_tied()
        if self.options is not None and self.target is None:
            raise ValueError("options: they are what a target is reached with, and there is none; set target or rules")
        if self.damage != "distortion" and self.target is None:
            raise ValueError(
                "damage: it says how options are judged, and there is no target; set target, or leave it out"
            )
        if self.target is not None and (self.calibration is None or not self.calibration.held_out):
            raise ValueError("target: options are judged on held-out text; add calibration with held_out more than 0")
        if self.target is not None and self.fuse is not None:
            raise ValueError("fuse: a target prices the model as it is; leave one out")
        if self.reconstruct is not None and (self.calibration is None or not self.calibration.held_out):
            raise ValueError("reconstruct: blocks are judged on held-out text; add calibration with held_out over 0")
        if self.reconstruct is not None and self.prefix == "dense":
            raise ValueError(
                "reconstruct: blocks make up for those before them, which prefix: dense hides; leave it out"
            )
        if self.token_weights is not None and self.calibration is None:
            raise ValueError("token_weights: there are no tokens to weigh; add calibration, or leave token_weights out")
        if self.asymmetric and self.prefix == "dense":
            raise ValueError("asymmetric: with prefix: dense every layer sees dense inputs anyway; set one of them")
        return self

    def _check_tied(self) -> None:
        """Raise ValueError for what a recipe cannot ask of blocks that have matrices in common."""
        others = {"target": self.target, "reconstruct": self.reconstruct, "fuse": self.fuse and self.fuse.awq}
        why = {
            "target": "prices are those of a matrix for itself; choose the steps by rules",
            "reconstruct": "a block would move the matrices of others; let distill: train them together",
            "fuse": "awq gives every block scales of its own; leave it out",
        }
        for name in (name for name, asked in others.items() if asked):
            raise ValueError(f"tie: {name} does not go with blocks that have matrices in common, since {why[name]}")
