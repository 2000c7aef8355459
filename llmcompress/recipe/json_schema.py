"""The JSON schema of recipes, for editors and validators outside this package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from llmcompress.losses.features import feature_losses
from llmcompress.losses.loss import LossConfig, losses
from llmcompress.methods.layer import StepConfig, methods

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema(schema: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of recipes that `schema` reads: `Recipe` or `Distillation`.

    Steps and losses are unions that `method` and `loss` tell apart. What a schema says by code, such as values that
    exclude each other, is not part of it: a recipe that it accepts may still be refused.
    """
    found = schema.model_json_schema()
    definitions = found["$defs"]
    if StepConfig.__name__ in definitions:
        configs = {name: one.config for name, one in methods().items()}
        definitions |= _union(StepConfig, "method", configs)
    if LossConfig.__name__ in definitions:
        registered = losses() | feature_losses()
        definitions |= _union(LossConfig, "loss", {name: one.config for name, one in registered.items()})
    return {"$schema": DIALECT, **found, "required": sorted({"version", *found.get("required", ())})}


def _union(base: type[BaseModel], key: str, configs: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """The definition of `base` as one of `configs`, by the name under `key`, and the definitions of these."""
    definitions: dict[str, Any] = {}
    mapping: dict[str, str] = {}
    for name, config in sorted(configs.items()):
        values = config.model_json_schema()
        definitions |= {inner: one for inner, one in values.pop("$defs", {}).items() if inner != base.__name__}
        values["properties"][key] = {"const": name, "description": f"the name of the {key}"}
        values["required"] = sorted({key, *values.get("required", ())})
        definitions[config.__name__] = values
        mapping[name] = f"#/$defs/{config.__name__}"
    alternatives = [{"$ref": place} for place in mapping.values()]
    union = {"oneOf": alternatives, "discriminator": {"propertyName": key, "mapping": mapping}}
    return definitions | {base.__name__: union}
