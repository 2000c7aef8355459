"""Stages as they are shown: a bar where there is a terminal, a line each where there is none."""

from __future__ import annotations

import io

import pytest

from llmcompress.cli.stages import HEARTBEAT, Stage


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_pipe_has_one_line_a_stage() -> None:
    clock, stream = Clock(), io.StringIO()
    stage = Stage("set up", stream, clock=clock)
    clock.now += 3
    stage.end()
    stage = Stage("compress", stream, clock=clock)
    for done in range(1, 31):
        clock.now += 2
        stage.progress(done, 30, 812.0)
    stage.end()
    stage = Stage("score", stream, clock=clock)
    clock.now += 5
    stage.end("failed after ")
    assert stream.getvalue() == "set up ... 3 s\ncompress 30/30 ... 1 min 0 s\nscore ... failed after 5 s\n"


def test_a_long_stage_says_how_far_it_is() -> None:
    clock, stream = Clock(), io.StringIO()
    stage = Stage("distil", stream, clock=clock)
    for done in range(1, 11):
        clock.now += HEARTBEAT / 3
        stage.update(done, 10, "loss 1")
    stage.end()
    lines = stream.getvalue().splitlines()
    assert [line.split(" ·")[0] for line in lines] == ["distil 3/10", "distil 6/10", "distil 9/10", "distil 10/10"]
    assert lines[0] == "distil 3/10 · loss 1 · 11 min 40 s left"  # seven more, at 100 s each
    assert lines[-1] == "distil 10/10 · loss 1 ... 16 min 40 s"


def test_a_terminal_has_a_bar_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    clock, stream = Clock(), Terminal()
    stage = Stage("compress", stream, clock=clock)
    stage.update(1, 4)
    clock.now += 10
    stage.update(2, 4)
    assert stage._bar is not None
    stage._bar.refresh()
    stage.end()
    said = stream.getvalue()
    assert "━" in said and "compress 2/4 · 20 s left" in said
    assert said.endswith("compress 2/4 ... 10 s\n") and stage._bar is None
