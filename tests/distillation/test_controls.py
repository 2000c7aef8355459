"""Controls beside a distillation: the same student on the same tokens, without a teacher and by forward KL alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmcompress.cli.distill import distilled_view
from llmcompress.distillation import run
from llmcompress.distillation.run import distill
from llmcompress.errors import NumericsError, RecipeError
from llmcompress.formats.model_card import DistillationRecord, _distillation
from llmcompress.recipe.distillation import CONTROLS, Distillation
from llmcompress.recipe.read import read_as
from tests.distillation.miniature import cut_short, make, recipe
from tests.tiers import tiered_nightly

RULES = [{"match": "*", "steps": [{"method": "rtn", "bits": 2, "group_size": 16}]}]
BOTH = ["no_teacher", "vanilla"]
REVERSE = [{"of": {"loss": "reverse_kl"}}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("controls"), RULES)


def settings(folders: Path, **more: Any) -> dict[str, Any]:
    return recipe(folders, **({"steps": 3, "losses": REVERSE, "controls": BOTH} | more))


@pytest.mark.slow
def test_controls_are_runs_of_their_own_and_change_nothing(folders: Path, tmp_path: Path) -> None:
    """Each ends where a distillation by its loss ends, and the distillation itself where it ends without them."""
    done = distill(folders / "small", folders / "dense", settings(folders), tmp_path / "out")
    assert list(done.controls) == BOTH
    losses = {"no_teacher": "cross_entropy", "vanilla": "forward_kl"}
    for name, loss in losses.items():
        asked = settings(folders, losses=[{"of": {"loss": loss}}], controls=[])
        alone = distill(folders / "small", folders / "dense", asked, tmp_path / name)
        assert done.controls[name]["kl"] == alone.history[-1]["kl"]
        assert done.controls[name]["tokens"] == alone.tokens == done.tokens
    plain = distill(folders / "small", folders / "dense", settings(folders, controls=[]), tmp_path / "plain")
    assert plain.history[-1]["kl"] == done.history[-1]["kl"] and not plain.controls
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "plain")]
    assert weights[0] == weights[1]
    assert len({done.history[-1]["kl"], *(one["kl"] for one in done.controls.values())}) == 3
    written = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert written["controls"] == done.controls
    card = "\n".join(_distillation(DistillationRecord(written, "version: 1")))
    assert "| on held-out text | before | after | without a teacher | by forward KL alone | teacher |" in card
    first, last, *beside = done.history[0], done.history[-1], *done.controls.values()
    kls = " | ".join(f"{one['kl']:.4f}" for one in (first, last, *beside))
    assert f"| KL to the teacher, nats/token | {kls} | 0 |" in card
    shown = [line for line in distilled_view(written, False) if isinstance(line, str)]
    assert any(line.startswith("control no teacher · KL") for line in shown)


# within the distillation itself, and within either control
@pytest.mark.parametrize("calls", tiered_nightly([2, 5, 8], lambda calls: calls == 5))
def test_a_run_interrupted_anywhere_resumes_exactly(calls: int, folders: Path, tmp_path: Path) -> None:
    asked = settings(folders, save_every=1)
    whole = distill(folders / "small", folders / "dense", asked, tmp_path / "whole")
    cut_short(folders, asked, tmp_path / "cut", calls)
    reports: list[Any] = []
    rest = distill(
        folders / "small", folders / "dense", asked, tmp_path / "cut", progress=lambda *said: reports.append(said)
    )
    assert len(reports) == 3 * 3 - calls
    for name in BOTH:
        assert rest.controls[name]["kl"] == whole.controls[name]["kl"]
    assert not (tmp_path / "cut.training").exists()


def test_a_finished_training_can_be_had_without_its_controls(folders: Path, tmp_path: Path) -> None:
    """A run goes on whatever it saves, tracks and compares itself with."""
    cut_short(folders, settings(folders, save_every=1), tmp_path / "out", 5)
    asked = settings(folders, controls=[], save_every=2, save_minutes=1)
    reports: list[Any] = []
    done = distill(
        folders / "small", folders / "dense", asked, tmp_path / "out", progress=lambda *said: reports.append(said)
    )
    assert not reports and done.steps == 3 and not done.controls
    assert not (tmp_path / "out.training").exists()


@pytest.mark.slow
def test_a_diverging_control_is_reported_and_the_result_stays(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_phases = run.run_phases

    def diverging(context: Any, progress: Any) -> Any:
        if context.recipe.losses[0].of.loss == "cross_entropy":
            raise NumericsError("step 2: the loss is nan")
        return run_phases(context, progress)

    monkeypatch.setattr(run, "run_phases", diverging)
    done = distill(folders / "small", folders / "dense", settings(folders), tmp_path / "out")
    assert done.controls["no_teacher"] == {"failed": "step 2: the loss is nan"}
    assert done.controls["vanilla"]["kl"] > 0
    card = "\n".join(_distillation(DistillationRecord(done.to_json(), "version: 1")))
    assert "The control without a teacher failed: step 2: the loss is nan." in card
    assert "| before | after | by forward KL alone | teacher |" in card
    assert "control no teacher · step 2: the loss is nan" in distilled_view(done.to_json(), False)


@pytest.mark.slow
def test_controls_share_a_cached_teacher(folders: Path, tmp_path: Path) -> None:
    cached = {"kind": "cached", "k": 16}
    asked = settings(folders, losses=[{"of": {"loss": "forward_kl"}}], controls=["no_teacher"], teacher=cached)
    done = distill(folders / "small", folders / "dense", asked, tmp_path / "out")
    assert done.controls["no_teacher"]["kl"] != done.history[-1]["kl"]
    assert not (tmp_path / "out.teacher").exists()


def test_losses_without_a_teacher_go_beside_one_whose_token_table_is_compressed(folders: Path, tmp_path: Path) -> None:
    asked = recipe(folders, steps=1, losses=[{"of": {"loss": "cross_entropy"}}])
    assert distill(folders / "small", folders / "small", asked, tmp_path / "out").steps == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"controls": ["vanilla"], "losses": [{"of": {"loss": "forward_kl"}}]}, "has the same losses as the recipe"),
        ({"controls": ["no_teacher", "no_teacher"]}, "runs once"),
        ({"phases": [{"kind": "blockwise"}], "losses": CONTROLS["vanilla"]}, "controls: blockwise phases read no pred"),
        ({"mixture": {"reweight": "ddk"}, "data": [{"name": "a"}, {"name": "b"}]}, "those of ddk follow its student"),
    ],
)
def test_controls_that_would_tell_nothing_are_refused(more: dict[str, Any], said: str, folders: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        read_as(Distillation, settings(folders, **more))
