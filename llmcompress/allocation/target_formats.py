"""Options that an engine multiplies, for a target with `engine:`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmcompress.allocation.distortion import Steps
from llmcompress.compression.job import Job
from llmcompress.errors import RecipeError
from llmcompress.methods.layer import sketch, step
from llmcompress.models.dense.families import Linear
from llmcompress.weight.runtime_formats import OBSTACLES, WITH_TABLES

POLISH: dict[str, Any] = {"method": "refine", "passes": 1}
FOUR_BITS: tuple[dict[str, Any], ...] = (
    {"bits": 4, "group_size": 128, "narrow_range": True},
    {"bits": 4, "group_size": 32, "narrow_range": True},
    {"format": "nvfp4"},
    {"format": "mxfp4"},
)
EIGHT_BITS: tuple[dict[str, Any], ...] = ({"bits": 8, "narrow_range": True}, {"format": "fp8"})


def options_for(engine: str, linear: Linear, given: Sequence[Steps] | None) -> tuple[Steps, ...]:
    """Return the options of a linear: all that are `given`, or the default ones that the engine multiplies.

    Raises RecipeError for a given option that the engine does not multiply, and for a linear without options.
    """
    if given is not None:
        for steps in given:
            if (why := _obstacle(engine, linear, steps)) is not None:
                raise RecipeError(
                    f"options: {engine} does not multiply {_spell(steps)} of {linear.name} ({why}); drop this "
                    f"option, or give the layer a rule of its own"
                )
        return tuple(given)
    options = tuple(steps for steps in default_options() if _obstacle(engine, linear, steps) is None)
    if not options:
        why = _obstacle(engine, linear, default_options()[-1])
        raise RecipeError(f"target: {engine} multiplies no form of {linear.name} ({why}); drop engine")
    return options


def default_options() -> tuple[Steps, ...]:
    """Return grids and floats with error feedback; those of four bits with one pass of `refine`."""
    four = tuple((step({"method": "gptq", **form}), step(POLISH)) for form in FOUR_BITS)
    return (*four, *((step({"method": "gptq", **form}),) for form in EIGHT_BITS))


def check_rules(job: Job, engine: str) -> None:
    """Raise RecipeError for steps of a recipe whose outcome the engine does not multiply, or look up."""
    linears = job.arch.linears()
    for name, steps in job.steps.items():
        if (why := _obstacle(engine, linears[name], steps)) is not None:
            raise RecipeError(
                f"rules: {engine} does not multiply {_spell(steps)} of {name} ({why}); change the rule, or leave the "
                f"layer as it is by steps: []"
            )
    for name, steps in job.tables.items():
        if engine not in WITH_TABLES:
            raise RecipeError(f"{engine} has no compressed {name}; leave it as it is by embeddings: [] and head: []")
        rows, width = job.source.tensors[f"{name}.weight"].shape
        if (why := OBSTACLES[engine](sketch(name, (rows, width), steps))) is not None:
            raise RecipeError(f"{engine} does not read {_spell(steps)} of {name} ({why}); give it other steps")


def _obstacle(engine: str, linear: Linear, steps: Steps) -> str | None:
    if linear.transposed:
        return "it is no plain linear layer"
    return OBSTACLES[engine](sketch(linear.name, linear.shape, steps))


def _spell(steps: Steps) -> str:
    """Return steps as a recipe spells them, without defaults."""
    each = (config.model_dump(mode="json", exclude_defaults=True) for config in steps)
    plain = zip(steps, each, strict=True)
    return " > ".join(", ".join([config.method, *(f"{k}: {v}" for k, v in own.items())]) for config, own in plain)
