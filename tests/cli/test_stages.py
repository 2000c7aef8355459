"""Stages as they are shown: a bar where there is a terminal, a line each where there is none."""

from __future__ import annotations

import io

import pytest

from llmcompress.cli.stages import HEARTBEAT, Stages


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says that somebody looks at it."""

    def isatty(self) -> bool:
        return True


def test_a_pipe_has_one_line_a_stage() -> None:
    clock, stream = Clock(), io.StringIO()
    stages = Stages(stream, clock)
    with stages("set up"):
        clock.now += 3
    with stages("compress") as stage:
        for done in range(1, 31):
            clock.now += 2
            stage.progress(done, 30, 812.0)
    assert stream.getvalue() == "set up ... 3 s\ncompress 30/30 ... 1 min 0 s\n"


def test_a_long_stage_says_how_far_it_is() -> None:
    clock, stream = Clock(), io.StringIO()
    with Stages(stream, clock)("distil") as stage:
        for done in range(1, 11):
            clock.now += HEARTBEAT / 3
            stage.update(done, 10, "loss 1")
    lines = stream.getvalue().splitlines()
    assert [line.split(" ·")[0] for line in lines] == ["distil 3/10", "distil 6/10", "distil 9/10", "distil 10/10"]
    assert lines[0] == "distil 3/10 · loss 1 · 11 min 40 s left"  # seven more, at 100 s each
    assert lines[-1] == "distil 10/10 · loss 1 ... 16 min 40 s"


def test_a_stage_that_fails_says_so() -> None:
    clock, stream = Clock(), io.StringIO()

    def fail() -> None:
        with Stages(stream, clock)("score"):
            clock.now += 5
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert stream.getvalue() == "score ... failed after 5 s\n"


def test_a_terminal_has_a_bar_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    clock, stream = Clock(), Terminal()
    with Stages(stream, clock)("compress") as stage:
        stage.update(1, 4)
        clock.now += 10
        stage.update(2, 4)
        assert stage._bar is not None
        stage._bar.refresh()
    said = stream.getvalue()
    assert "━" in said and "compress 2/4 · 20 s left" in said
    assert said.endswith("compress 2/4 ... 10 s\n") and stage._bar is None
