"""Shares of the gradient: what each loss alone would have, and weights that keep to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmcompress.distillation.run import distill
from llmcompress.distillation.step import balance_factors
from llmcompress.errors import RecipeError
from tests.distillation.miniature import cut_short, make, recipe

RULES = [{"match": "*", "steps": [{"method": "rtn", "bits": 2, "group_size": 16}]}]
KL = {"of": {"loss": "forward_kl"}}
MSE = {"of": {"loss": "logit_mse"}}
HIDDEN = {"of": {"loss": "hidden"}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("balance"), RULES)


def settings(folders: Path, *losses: dict[str, Any], **more: Any) -> dict[str, Any]:
    return recipe(folders, losses=list(losses), **({"micro_batch": 4, "steps": 2} | more))


def steps_of(folders: Path, output: Path, *losses: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    """The metrics of every optimizer step of a run."""
    distill(folders / "small", folders / "dense", settings(folders, *losses, **more), output)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@pytest.mark.slow
def test_gradient_shares_equal_those_of_single_loss_runs(folders: Path, tmp_path: Path) -> None:
    """And balanced weights are those that make the norms equal, whatever the micro-batches are."""
    alone = [steps_of(folders, tmp_path / name, loss)[0] for name, loss in (("kl", KL), ("mse", MSE))]
    norms = [row["gradient_norm"] for row in alone]
    for size in (4, 2):
        more = {"balance": True, "evaluate_every": 2, "micro_batch": size}
        both = steps_of(folders, tmp_path / f"both-{size}", KL, MSE | {"weight": 3.0}, **more)
        share = 3 * norms[1] / (norms[0] + 3 * norms[1])
        assert both[0]["gradient_shares"] == pytest.approx({"forward_kl": 1 - share, "logit_mse": share}, rel=1e-4)
        assert "gradient_shares" not in both[1]
        terms = both[0]["terms"]
        factor = (both[0]["loss"] - terms["forward_kl"]) / (3 * terms["logit_mse"])
        assert factor == pytest.approx(norms[0] / norms[1], rel=1e-4)


@pytest.mark.slow
def test_losses_on_hidden_states_are_balanced_too(folders: Path, tmp_path: Path) -> None:
    rows = steps_of(folders, tmp_path / "out", KL, HIDDEN, balance=True, evaluate_every=1)
    assert all(0 < row["gradient_shares"]["hidden"] < 1 for row in rows)
    plain = steps_of(folders, tmp_path / "plain", KL, HIDDEN, evaluate_every=1)
    assert all("gradient_shares" not in row for row in plain)
    assert plain[0]["terms"] == pytest.approx(rows[0]["terms"]) and plain[0]["loss"] != rows[0]["loss"]


def test_a_loss_without_a_gradient_keeps_its_weight() -> None:
    assert balance_factors([2.0, 0.5, 0.0]) == [1.0, 4.0, 1.0]
    assert balance_factors([0.0, 0.5]) == [1.0, 1.0]
    assert balance_factors([1.0, 1e-30])[1] == 1e6


@pytest.mark.slow
def test_a_run_interrupted_between_looks_resumes_exactly(folders: Path, tmp_path: Path) -> None:
    asked = settings(folders, KL, HIDDEN, balance=True, steps=4, evaluate_every=3, save_every=1)
    whole = distill(folders / "small", folders / "dense", asked, tmp_path / "whole")
    cut_short(folders, asked, tmp_path / "cut", 2)
    again = distill(folders / "small", folders / "dense", asked, tmp_path / "cut")
    assert [row["kl"] for row in again.history] == [row["kl"] for row in whole.history]
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_balance_of_a_single_loss_is_refused(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="balance needs several losses, and there is one"):
        steps_of(folders, tmp_path / "out", KL, balance=True)
