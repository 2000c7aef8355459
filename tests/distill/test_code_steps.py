"""Codes that take steps: those that gain most, one level each, and none besides; as an independent slow form has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmcompress.distill.run import distill
from llmcompress.distill.student.code_steps import DAMPING, changes, curvature
from llmcompress.errors import RecipeError
from llmcompress.recipe.distillation import Distillation
from llmcompress.weight.modules import compressed_linears
from llmcompress.weight.nodes import Grid
from tests.builders import seeded
from tests.distill.miniature import make, recipe, weights_bytes

RULES = [{"match": "*", "steps": [{"method": "rtn", "bits": 2, "group_size": 16, "symmetric": False}]}]
STEPS = {"rates": {"codes": 1e-2, "scales": 5e-3}, "latents": "none", "steps": 6}
ROWS, COLUMNS, LEVELS, TOKENS = 12, 20, 4, 100


def problem(size: float) -> tuple[Tensor, Tensor]:
    """Codes and a gradient, flat; its rows and columns count differently."""
    codes = torch.randint(0, LEVELS, (ROWS, COLUMNS), generator=seeded(0)).float()
    spread = torch.rand(ROWS, 1, generator=seeded(1)) * torch.rand(1, COLUMNS, generator=seeded(2))
    return codes.flatten(), (size * spread * torch.randn(ROWS, COLUMNS, generator=seeded(3))).flatten()


def slowly(codes: Tensor, gradient: Tensor, most: int) -> dict[int, float]:
    """The steps by place, code by code in float64."""
    g = gradient.double().numpy().reshape(ROWS, COLUMNS)
    gains = {}
    for row in range(ROWS):
        for column in range(COLUMNS):
            mean = np.mean(g[row] ** 2) * np.mean(g[:, column] ** 2) / np.mean(g**2)
            gain = abs(g[row, column]) - DAMPING * TOKENS * mean / 2
            step = -float(np.sign(g[row, column]))
            if gain > 0 and 0 <= float(codes[row * COLUMNS + column]) + step < LEVELS:
                gains[row * COLUMNS + column] = gain, step
    best = sorted(gains, key=lambda place: -gains[place][0])[:most]
    return {place: gains[place][1] for place in best}


@pytest.mark.parametrize("size, share", [(1e-6, 0.05), (1e-6, 0.5), (3e-5, 0.5), (1.0, 0.5)])
def test_the_codes_that_gain_most_take_a_step(size: float, share: float) -> None:
    codes, gradient = problem(size)
    places, steps = changes(codes, gradient, LEVELS, ROWS, share, TOKENS)
    found = dict(zip(places.tolist(), steps.tolist(), strict=True))
    assert found == slowly(codes, gradient, int(share * len(codes)))
    if size == 1.0:
        assert not found, "where the curvature is above every gradient, nothing moves"
    if share == 0.05:
        assert len(found) == 12


def test_elements_that_are_no_whole_rows_share_a_curvature() -> None:
    gradient = torch.randn(31, generator=seeded(4))
    assert curvature(gradient, 12, TOKENS).tolist() == pytest.approx([TOKENS * float(gradient.square().mean())] * 31)


# --- in a run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("steps"), RULES)


@pytest.fixture(scope="module")
def whole(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(folders, tmp_path_factory.mktemp("out") / "whole")


def run(folders: Path, output: Path, **more: Any) -> Any:
    return distill(folders / "small", folders / "dense", recipe(folders, **STEPS | more), output)


def rows(output: Path) -> list[dict[str, Any]]:
    """Read the metrics of a run, except times."""
    found = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in {"seconds", "tokens_per_second"}} for row in found]


def grids(folder: Path) -> dict[str, Grid]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = {name: layer.expression() for name, layer in compressed_linears(model).items()}
    return {name: grid for name, grid in found.items() if isinstance(grid, Grid)}


def test_few_codes_of_each_matrix_step_to_a_neighbour(folders: Path, tmp_path: Path) -> None:
    run(folders, tmp_path / "one", steps=1, warmup=0.0)
    before, after = grids(folders / "small"), grids(tmp_path / "one")
    stepped = 0
    for name, grid in before.items():
        distance = (grid.codes.int() - after[name].codes.int()).abs()
        assert int(distance.max()) <= 1 and int(distance.sum()) <= 1e-2 * distance.numel()
        assert int(after[name].codes.max()) < grid.levels
        stepped += int(distance.sum())
    assert stepped == rows(tmp_path / "one")[1]["codes"]["changed"] > 0
    assert weights_bytes(folders / "small") == weights_bytes(tmp_path / "one")


def test_codes_that_step_bring_the_student_nearer(whole: Any, folders: Path, tmp_path: Path) -> None:
    alone = run(folders, tmp_path / "scales", rates={"scales": 5e-3}, latents="codes")
    assert whole.history[-1]["kl"] < alone.history[-1]["kl"] < alone.history[0]["kl"]


def test_a_run_that_was_cut_ends_as_a_whole_one(whole: Any, folders: Path, tmp_path: Path) -> None:
    class Cut(Exception): ...

    def cut(done: int, *_: Any) -> None:
        if done == 3:
            raise Cut

    asked = recipe(folders, **STEPS | {"save_every": 2})
    with pytest.raises(Cut):
        distill(folders / "small", folders / "dense", asked, tmp_path / "cut", progress=cut)
    distill(folders / "small", folders / "dense", asked, tmp_path / "cut")
    ours, theirs = (
        [file.read_bytes() for file in sorted(Path(out).glob("*.safetensors"))]
        for out in (whole.output, tmp_path / "cut")
    )
    assert ours == theirs


@pytest.mark.parametrize(
    "more, sentence",
    [
        ({"rates": {"scales": 1e-3}}, "latents: none is of codes that take steps beside numbers that learn"),
        ({"rates": {"codes": 1e-3}}, "latents: none is of codes that take steps beside numbers that learn"),
        ({"freezing": {}}, "freezing is of latents, and latents: none has none"),
        ({"scales": "median"}, "scales: median is of latents, and latents: none has none"),
        ({"estimator": "reste"}, "estimator: reste is of latents, and latents: none has none"),
        ({"phases": [{"kind": "blockwise"}]}, "latents: none is of phases end to end"),
    ],
)
def test_what_codes_without_latents_cannot_have_is_said(more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Distillation(**STEPS | more)


def test_a_student_without_codes_is_refused(tmp_path: Path) -> None:
    place = make(tmp_path, [{"match": "*", "steps": [{"method": "kmeans", "bits": 2}]}])
    with pytest.raises(RecipeError, match="latents: none: the student has no codes of grids"):
        distill(place / "small", place / "dense", recipe(place, **STEPS), tmp_path / "out")
