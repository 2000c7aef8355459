"""Ctrl-C and SIGTERM at any moment: code 130 or 143 and one sentence, whatever code they fall into."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from llmcompress.cli.process import EARLY
from llmcompress.cli.terminal import Terminal
from llmcompress.errors import Termination
from tests.tiers import tiered_nightly


def ask(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


class Dropped:
    """An object whose end is watched by a callback, in which Python drops exceptions."""


def in_a_callback(number: int) -> None:
    here = Dropped()
    watched = weakref.ref(here, lambda _: ask(number))
    del here
    assert watched() is None


def as_another_error(number: int) -> None:
    try:
        ask(number)
    except (KeyboardInterrupt, Termination):
        raise RuntimeError("a library failed in its clean-up") from None


def straight(number: int) -> None:
    ask(number)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("way", [straight, in_a_callback, as_another_error])
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_request_ends_the_command(
    way: Callable[[int], None], number: int, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(typer.Exit) as ended, Terminal(quiet=True) as terminal:
        way(number)
        terminal.progress(1, 2, 3.0)
        raise AssertionError("the request was lost")
    assert ended.value.exit_code == code
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"[{code}] stopped ") and "Traceback" not in said
    assert {one: signal.getsignal(one) for one in before} == before


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_import_ends_first(number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in the middle of torch's import may abort the process in C++."""
    name = f"stopped_by_{int(number)}"
    (tmp_path / f"{name}.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\nWHOLE = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    whole = False
    with pytest.raises(typer.Exit) as ended, Terminal(quiet=True):
        whole = importlib.import_module(name).WHOLE
        time.sleep(10)
    assert whole and ended.value.exit_code == code


def test_notes_of_an_error_that_came_of_it_stay(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), Terminal(quiet=True):
        try:
            ask()
        except KeyboardInterrupt:
            error = OSError(5, "Input/output error")
            error.add_note("3 finished blocks are kept")
            raise error from None
    assert capfd.readouterr().err.strip().endswith("[130] stopped from the keyboard; 3 finished blocks are kept")


@pytest.mark.parametrize("seconds", tiered_nightly([0.05, 0.2, 0.5, 1.0, 2.0], (0.5, 2.0).__contains__))
def test_a_program_that_is_still_importing(seconds: float, tmp_path: Path) -> None:
    """From before its first import to the middle of torch's."""
    words = [sys.executable, "-X", "importtime", "-m", "llmcompress", "compress", str(tmp_path / "none"), "-o", "x"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    if "| llmcompress.cli.process\n" not in said:
        return  # Python itself, or the first of our lines
    stopped = (130, -signal.SIGINT)  # a shell shows 130 for both; CPython ends so if a string was being executed
    assert process.returncode in (*stopped, 2), said[-2000:]  # or it had found that there is no such model
    assert "Traceback" not in said
    if process.returncode in stopped:
        assert EARLY.decode()[:28] in said
