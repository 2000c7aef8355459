"""Trials of steps: what they tell, and how they are kept."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.compression import step_timing
from llmcompress.compression.step_timing import (
    COLUMNS,
    FEW,
    ROWS,
    WIDE,
    Sizes,
    TimedMoments,
    measure_pace,
    paces,
    time_steps,
)
from llmcompress.methods.layer import Layer, apply, step
from llmcompress.methods.moments import Moments

WHOLE = {name: getattr(step_timing, name) for name in ("time_products", "BRIEF", "_write")}
RTN, GPTQ = {"method": "rtn", "bits": 4}, {"method": "gptq", "bits": 4, "group_size": 32}


@pytest.fixture(autouse=True)
def whole_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials as they are, which other tests cut short."""
    for name, value in WHOLE.items():
        monkeypatch.setattr(step_timing, name, value)


@pytest.mark.parametrize("sizes", [[(576, 576), (192, 576), (1536, 576), (576, 1536)], [(8192, 2048)], [(64, 32)]])
def test_trials_tell_what_grows_with_rows_width_and_its_cube(
    sizes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def as_known(steps: Any, rows: int, width: int, data: bool) -> tuple[float, float]:
        asked.append((rows, width))
        return width * (3e-5 + 2e-7 * rows) + 1e-9 * rows * width**2, 5e-11 * width**3

    monkeypatch.setattr(step_timing, "time_steps", as_known)
    found = measure_pace((), Sizes.of(sizes), True)
    assert all((rows <= ROWS and width <= COLUMNS) or (rows <= FEW and width <= WIDE) for rows, width in asked)
    for rows, width in sizes:
        own, shared = as_known((), min(rows, ROWS), width, True)
        assert found.seconds(rows, width) == pytest.approx(own * rows / min(rows, ROWS))
        if width > COLUMNS:
            assert found.cube * width**3 == pytest.approx(shared)


def test_what_layers_share_is_counted_once_and_apart() -> None:
    now = 0.0

    def takes(seconds: float, found: Any) -> Any:
        nonlocal now
        now += seconds
        return found

    moments = TimedMoments(1.0, now=lambda: now)
    turned = moments.memo("rotated", lambda: takes(2.0, Moments(1.0)))
    for _ in range(2):
        moments.memo("outer", lambda: takes(1.0, turned.memo("inner", lambda: takes(4.0, 7))))
    assert sum(moments.clock) == 7.0


def test_trials_on_a_busy_machine_are_of_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    set_load(monkeypatch, "this machine is busy")
    before, seen = torch.get_num_threads(), set[int]()

    def watch(layer: Layer, steps: Any) -> Layer:
        seen.add(torch.get_num_threads())
        return apply(layer, steps)

    monkeypatch.setattr(step_timing, "apply", watch)
    monkeypatch.setattr(step_timing.time, "perf_counter", lambda: pytest.fail("the wall's clock counts waiting"))
    torch.set_num_threads(2)
    try:
        time_steps(STEPS, 8, 16, True)
        assert seen == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("data", [False, True])
def test_a_trial_runs_the_steps(data: bool) -> None:
    own, shared = time_steps((step(GPTQ if data else RTN),), 16, 32, data)
    assert own > 0 and (shared > 0) == data


# --- kept -----------------------------------------------------------------------------------------------------------

STEPS = (step(GPTQ),)


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The rows and columns of trials that were made, each of which takes a second; products are of constant speed."""
    made: list[tuple[int, int]] = []

    def one(steps: Any, rows: int, width: int, data: bool) -> tuple[float, float]:
        made.append((rows, width))
        return 1.0, 0.0

    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(step_timing, "time_steps", one)
    monkeypatch.setattr(step_timing, "time_products", lambda dtype: 1e9)
    set_load(monkeypatch, None)
    return made


def set_load(monkeypatch: pytest.MonkeyPatch, note: str | None) -> None:
    """Make every look at the load find this."""
    monkeypatch.setattr(step_timing, "_load_note", lambda moment: note)


def test_steps_are_tried_once_on_a_machine(counted: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first = paces({STEPS: [(64, 64)]}, True)
    assert counted
    counted.clear()
    assert paces({STEPS: [(64, 64)]}, True) == first and not counted
    paces({STEPS: [(64, 128)]}, True)
    assert counted, "another width is another trial"
    counted.clear()
    paces({STEPS: [(64, 64)]}, False)
    assert counted, "and so is one without data"
    counted.clear()
    paces({STEPS: [(64, 64)]}, True)
    assert not counted, "nothing is forgotten for that"
    monkeypatch.setattr(step_timing, "versions", lambda: {"torch": "another"})
    paces({STEPS: [(64, 64)]}, True)
    assert counted


def test_kept_speeds_follow_those_of_products(counted: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fast = paces({STEPS: [(64, 64)]}, True)[STEPS]
    monkeypatch.setattr(step_timing, "time_products", lambda dtype: 5e8)
    slow = paces({STEPS: [(64, 64)]}, True)[STEPS]
    assert slow.seconds(64, 64) == pytest.approx(2 * fast.seconds(64, 64))


def test_beside_other_work_the_last_quiet_speeds_hold(counted: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = paces({STEPS: [(64, 64)]}, True)[STEPS]
    assert step_timing.busy_warning() is None and step_timing.product_speed(torch.float32) == 1e9
    set_load(monkeypatch, "this machine is busy")
    monkeypatch.setattr(step_timing, "time_products", lambda dtype: 2.5e7)
    counted.clear()
    threads = torch.get_num_threads()
    assert step_timing.product_speed(torch.float32) == 1e9
    assert step_timing.product_speed(torch.bfloat16) == 2.5e7 * threads, "never measured in a quiet moment"
    assert paces({STEPS: [(64, 64)]}, True)[STEPS] == quiet and not counted
    said = f"this machine is busy: times are for a quiet one, as measured on {date.today().isoformat()}"
    assert step_timing.busy_warning() == said


def test_trials_beside_other_work_are_scaled_and_not_kept(counted: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    step_timing.product_speed(torch.float32)
    set_load(monkeypatch, "this machine is busy")
    monkeypatch.setattr(step_timing, "time_products", lambda dtype: 2.5e7)
    busy = paces({STEPS: [(64, 64)]}, True)[STEPS]
    set_load(monkeypatch, None)
    monkeypatch.setattr(step_timing, "time_products", lambda dtype: 1e9)
    counted.clear()
    quiet = paces({STEPS: [(64, 64)]}, True)[STEPS]
    assert counted and quiet.seconds(64, 64) == pytest.approx(40 * busy.seconds(64, 64))


def test_a_machine_that_was_never_quiet_is_told_of(counted: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    set_load(monkeypatch, "this machine is busy")
    assert step_timing.busy_warning() == (
        "this machine is busy, and how fast it is when quiet is not known yet: times are judged by one thread's speed"
    )
    assert step_timing.product_speed(torch.float32) == 1e9 * torch.get_num_threads()


@pytest.mark.parametrize("content", ["", "{}", "nonsense", None])
def test_a_damaged_file_is_made_again(counted: list[Any], tmp_path: Path, content: str | None) -> None:
    paces({STEPS: [(64, 64)]}, True)
    [file] = (path for path in (tmp_path / "cache").rglob("*.json") if '"paces"' in path.read_text())
    whole = file.read_text()
    file.write_text(whole.replace("1.0", "1.5") if content is None else content)
    counted.clear()
    paces({STEPS: [(64, 64)]}, True)
    assert counted and file.read_text() == whole


def test_speeds_that_cannot_be_kept_are_told_of(
    counted: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="speeds of this machine cannot be kept there"):
        assert paces({STEPS: [(64, 64)]}, True)
