"""The demo keeps what an interrupted one has finished, and nothing of any other."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from transformers.utils import logging

from llmcompress.errors import InputError, Termination
from scripts import demo
from scripts.demo import begin

BARS = "HF_HUB_DISABLE_PROGRESS_BARS"
MADE = ("demo/report.json", "demo.partial/blocks", "demo-distilled/model", "demo-distilled.training/state", "demo.html")


def interrupted(folder: Path, asked: dict[str, str]) -> Path:
    """A demo that has begun, and has made all that one can make."""
    marker = begin(folder / "demo", folder / "demo-distilled", asked)
    for name in MADE:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return marker


def left(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_same_demo_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = interrupted(tmp_path, {"model": "one"})
    assert begin(tmp_path / "demo", tmp_path / "demo-distilled", {"model": "one"}) == marker
    assert left(tmp_path) == {*MADE, marker.name}
    assert str(tmp_path / "demo") in capsys.readouterr().out


@pytest.mark.parametrize("finished, model", [(False, "another"), (True, "one"), (True, "another")])
def test_any_other_starts_over(finished: bool, model: str, tmp_path: Path) -> None:
    marker = interrupted(tmp_path, {"model": "one"})
    if finished:
        marker.unlink()
    assert begin(tmp_path / "demo", tmp_path / "demo-distilled", {"model": model}) == marker
    assert left(tmp_path) == {marker.name}


@pytest.mark.parametrize(
    "error, code, said",
    [
        (KeyboardInterrupt(), 130, "stopped; the same command goes on after what is finished\n"),
        (Termination(), 143, "stopped; the same command goes on after what is finished\n"),
        (InputError("there is no model"), InputError.exit_code, f"[{InputError.exit_code}] there is no model\n"),
    ],
)
def test_it_ends_in_one_sentence(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise error

    monkeypatch.setattr(demo, "main", fails)
    assert demo.told() == code and capsys.readouterr().err == said


@pytest.mark.parametrize("terminal", [False, True])
def test_bars_of_transformers_are_for_terminals(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []
    monkeypatch.setattr(demo, "main", lambda: seen.append((logging.is_progress_bar_enabled(), BARS in os.environ)))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name != BARS})
    logging.enable_progress_bar()
    try:
        assert demo.told() == 0 and seen == [(terminal, not terminal)]
    finally:
        logging.enable_progress_bar()
