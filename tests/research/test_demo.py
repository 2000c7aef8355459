"""The demo keeps what an interrupted one has finished, and nothing of any other."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
from tqdm.auto import tqdm

from llmcompress.errors import InputError, Termination
from scripts import demo
from scripts.demo import begin

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


def test_bars_and_warnings_of_libraries_stay_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prints() -> None:
        list(tqdm(range(3), desc="Loading weights"))
        warnings.warn("Nothing fits\nSee there", stacklevel=1)

    monkeypatch.setattr(demo, "main", prints)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert demo.told() == 0 and capsys.readouterr().err == "Nothing fits\n"
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"], "in the processes that it starts"
