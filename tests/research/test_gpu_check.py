"""The check of a GPU, on the CPU: its stages run, and its file says what came of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.gpu import loan
from scripts.gpu.compression import figure
from scripts.gpu.given import Given
from scripts.gpu.stages import MOST, STAGES, Stage
from scripts.gpu_check import DONE, FAILED, OUT_OF_TIME, device_facts, ended, main, records
from tests.rules.source_tree import ROOT
from tests.rules.test_results import KEYS

PARTS = ("floors", "search", "compression", "products", "generation", "around", "tiles", "to_a_size")


def given_for(folder: Path, stage: str = "search", seconds: float = 60.0, **more: Any) -> Given:
    return Given(stage, "cpu", more.pop("small", True), folder, seconds, **more)


@pytest.fixture(autouse=True)
def paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """As scripts/gpu_check sets them."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "research")]))


def test_all_stages_fit_into_their_time() -> None:
    assert sum(stage.seconds for stage in STAGES) <= MOST == 25 * 60


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_is_a_function(stage: Stage) -> None:
    module, _, function = stage.place.partition(":")
    assert callable(getattr(import_module(f"scripts.gpu.{module}"), function))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nothing_is_written_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--json", str(tmp_path / "found.jsonl")])
    assert main() == 2
    assert "Nothing was checked: device cuda is not there" in capsys.readouterr().err
    assert not (tmp_path / "found.jsonl").exists()


def test_givens_survive_the_way_to_a_process(tmp_path: Path) -> None:
    given = given_for(tmp_path, data=tmp_path / "data", forms="grid")
    again = Given.of_json(given.to_json())
    assert again.to_json() == given.to_json() and again.data == given.data and again.left <= 60.0


@pytest.mark.slow
def test_a_stage_that_fails_is_a_sentence(tmp_path: Path) -> None:
    """One that is not there fails as any other does: by the last line that its process writes."""
    stage, given = Stage("nothing", "", 60, ""), given_for(tmp_path, "nothing")
    outcome, said, seconds = ended(stage, given)
    assert (outcome, said) == (FAILED, "KeyError: 'nothing'")
    given.found("half of it", {"half": 1})
    half, end = records(stage, given, outcome, said, seconds)
    assert half["numbers"] == {"half": 1} and half["arm"] == "half of it"
    assert (end["outcome"], end["said"], end["arm"]) == (outcome, said, "nothing")


def test_a_stage_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    outcome, said, _ = ended(STAGES[0], given_for(tmp_path, seconds=0.1))
    assert outcome == OUT_OF_TIME and "stopped after" in str(said)
    outcome, said, _ = ended(STAGES[0], given_for(tmp_path, seconds=-1.0))
    assert outcome == OUT_OF_TIME and "all of the time" in str(said)


def test_progress_ends_a_stage_and_keeps_how_far_it_came(tmp_path: Path) -> None:
    given = given_for(tmp_path, seconds=0.0)
    with pytest.raises(Exception, match="arm, 3 of 30 blocks done, had 0 seconds"):
        given.watching("arm")(3, 30, 1.0)
    [line] = given.findings.read_text().splitlines()
    assert json.loads(line)["numbers"].items() >= {"blocks": 3, "of": 30}.items()


@pytest.mark.parametrize(
    "recipe, windows, with_data, name, arm, kl",
    [
        ("default", 16, False, "default", None, None),  # its record read documentation alone
        ("rotate-gptq-2-refine", 8, False, "rotate-gptq-2-refine", None, 0.6381),
        ("trellis-2", 8, False, "trellis-2", None, None),  # nobody scored it on documentation
        ("budget-2", 32, True, "budget-2", "2.050", 0.511),
    ],
)
def test_the_figure_of_the_cpu_has_the_same_texts(
    tmp_path: Path, recipe: str, windows: int, with_data: bool, name: str, arm: str | None, kl: float | None
) -> None:
    given = given_for(tmp_path, small=False, data=tmp_path if with_data else None)
    found = figure(given, given.recipe(recipe), windows, name, arm)
    assert (found or {"numbers": {"kl": None}})["numbers"]["kl"] == kl
    other = given.recipe(recipe, "calibration={dataset: other.txt}")
    assert figure(given, other, windows, name, arm) is None


@pytest.mark.nightly
def test_every_stage_runs_on_the_cpu(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs triton, whose interpreter stands for a GPU's kernels")
    found = tmp_path / "found.jsonl"
    command = [sys.executable, str(ROOT / "scripts/gpu_check.py"), "--device", "cpu", "--small", "--json", str(found)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    rows = [json.loads(line) for line in found.read_text().splitlines()]
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert [row["stage"] for row in rows if row.get("outcome") == DONE] == [stage.name for stage in STAGES]
    for row in rows:
        assert row.keys() >= KEYS and row["machine"].items() >= device_facts(torch.device("cpu")).items()
    by_stage = {stage.name: [row["numbers"] for row in rows if row["stage"] == stage.name][:-1] for stage in STAGES}
    assert all(by_stage.values()), "a stage found nothing"
    assert by_stage["search"][0]["value"] is True
    assert all(numbers["kl"] >= 0 and numbers["seconds"] > 0 for numbers in by_stage["recipe"] + by_stage["bpw"])
    assert all(numbers["peak_memory_bytes"] > 0 for numbers in by_stage["billion"] + by_stage["memory"])
    assert {"of_the_gap", "of_the_kl", "targets"} <= by_stage["distil"][1].keys()
    assert all(numbers["value"] > 0 for numbers in by_stage["generate"])


@pytest.mark.nightly
def test_a_loan_asks_for_everything_on_the_cpu_too(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs triton, whose interpreter stands for a GPU's kernels")
    found = tmp_path / "loan.jsonl"
    asked = ["--loan", str(found), "--device", "cpu", "--small"]
    command = [sys.executable, str(ROOT / "scripts/gpu_check.py"), *asked]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, (done.stdout, done.stderr)
    rows = [json.loads(line) for line in found.read_text().splitlines()]
    ended = [row["arm"] for row in rows if row["arm"].endswith(": done")]
    assert ended == [f"{part}: done" for part in PARTS]
    assert all(row.keys() >= KEYS and row["small"] for row in rows)
    assert all(row["numbers"]["value"] for row in rows if row["arm"].endswith("as on the CPU"))


def test_a_loan_goes_on_where_a_part_fails_or_is_late(tmp_path: Path) -> None:
    def fail(given: loan.Loan) -> None:
        given.say("half of it", value=1)
        raise ValueError("no more")

    parts = (
        loan.Part("failing", 9, fail),
        loan.Part("slow", 1, lambda given: time.sleep(9)),
        loan.Part("last", 9, lambda given: given.say("at the end")),
    )
    file = tmp_path / "loan.jsonl"
    assert loan.run(file, torch.device("cpu"), {"table": "gpu-loan"}, 60.0, parts, small=False) == 1
    arms = [json.loads(line)["arm"] for line in file.read_text().splitlines()]
    assert arms == ["half of it", "failing: ValueError: no more", "slow: out of time", "at the end", "last: done"]
