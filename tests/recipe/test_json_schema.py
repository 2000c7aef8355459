"""The printed JSON schema, judged by a validator that knows nothing of this package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from llmcompress.cli.app import app
from llmcompress.errors import RecipeError
from llmcompress.losses.loss import feature_losses, losses
from llmcompress.methods.layer import methods
from llmcompress.recipe.read import dump, parse_recipe, read_recipe
from llmcompress.recipe.yaml import parse
from tests.rules.source_tree import ROOT

CONFIGS = ROOT / "configs"
DISTILLATIONS = sorted((CONFIGS / "distillation").glob("*.yaml"))
RECIPES = [path for path in sorted(CONFIGS.glob("*/*.yaml")) if path.parent.name not in ("distillation", "accelerate")]
CODE = {"name": "code", "dataset": "code.jsonl", "held_out": 4}
ALTERNATE = {"method": "alternate", "base": {"method": "gptq"}, "low_rank": {"method": "eora", "rank": 2}}
EVERYTHING: dict[str, Any] = {
    "version": 1,
    "calibration": {"dataset": "text.txt", "held_out": 0.5},
    "target": {"bytes": "40MB"},
    "options": [[{"method": "rtn", "bits": "ternary"}]],
    "rules": [{"match": ["*.mlp.*", "re:.*"], "steps": [ALTERNATE]}, {"match": "*", "steps": []}],
    "reconstruct": {"rates": {"scales": 1e-3}},
    "distill": {
        "data": [CODE],
        "losses": [
            {"of": {"loss": "forward_kl"}, "weight": {"from": 1, "to": 0}},
            {"of": {"loss": "hidden"}, "layers": [1, [1, 2]]},
        ],
        "phases": [{"kind": "blockwise", "rates": {"norms": 1e-3}}, {"kind": "end_to_end"}],
    },
}


def printed(*words: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["recipe", "schema", *words])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    Draft202012Validator.check_schema(found)
    return found


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """That of recipes of compression."""
    return printed()


def complaints(schema: dict[str, Any], values: Any) -> list[str]:
    return [error.message for error in Draft202012Validator(schema).iter_errors(values)]


def test_it_accepts_every_recipe_that_comes_along(schema: dict[str, Any]) -> None:
    of_distill = printed("--distillation")
    for paths, one in ((RECIPES, schema), (DISTILLATIONS, of_distill)):
        assert paths
        for path in paths:
            assert not complaints(one, parse(path.read_text(), path.name)[0]), path


def test_it_accepts_recipes_with_every_value(schema: dict[str, Any]) -> None:
    for path in RECIPES:
        assert not complaints(schema, parse(dump(read_recipe(path)), path.name)[0]), path
    assert read_recipe(EVERYTHING).distill is not None and not complaints(schema, EVERYTHING)


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ((), "ruls", []),
        ((), "version", 2),
        (("calibration",), "sampels", 4),
        (("rules", 0, "steps", 0), "rouns", 2),
        (("rules", 0, "steps", 0, "base"), "bit", 2),
        (("rules", 0, "steps", 0), "method", "gtpq"),
        (("rules", 0, "steps", 0, "base"), "damping", 20),
        (("options", 0, 0), "bits", "trinary"),
        (("reconstruct",), "window", 3),
        (("reconstruct", "rates"), "scale", 1e-3),
        (("distill",), "stepz", 3),
        (("distill", "data", 0), "lenght", 48),
        (("distill", "losses", 0, "of"), "loss", "forward_lk"),
        (("distill", "losses", 0, "of"), "temprature", 2),
        (("distill", "phases", 0), "kind", "both"),
    ],
    ids=str,
)
def test_it_refuses_what_reading_refuses(
    place: tuple[str | int, ...], key: str, value: Any, schema: dict[str, Any]
) -> None:
    values = deepcopy(EVERYTHING)
    inside = values
    for part in place:
        inside = inside[part]
    inside[key] = value
    assert complaints(schema, values)
    with pytest.raises(RecipeError):
        read_recipe(values)


def described(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for owner, one in [("recipe", schema), *schema["$defs"].items()]:
        for key, entry in one.get("properties", {}).items():
            yield f"{owner}.{key}", entry


def test_every_key_is_described(schema: dict[str, Any]) -> None:
    found = dict(described(schema))
    assert len(found) > 200
    assert not [key for key, entry in found.items() if not entry.get("description")]


def test_every_method_and_every_loss_is_there(schema: dict[str, Any]) -> None:
    unions = {name: schema["$defs"][name]["discriminator"]["mapping"] for name in ("StepConfig", "LossConfig")}
    assert unions["StepConfig"].keys() == methods().keys()
    assert unions["LossConfig"].keys() == losses().keys() | feature_losses().keys()


def test_a_recipe_is_shown_with_every_value(tmp_path: Path) -> None:
    words = ["recipe", "show", "gptq-4-g64", "--set", "seed=7", "--set", "reconstruct.steps=3"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    expected = read_recipe("gptq-4-g64", ["seed=7", "reconstruct.steps=3"])
    assert parse_recipe(done.stdout) == expected and expected.reconstruct is not None
    assert (expected.reconstruct.name, expected.reconstruct.seed) == ("gptq-4-g64", 7), "inherited"
    assert json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout) == expected.model_dump(mode="json")
    wrong = CliRunner().invoke(app, ["recipe", "show", "gptq-4-g64", "--set", "sed=7"])
    assert wrong.exit_code == 2 and 'did you mean "seed"?' in wrong.stderr
    shown = CliRunner().invoke(app, ["recipe", "show", "low-rank", "--distillation"])
    assert shown.exit_code == 0 and "factors" in shown.stdout
