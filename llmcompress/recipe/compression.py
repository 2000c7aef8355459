"""What the user asked for: which steps for which layers, on which text. Strict, versioned, saved with the result.

    version: 1
    name: pb-eora
    calibration: {dataset: stdlib, samples: 64}
    rules:                                   # the first rule that matches a layer wins
      - match: ['*.mlp.down_proj']           # globs on module paths; 're:' starts a regular expression
        steps: [{method: gptq, bits: 3, group_size: 64}]
      - match: '*'
        steps: []                            # stays dense, said on purpose
    distill: {steps: 100}                    # then the dense model teaches it; `distill/recipe.py` reads this part

The same classes can be built in Python. Whatever is wrong is a RecipeError of one sentence that names the line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

import llmcompress.methods  # noqa: F401 (registers them)
from llmcompress.errors import RecipeError
from llmcompress.methods.layer import StepConfig, step
from llmcompress.recipe.calibration import Calibration, TokenWeights
from llmcompress.recipe.error_messages import (
    at,
    check_booleans,
    dotted,
    first_complaint,
    is_open,
    locate,
    paths,
    unknown_key,
)
from llmcompress.recipe.fuse import Fuse
from llmcompress.recipe.patterns import Matching
from llmcompress.recipe.target import Target
from llmcompress.recipe.yaml import OneLine, Path, Places, parse, written

VERSION = 1
S = TypeVar("S", bound=BaseModel)


def _step(value: Any) -> Any:
    """A step from its map of arguments. Raises ValueError (pydantic's kind is one) for what is not a step."""
    if not isinstance(value, dict):
        if isinstance(value, StepConfig):
            return value
        raise ValueError("a step is a map such as {method: rtn, bits: 4}")
    _check_plain(value)
    return step(value)


def _check_plain(arguments: dict[str, Any]) -> None:
    """Raises ValueError for what `step` takes for granted of a map, and of the steps inside it."""
    if not isinstance(arguments.get("method"), str):
        raise ValueError('a step needs the key "method" with the name of a method')
    for key, value in arguments.items():
        if not isinstance(key, str):
            raise ValueError(f"the key {key!r} is not text")
        if isinstance(value, dict) and "method" in value:
            _check_plain(value)


Step = Annotated[SerializeAsAny[StepConfig], BeforeValidator(_step)]
Option = Annotated[tuple[Step, ...], Field(min_length=1)]


class Rule(Matching):
    """The steps for the layers that match one of the patterns. No steps: these layers stay dense."""

    steps: tuple[Step, ...]


class Gates(BaseModel):
    """What a run must reach to count as done."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    max_fallback_layers: float = Field(
        default=0.02, ge=0, le=1, description="share of layers that may need a numeric fallback"
    )


@dataclass(frozen=True)
class _Origin:
    """Where a recipe was read from. All origins are equal, so that recipes compare by what they ask for."""

    places: Places = field(default_factory=dict, compare=False)


class Recipe(BaseModel):
    """A compression run. `read_recipe` makes one from a file or from plain values."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: Literal[1] = 1
    name: str = Field(default="recipe", min_length=1, max_length=200)
    seed: int = Field(default=0, ge=0, lt=2**63)
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
    cap: float | None = Field(
        default=4.0,
        gt=0,
        allow_inf_nan=False,
        description="most a token's norm counts, in medians of its sequence; null: all",
    )
    token_weights: TokenWeights | None = Field(default=None, description="what calibration's tokens count; null: alike")
    fuse: Fuse | None = Field(default=None, description="what is fused into the dense model before; null: nothing")
    target: Target | None = Field(default=None, description="how large or how good: the other layers' steps are chosen")
    options: tuple[Option, ...] | None = Field(
        default=None, min_length=1, description="lists of steps to choose from for a target; null: trellises"
    )
    damage: Literal["distortion", "kl"] = Field(
        default="distortion",
        description="what an option is judged by: its output error times what errors of that layer cost, measured "
        "once, or the KL of the model's predictions with each option in it, in three times the probes",
    )
    rules: tuple[Rule, ...] = Field(default=(), description="may be left out where there is a target")
    embeddings: tuple[Step, ...] = Field(
        default=(), description="steps for the token table, and for the output head where it is tied to it"
    )
    head: tuple[Step, ...] = Field(default=(), description="steps for an output head that is not tied")
    gates: Gates = Gates()
    reconstruct: dict[str, Any] | None = Field(
        default=None, description="how every block learns, once its layers are set; null: it does not"
    )
    distill: dict[str, Any] | None = Field(
        default=None, description="a distillation of what was compressed, towards the same model; null: none"
    )
    _origin: _Origin = PrivateAttr(default_factory=_Origin)

    @field_validator("rules")
    @classmethod
    def _some(cls, rules: tuple[Rule, ...], info: ValidationInfo) -> tuple[Rule, ...]:
        if not rules and info.data.get("target", ()) is None:
            raise ValueError("rules is []; it must not be empty")
        return rules

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.target is None and not self.rules:
            raise ValueError('the key "rules" is missing')
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


def read_recipe(source: Recipe | str | FilePath | Mapping[str, Any], settings: Sequence[str] = ()) -> Recipe:
    """A recipe of compression from a YAML file, from plain values, or as it is; `settings` as `overrides` takes them.

    Raises RecipeError for the first thing wrong with it.
    """
    return read_as(Recipe, source, settings)


def read_as(schema: type[S], source: S | str | FilePath | Mapping[str, Any], settings: Sequence[str] = ()) -> S:
    """`read_recipe` for any schema that has a version and a name."""
    if isinstance(source, schema):
        return _validated(schema, source.model_dump(mode="json"), {}, settings) if settings else source
    if isinstance(source, Mapping):
        return _validated(schema, dict(source), {}, settings)
    path = FilePath(cast(str, source)).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text (byte {error.start}); a recipe is a YAML file") from error
    except OSError as error:
        raise RecipeError(f"the recipe {path} cannot be read ({error.strerror}); give a YAML file") from error
    return _parsed(schema, text, path.name, settings)


def section(recipe: Recipe, key: str, schema: type[S]) -> S:
    """The map under `key` as a schema that this file does not know reads it. Of version, name and seed it has the
    recipe's unless it gives its own. Raises RecipeError for the first thing wrong with it."""
    values = getattr(recipe, key) or {}
    read = {path[1:]: where for path, where in recipe._origin.places.items() if path[:1] == (key,)}
    places = read or {path: dotted((key, *path)) for path in [(), *paths(values)]}
    own = {"version": VERSION, "name": recipe.name, "seed": recipe.seed}
    return _validated(schema, own | values, places, ())


def parse_recipe(text: str, name: str = "recipe.yaml", settings: Sequence[str] = ()) -> Recipe:
    """A recipe of compression from YAML text; `name` is the file's, for errors and recipes without a name of their own.

    Raises RecipeError for the first thing wrong with it.
    """
    return _parsed(Recipe, text, name, settings)


def _parsed(schema: type[S], text: str, name: str, settings: Sequence[str]) -> S:
    values, places = parse(text, name)
    if not isinstance(values, dict):
        raise RecipeError(f"{name}: a recipe is a map that starts with version: {VERSION}; this is {_kind(values)}")
    return _validated(schema, {"name": FilePath(name).stem, **values}, places, settings)


def dump(recipe: BaseModel) -> str:
    """The recipe as YAML text with every value written out; reads back equal."""
    return written(_flow(recipe.model_dump(mode="json")))


def overrides(
    values: dict[str, Any], settings: Sequence[str], places: Places | None = None, schema: type[BaseModel] = Recipe
) -> dict[str, Any]:
    """A copy of a recipe's plain `values` with settings such as "rules[0].steps[1].rank=16" applied.

    A setting changes a key that is there, or one the schema knows. `places` learns who set what. Raises RecipeError.
    """
    values = deepcopy(values)
    places = {} if places is None else places
    for setting in settings:
        path, value = _parsed_setting(setting)
        where = f"--set {setting}"
        inside: Any = values
        for length, part in enumerate(path[:-1], start=1):
            _check_part(values, path[:length], inside, where, schema)
            if isinstance(inside, dict) and inside.get(part) is None:
                inside[part] = {}
            inside = inside[part]
        _check_part(values, path, inside, where, schema)
        inside[path[-1]] = value
        for old in [place for place in places if place[: len(path)] == path]:
            del places[old]
        places[path] = where
    return values


def _validated(schema: type[S], values: dict[str, Any], places: Places, settings: Sequence[str]) -> S:
    places = dict(places)
    if settings:
        values = overrides(values, settings, places, schema)
    version = values.get("version")
    if version is None:
        raise RecipeError(f"{at((), places)}the recipe has no version; write version: {VERSION}")
    if isinstance(version, int) and version > VERSION:
        raise RecipeError(
            f"{at(('version',), places)}version is {version}, and this llmcompress reads up to {VERSION}; upgrade it"
        )
    try:
        recipe = schema.model_validate(values)
    except ValidationError as error:
        raise RecipeError(first_complaint(error, schema, values, places)) from error
    check_booleans(schema, values, places)
    if isinstance(recipe, Recipe):
        recipe._origin = _Origin(places)
    return recipe


_PART = re.compile(r"([A-Za-z_][A-Za-z_0-9]*)((?:\[\d+\])*)")


def _parsed_setting(setting: str) -> tuple[Path, Any]:
    """The path and the value of "rules[0].steps[1].rank=16"."""
    target, equals, text = setting.partition("=")
    path: list[str | int] = []
    for word in target.strip().split("."):
        found = _PART.fullmatch(word)
        if not found or not equals:
            raise RecipeError(f"--set {setting}: this is not of the form key=value, such as rules[0].steps[1].rank=16")
        path += [found[1], *(int(index) for index in re.findall(r"\d+", found[2]))]
    if not text.strip():
        raise RecipeError(f"--set {setting}: there is no value; write null for none")
    return tuple(path), parse(text, f"--set {setting}")[0]


def _check_part(values: dict[str, Any], path: Path, inside: Any, where: str, schema: type[BaseModel]) -> None:
    """Raises RecipeError when the last part of `path` is not in `inside` and cannot be put there."""
    part, outer = path[-1], dotted(path[:-1])
    if isinstance(part, int):
        if not isinstance(inside, list):
            raise RecipeError(f"{where}: {outer} is not a list")
        if part >= len(inside):
            raise RecipeError(f"{where}: {outer} has {len(inside)} entries, counted from 0; there is no [{part}]")
    elif not isinstance(inside, dict):
        raise RecipeError(f"{where}: {outer} has no keys, so there is no {dotted(path)}")
    elif part not in inside and not (len(path) > 1 and is_open(schema, str(path[0]))):
        spot = locate(schema, values, path[:-1])
        if spot.model is None or part not in spot.model.model_fields:
            raise RecipeError(f"{where}: {unknown_key(part, spot)}")


def _flow(values: dict[str, Any]) -> dict[str, Any]:
    if "rules" not in values:
        return values
    rules = [{**rule, "steps": [OneLine(one) for one in rule["steps"]]} for rule in values["rules"]]
    return {**values, "rules": rules}


def _kind(value: Any) -> str:
    return "empty" if value is None else f"a {'list' if isinstance(value, list) else 'single value'}"
