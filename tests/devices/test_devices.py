"""Devices: what is not there is refused; and on a second device everything goes as on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

import llmcompress as lc
from llmcompress.distillation.parallel.launch import launched_accelerator
from llmcompress.errors import RecipeError
from llmcompress.evaluation.processes import join_processes
from llmcompress.evaluation.protocol import Protocol
from llmcompress.evaluation.verify import verify
from llmcompress.recipe.distillation import Distillation
from llmcompress.runtime.devices import device_of, is_at, kind_of
from llmcompress.surgery.block_choice import alike_blocks
from llmcompress.weight.expression import decoded, dense, device, matmul
from llmcompress.weight.nodes import Dense, LowRank, RotatedInputs, Sum, Transpose, Weight, Zero
from tests.devices.scenarios import kind_of_scenario, scenarios
from tests.devices.stand_in import build
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("graphics", "'graphics' is no device; use cpu, cuda or cuda:1"),
        ("meta", "nothing can be computed on device meta; use cpu, cuda or cuda:1"),
        ("mps", "device mps has no float64, in which sums are taken here; use cpu"),
        ("cpu:1", "device cpu:1 is not there: torch finds 1, from cpu:0 on; use one of them"),
        (
            "xpu",
            "device xpu is not there: torch .* finds no xpu device; use cpu, or install a torch and a driver for it",
        ),
    ],
)
def test_a_device_that_is_not_there_is_refused(name: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=f"^{sentence}$"):
        device_of(name)


@pytest.mark.parametrize(
    ("absent", "sentence"), [("xpu", "device xpu is not there"), ("gpu", "'gpu' is no device; use cpu, cuda or cuda:1")]
)
def test_no_command_falls_back_to_another_device(absent: str, sentence: str, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text("A text that is long enough for a window of it, and for another one. " * 20)
    recipe = {"version": 1, "calibration": None, "rules": [{"match": "*", "steps": [{"method": "rtn", "bits": 4}]}]}
    protocol = Protocol(text=text, windows=1, length=32)
    small = lc.compress(model, recipe, tmp_path / "small").folder
    calls = [
        lambda: lc.compress(model, recipe, tmp_path / "out", device=absent),
        lambda: lc.compress(model, recipe | {"rules": [], "target": {"bpw": 4}}, tmp_path / "out", device=absent),
        lambda: lc.score(small, protocol, device=absent),
        lambda: lc.compare([model, small], protocol, device=absent),
        lambda: verify(small, None, text, 1, 32, absent),
        lambda: alike_blocks(model, 1, text=str(text), device=absent),
        lambda: launched_accelerator(absent, Distillation(), tmp_path / "out"),
    ]
    for call in calls:
        with pytest.raises(RecipeError, match=sentence):
            call()
    assert not (tmp_path / "out").exists()


def test_processes_have_a_device_each(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kind_of("cpu:0", 1) == torch.device("cpu:0") and kind_of("cpu", 4) == torch.device("cpu")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RecipeError, match="device cpu:0 is one, and there are 4 processes; use cpu, one for each"):
        join_processes("cpu:0").__enter__()


@pytest.mark.parametrize(
    "place, wanted, same",
    [("cuda", "cuda", True), ("cuda:1", "cuda", True), ("cuda", "cuda:0", True), ("cuda", "cuda:1", False)],
)
def test_a_device_without_a_number_is_the_first(place: str, wanted: str, same: bool) -> None:
    assert is_at(torch.device(place), torch.device(wanted)) == same
    assert not is_at(torch.device(place), torch.device("cpu"))


def test_check_each_refuses_a_process_on_another_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Accelerate keeps its device for as long as Python runs; two CPUs stand for a CPU and a GPU."""
    monkeypatch.setattr(torch.cpu, "device_count", lambda: 2)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert launched_accelerator("cpu:1", Distillation(), tmp_path / "out").device == torch.device("cpu:1")
    with pytest.raises(RecipeError, match="Accelerate already computes on cpu:1 in this Python process, not on cpu:0"):
        launched_accelerator("cpu:0", Distillation(), tmp_path / "out")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_values_without_tensors_are_on_the_device() -> None:
    nothing, nowhere = Zero((4, 4)), torch.device("meta")
    some = Dense(torch.ones(4, 4, device=nowhere))
    expressions: list[Weight] = [
        Sum((nothing, some)),
        LowRank(nothing, some),
        LowRank(some, Transpose(nothing)),
        Sum((RotatedInputs(nothing, torch.ones(4, dtype=torch.bool, device=nowhere), 4), nothing)),
    ]
    assert device(nothing) is None and device(Sum((nothing, nothing))) is None
    for w in expressions:
        assert device(w) == nowhere and dense(w).device == nowhere
    assert dense(nothing, nowhere).device == nowhere
    assert matmul(torch.ones(2, 4, device=nowhere), decoded(nothing)).device == nowhere


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in for a GPU."""
    if COMPILER is None:
        pytest.skip("needs a C++ compiler for the stand-in for a GPU")
    return build(COMPILER, tmp_path_factory.mktemp("stand_in"))


@pytest.fixture(scope="module")
def answers(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str | None]]:
    """Tells what was wrong on the stand-in, by scenario; in a process for each kind, which workers may share out."""

    @cache
    def of_kind(kind: str) -> dict[str, str | None]:
        folder, script = tmp_path_factory.mktemp(kind), str(ROOT / "tests/devices/scenarios.py")
        command = [sys.executable, script, str(library), str(folder), str(folder / "answers.json"), kind]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found: dict[str, str | None] = json.loads((folder / "answers.json").read_text())
        return found

    return of_kind


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name, *_ in scenarios(Path())])
def test_scenarios_on_a_second_device_equal_the_cpu(name: str, answers: Callable[[str], dict[str, str | None]]) -> None:
    wrong = answers(kind_of_scenario(name))[name]
    assert wrong is None, wrong
