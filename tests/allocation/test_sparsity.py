"""State a share of zeros, get a model with so many: judged by the zeros in the finished weights."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.allocation.allocate import Allocation, allocate, damage
from llmcompress.allocation.distortion import NOISE, add_noise, families
from llmcompress.allocation.solve import uniform_plan
from llmcompress.cli.app import app
from llmcompress.compression import run
from llmcompress.compression.job import prepare
from llmcompress.errors import GateError, RecipeError
from llmcompress.methods.layer import relative_error, step
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.model import resolve
from llmcompress.recipe.read import parse_recipe, read_recipe
from llmcompress.weight.expression import dense
from llmcompress.weight.modules import CompressedLinear
from tests.allocation.aimed import make, recipe
from tests.builders import correlated, gaussian, layer, moments
from tests.tiers import tiered

OPTIONS = [[{"method": "wanda", "sparsity": share}] for share in (0.25, 0.5, 0.75)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("zeros"))


def allocated(place: Path, sparsity: float, **more: Any) -> Allocation:
    asked = recipe(place, {"sparsity": sparsity}, **{"options": OPTIONS} | more)
    return allocate(prepare(resolve(str(place / "dense")), read_recipe(asked)))


def zeros(folder: Path) -> tuple[int, int]:
    """Return the zeros in the compressed linears of a checkpoint, and their weights."""
    linears = [one for one in load_model(locate(str(folder))).modules() if isinstance(one, CompressedLinear)]
    weights = [dense(one.expression()) for one in linears]
    return sum(int((one == 0).sum()) for one in weights), sum(one.numel() for one in weights)


@pytest.mark.parametrize(
    "more", [pytest.param({}, id="options", marks=pytest.mark.slow), pytest.param({"options": None}, id="default")]
)
def test_a_model_has_the_share_of_zeros_that_was_asked_for(more: dict[str, Any], place: Path, tmp_path: Path) -> None:
    asked = recipe(place, {"sparsity": 0.6}, **{"options": OPTIONS} | more)
    done = lc.compress(place / "dense", asked, tmp_path / "out")
    found, weights = zeros(done.folder)
    assert 0.6 <= found / weights < 0.6 + 0.2 / 21, "one step of one of 21 matrices at most"
    assert done.allocation is not None
    assert done.allocation["sparsity"] == pytest.approx(found / weights, abs=1e-3), "a few are zero by themselves"
    assert len({row.bpw for row in done.report.layers}) > 1, "not one share for all"


def test_zeros_of_rules_count(place: Path) -> None:
    """A tenth of the weights is quantized without zeros, so the others have more."""
    rules = [{"match": "*.o_proj", "steps": [{"method": "rtn", "bits": 8}]}]
    plan = allocated(place, 0.5, rules=rules)
    kept = plan.choices.nonzero(plan.chosen)
    assert plan.choices.fixed_nonzero == 3 * 64 * 64 == plan.choices.fixed_weights
    assert kept <= plan.choices.weights // 2
    with pytest.raises(RecipeError, match=r"a sparsity of 0\.7 cannot be reached, 0\.6\d* is the most"):
        allocated(place, 0.7, rules=rules)


@pytest.mark.parametrize("by", tiered(["distortion", "noise", "kl"], lambda by: by == "noise"))
def test_chosen_shares_lose_less_than_equal_ones(by: str, place: Path, tmp_path: Path) -> None:
    plan = allocated(place, 0.6, damage=by)
    costs = [one.nonzero for one in plan.choices.matrices]
    uniform = uniform_plan(costs, sum(row[option] for row, option in zip(costs, plan.chosen, strict=True)))
    assert uniform is not None and damage(plan.prices, plan.chosen) < damage(plan.prices, uniform)
    other = dataclasses.replace(plan, chosen=uniform)
    mine, theirs = (
        one.measure_kl(run.compress(one.settled, tmp_path / name).folder)
        for name, one in (("mine", plan), ("theirs", other))
    )
    assert mine < theirs


@pytest.mark.slow
def test_a_model_outside_of_its_gates_is_told_the_share_that_holds(place: Path, tmp_path: Path) -> None:
    options = [[{"method": "wanda", "sparsity": share / 10}] for share in (0, 3, 9)]
    asked = recipe(place, {"sparsity": 0.85}, options=options, gates={"kl": 1e-3, "perplexity_ratio": None})
    with pytest.raises(GateError, match=r"--sparsity (0\.\d+) is predicted to hold") as error:
        lc.compress(place / "dense", asked, tmp_path / "out")
    [share] = re.findall(r"--sparsity (0\.\d+)", str(error.value))
    plan = allocated(place, float(share), options=options)
    assert damage(plan.prices, plan.chosen) <= 1e-3


def test_sparsities_are_a_family_at_the_bits_they_have() -> None:
    asked = [
        {"method": "sparsegpt", "sparsity": share, "bits": bits} for bits in (4, None) for share in (0.5, 0.7, 0.6)
    ]
    assert families([(step(one),) for one in asked]) == [[1, 2, 0], [4, 5, 3]]


def test_noise_is_of_a_size_and_changes_what_a_layer_gives() -> None:
    weight, seen = gaussian(24, 64), correlated(600, 64)
    inputs = moments(seen)
    value, made = add_noise(layer(weight, seen), inputs)
    share = float((value - weight).norm() / weight.norm())
    assert share == pytest.approx(NOISE, rel=0.1)
    assert made == pytest.approx(relative_error(weight, value, inputs))
    assert torch.equal(value, add_noise(layer(weight, seen), inputs)[0]), "of a layer and its seed"


@pytest.mark.slow
def test_a_plan_and_the_command_line_know_it(place: Path) -> None:
    text = f"calibration={{dataset: {place / 'text.txt'}, samples: 16, length: 48}}"
    words = ["plan", str(place / "dense"), "--sparsity", "0.6", "--set", text]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "target  0.6 of the weights zero" in done.stdout
    assert json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["target"] == {"sparsity": 0.6}


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("target: {sparsity: 0.5, bpw: 2}", "target: give exactly one of bpw, bytes, kl and sparsity"),
        ("target: {sparsity: 60}", "target: sparsity is 60; it must be a number more than 0 and less than 1"),
        ("target: {sparsity: 0.5, engine: vllm}", "engine restricts the forms of a size; leave it out beside sparsity"),
    ],
)
def test_what_is_wrong_is_one_sentence(line: str, complaint: str) -> None:
    with pytest.raises(RecipeError) as raised:
        parse_recipe(f"version: 1\ncalibration: {{samples: 4, length: 32}}\n{line}")
    assert complaint in str(raised.value) and "\n" not in str(raised.value)
