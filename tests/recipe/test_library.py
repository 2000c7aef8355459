"""Recipes by name: where they are found, what wins, what is refused, and what the list says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import measured
import pytest
from records import read_records
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.allocation.choices import _default_options
from llmcompress.cli.app import app
from llmcompress.errors import RecipeError
from llmcompress.methods.trellises.trellis import TrellisConfig
from llmcompress.recipe import library as room
from llmcompress.recipe.distillation import Distillation
from llmcompress.recipe.library import find_recipe, library
from llmcompress.recipe.read import read_as, read_recipe
from tests.rules.source_tree import ROOT
from tests.tiny import save_tiny

CONFIGS = ROOT / "configs"


def test_every_recipe_of_every_group_is_found_by_its_name() -> None:
    files = {path for group in room.GROUPS for path in (CONFIGS / group).glob("*.yaml")}
    assert {one.path for one in library()} == files and len(files) > 70
    for one in library():
        assert find_recipe(one.name, distillation=one.group == "distillation") == one.path
        assert one.purpose.endswith((".", ".)")) and 10 < len(one.purpose) <= 125, f"{one.path}: {one.purpose}"


def test_recommended_trellises_and_those_of_targets_have_the_fast_code() -> None:
    recipes = [read_recipe(each.name) for each in library() if each.group == "recommended"]
    lists = [*_default_options(), *(rule.steps for recipe in recipes for rule in recipe.rules)]
    lists += [steps for recipe in recipes for steps in (recipe.embeddings, recipe.head or (), recipe.table or ())]
    codes = [config.code for steps in lists for config in steps if isinstance(config, TrellisConfig)]
    assert len(codes) > 10 and set(codes) == {"linear"}


def test_a_name_reads_as_its_file_does() -> None:
    assert read_recipe("gptq-4-g64") == read_recipe(CONFIGS / "recommended" / "gptq-4-g64.yaml")
    changed = read_recipe("gptq-4-g64", ["rules[0].steps[0].bits=3"])
    assert changed.rules[0].steps[0].model_dump()["bits"] == 3
    assert read_as(Distillation, "low-rank") == read_as(Distillation, CONFIGS / "distillation" / "low-rank.yaml")


def test_a_file_wins_over_a_name_and_a_folder_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("default").mkdir()
    assert find_recipe("default") == CONFIGS / "recommended" / "default.yaml"
    Path("gptq-4-g64").write_text("version: 1\nname: mine\nrules: [{match: '*', steps: []}]\n")
    assert read_recipe("gptq-4-g64").name == "mine"


@pytest.mark.parametrize(
    ("given", "distillation", "sentence"),
    [
        ("gptq-4-g46", False, 'no file and no recipe "gptq-4-g46"; did you mean "gptq-4-g64"?'),
        ("low-rnk", True, 'did you mean "low-rank"?'),
        ("zzzzzz", False, "`llmcompress recipes` lists all names"),
        ("low-rank", False, "low-rank is a recipe of distillation, and a recipe of compression is required"),
        ("default", True, "default is a recipe of compression, and a recipe of distillation is required"),
        ("configs/smollm2-135m/default.yaml", False, "the recipe default is configs/recommended/default.yaml"),
        ("configs/smollm2-135m/wanda-2-4.yaml", False, "the recipe wanda-2-4 is configs/methods/wanda-2-4.yaml"),
    ],
)
def test_what_is_no_recipe_is_refused_with_the_way_out(
    given: str, distillation: bool, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        find_recipe(given, distillation)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_hint_is_of_the_kind_that_is_wanted() -> None:
    with pytest.raises(RecipeError) as caught:
        find_recipe("defaut", distillation=True)
    assert "did you mean" not in str(caught.value)


def test_a_missing_file_is_still_called_a_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path / "nothing.yaml")


def test_python_and_the_commands_take_names(tmp_path: Path) -> None:
    """Of `lc.plan` and `plan`, which read headers only."""
    source = save_tiny("llama", tmp_path / "dense", hidden_size=64, intermediate_size=128)
    expected = lc.plan(source, CONFIGS / "recommended" / "gptq-4-g64.yaml")
    assert lc.plan(source, "gptq-4-g64").layers == expected.layers
    done = CliRunner().invoke(app, ["plan", str(source), "gptq-4-g64", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["recipe"] == "gptq-4-g64"
    done = CliRunner().invoke(app, ["plan", str(source), "gptq-4-g46"])
    assert done.exit_code == 2 and "gptq-4-g64" in done.stderr


def test_the_list_says_what_was_measured_and_what_was_not() -> None:
    found = json.loads(CliRunner().invoke(app, ["recipes", "--json"]).stdout)
    rows = {row["name"]: row for row in found["recipes"]}
    assert found["groups"] == room.GROUPS
    assert rows["gptq-3-g64"]["measured"]["bpw"] == pytest.approx(3.297, abs=0.001)
    assert rows["low-rank"]["measured"] is None
    printed = CliRunner().invoke(app, ["recipes"]).stdout
    for name, row in rows.items():
        [line] = [line.split() for line in printed.splitlines() if line.split()[:1] == [name]]
        if row["measured"] is not None:
            assert line[1] == f"{row['measured']['bpw']:.3f}"
            assert math.isclose(float(line[3]), row["measured"]["perplexity"], rel_tol=0.03)
        elif row["group"] != "distillation":
            assert line[1:4] == ["-", "-", "-"]


def test_measured_numbers_are_those_of_the_records() -> None:
    found = measured.content(read_records(measured.RECORDS))
    assert room.MEASURED.read_text(encoding="utf-8") == found, "run research/measured.py"


def test_only_what_was_measured_alike_counts_and_the_later_run() -> None:
    numbers = {"bpw": 2.0, "megabytes": 1.0, "perplexity": 30.0}
    first = measured.ALIKE | {"recipe": "mine", "numbers": numbers}
    later = first | {"numbers": {"bpw": 3.0, "bytes": 2_000_000, "perplexity": 20.123}}
    other = first | {"windows": 32, "numbers": numbers | {"perplexity": 5.0}}
    found = json.loads(measured.content([first, later, other]))
    assert found == {"mine": {"bpw": 3.0, "megabytes": 2.0, "perplexity": 20.12}}


def test_an_installed_package_reads_the_folder_it_carries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PACKAGE", tmp_path / "llmcompress")
    assert room.library_folder() == tmp_path / "configs"
    (tmp_path / "llmcompress" / "configs").mkdir(parents=True)
    assert room.library_folder() == tmp_path / "llmcompress" / "configs"
