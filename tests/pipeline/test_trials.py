"""`--quick`: the whole way on the least text, marked wherever its result is shown, and never published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from _pytest.mark import ParameterSet
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.cli.app import app
from llmcompress.distillation.parallel.launch import _check_shares
from llmcompress.errors import GateError, RecipeError
from llmcompress.recipe.calibration import TRIAL, Calibration, shorten_text
from llmcompress.recipe.distillation import Distillation
from llmcompress.recipe.library import library
from llmcompress.recipe.read import Change, read_as, read_recipe
from llmcompress.recipe.trial import FEWEST
from llmcompress.reporting import report as reports
from tests.tiers import tiered
from tests.tiny import save_tiny

SHORT = Change("trial", True, "--quick")


GROUPS = {each.name: each.group for each in library()}


def of_groups(*groups: str) -> list[ParameterSet]:
    """The names of recipes; those that are not recommended are read by slow tests."""
    names = [name for name, group in GROUPS.items() if group in groups]
    return tiered(names, lambda name: GROUPS[name] in ("recommended", "distillation"))


@pytest.mark.parametrize("name", of_groups("recommended", "engines", "methods", "ablations"))
def test_every_recipe_reads_no_more_than_a_trial(name: str) -> None:
    recipe, whole = read_recipe(name, (), [SHORT]), read_recipe(name)
    assert recipe.trial and whole.trial is False
    if recipe.calibration is not None:
        assert recipe.calibration.samples <= TRIAL["samples"] and recipe.calibration.length <= TRIAL["length"]
    if recipe.reconstruct is not None and whole.reconstruct is not None:
        assert recipe.reconstruct.steps == FEWEST["steps"]
        assert recipe.reconstruct.model_copy(update={"steps": whole.reconstruct.steps}) == whole.reconstruct
    shortened = dict.fromkeys(("calibration", "reconstruct", "distill"))
    assert recipe.model_copy(update={"trial": False, **shortened}) == whole.model_copy(update=shortened)


def test_a_trial_trains_blocks_no_longer_than_asked() -> None:
    recipe = {"version": 1, "calibration": {}, "rules": [{"match": "*", "steps": [{"method": "rtn"}]}]}
    for asked, steps in (({}, 2), ({"steps": None}, 2), ({"steps": 200}, 2), ({"steps": 1}, 1)):
        blocks = read_recipe(recipe | {"reconstruct": asked}, (), [SHORT]).reconstruct
        assert blocks is not None and blocks.steps == steps
    tuned = read_recipe(recipe, (), [Change("reconstruct", {}, "--tune", keep=True), SHORT]).reconstruct
    assert tuned is not None and tuned.steps == 2
    with pytest.raises(RecipeError, match="reconstruct.steps"):
        read_recipe(recipe | {"reconstruct": {"steps": "many"}}, (), [SHORT])


@pytest.mark.parametrize("name", of_groups("distillation"))
def test_every_distillation_takes_the_fewest_steps(name: str) -> None:
    wanted = read_as(Distillation, name, (), [SHORT])
    assert all(stage.steps == FEWEST["steps"] for _, stage in wanted.stages())
    assert all(text.samples <= TRIAL["samples"] and text.held_out == 1 for text in wanted.texts())


@pytest.mark.parametrize(
    "asked",
    [{"on_policy": {"share": 0.2}}, {"nested": [64, 32, 16, 8, 0]}, {"phases": None}],
    ids=lambda asked: next(iter(asked)),
)
def test_a_recipe_that_shares_out_its_batch_has_a_trial(asked: dict[str, Any]) -> None:
    recipe = {
        "version": 1,
        "data": {"dataset": "stdlib"},
        "rates": {"scales": 1e-3},
        "losses": [{"of": {"loss": "reverse_kl"}}],
    }
    assert isinstance(read_as(Distillation, recipe | asked, (), [SHORT]), Distillation)


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("changes", [{}, {"micro_batch": 1}, {"phases": [{"kind": "end_to_end", "micro_batch": 1}]}])
def test_processes_can_share_a_trial(processes: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    recipe = {"version": 1, "data": {"dataset": "stdlib", "samples": 900}, "batch": 64} | changes
    _check_shares(read_as(Distillation, recipe, (), [SHORT]), processes)


def test_a_trial_keeps_a_smaller_micro_batch_and_leaves_something_to_write() -> None:
    phases = [{"kind": "end_to_end"}, {"kind": "end_to_end", "batch": 8, "micro_batch": 8}]
    recipe = {"version": 1, "micro_batch": 1, "phases": phases, "on_policy": {"prompt": 300}}
    wanted = read_as(Distillation, recipe, (), [SHORT])
    assert [stage.micro_batch for _, stage in wanted.stages()] == [1, 2]
    assert wanted.on_policy is not None and wanted.on_policy.prompt == 128 == wanted.texts()[0].length // 2


@pytest.mark.parametrize(
    ("given", "samples", "length"),
    [({}, 5, 256), ({"samples": 3, "length": 64}, 3, 64), ({"samples": 900, "length": 4096, "dataset": "x"}, 5, 256)],
)
def test_a_text_is_never_made_longer(given: dict[str, Any], samples: int, length: int) -> None:
    for text in (shorten_text(given), shorten_text(Calibration(**given | {"dataset": "stdlib"})).model_dump()):
        assert (text["samples"], text["length"], text["held_out"]) == (samples, length, 1)
    assert shorten_text({"samples": "many"})["samples"] == "many", "validation says what is wrong with it"


@pytest.mark.slow
def test_a_trial_is_marked_and_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny("llama", tmp_path / "dense", hidden_size=64, intermediate_size=128, max_position_embeddings=256)
    done = CliRunner().invoke(app, ["compress", "dense", "gptq-4-g64", "--quick", "-o", "small"])
    assert done.exit_code == 0 and "shows that all works and nothing of the quality" in done.stderr
    lc.compress("dense", "data-free", "whole")
    words = ["distill", "whole", "scales-norms", "--teacher", "dense", "--quick", "-o", "whole-2"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "nothing of the quality" in done.stderr, done.output
    for folder in ("small", "whole-2"):
        assert reports.read(folder).trial and reports.TRIAL in reports.read(folder).warnings
        with pytest.raises(GateError, match="is not pushed: a trial"):
            lc.push(folder, "me/small", dry_run=True)
    assert not reports.read("whole").trial
