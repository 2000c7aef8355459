"""Every recipe is valid, and every method has a recipe that people run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmcompress.methods.layer import methods
from llmcompress.recipe.distillation import Distillation
from llmcompress.recipe.read import read_as, read_recipe
from tests.rules.source_tree import ROOT

DISTILLATIONS = sorted((ROOT / "configs" / "distillation").glob("*.yaml"))
LAUNCHES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))  # Accelerate's, not recipes
RECIPES = [path for path in sorted((ROOT / "configs").glob("*/*.yaml")) if path not in DISTILLATIONS + LAUNCHES]


def _methods_in(value: Any) -> Iterator[str]:
    """The methods of a recipe's plain values, those inside other steps too."""
    if isinstance(value, dict):
        if isinstance(value.get("method"), str):
            yield value["method"]
        value = list(value.values())
    for entry in value if isinstance(value, list) else ():
        yield from _methods_in(entry)


def test_names_are_unique_over_all_groups() -> None:
    names = [path.stem for path in RECIPES + DISTILLATIONS]
    assert len(set(names)) == len(names), sorted(name for name in set(names) if names.count(name) > 1)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_is_valid(path: Path) -> None:
    assert read_recipe(path).name == path.stem, "a recipe is called what its file is called"


@pytest.mark.parametrize("path", DISTILLATIONS, ids=lambda path: path.stem)
def test_distillation_is_valid(path: Path) -> None:
    assert read_as(Distillation, path).name == path.stem, "a recipe is called what its file is called"


def test_every_method_has_a_recipe() -> None:
    paths = [path for path in RECIPES if path.parent.name in ("recommended", "methods")]
    used = {name for path in paths for name in _methods_in(read_recipe(path).model_dump(mode="json"))}
    absent = sorted(methods().keys() - used)
    assert not absent, f"no recipe in configs/recommended/ or configs/methods/ uses {absent}"
