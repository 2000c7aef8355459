"""Stages as they are shown: a bar where there is a terminal, a line each where there is none."""

from __future__ import annotations

import io
import logging
import threading
import time
import warnings

import pytest
from tqdm import tqdm

from llmcompress.cli import stages, terminal
from llmcompress.cli.stages import HEARTBEAT, SHORT, Stage, beating
from llmcompress.runtime.progress import count_each, count_steps


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
    assert lines[0] == "distil 3/10 · loss 1 · 2 min 20 s left"  # seven more, at 20 s each
    assert lines[-1] == "distil 10/10 · loss 1 ... 3 min 20 s"


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


def test_a_stage_counts_its_parts() -> None:
    clock, stream = Clock(), io.StringIO()
    stage = Stage("block", stream, clock=clock)
    stage.update(0, 2)
    for done in range(4):
        stage.update(done, 4, part="layer")
        clock.now += HEARTBEAT
    stage.update(4, 4, part="layer")
    stage.update(1, 2)
    stage.end()
    assert stream.getvalue().splitlines() == [
        "block 0/2 · layer 1/4 · 3 min 0 s left",
        "block 0/2 · layer 2/4 · 2 min 0 s left",
        "block 0/2 · layer 3/4 · 1 min 0 s left",
        "block 0/2 · 4 min 0 s so far",
        "block 1/2 ... 4 min 0 s",
    ]


@pytest.mark.parametrize("seconds, lines", [(SHORT - 1, 0), (SHORT, 1)])
def test_a_quiet_stage_is_silent_if_it_is_short(seconds: float, lines: int) -> None:
    clock, stream = Clock(), io.StringIO()
    stage = Stage("digest", stream, clock=clock, loud=False)
    stage.update(1, 20_000)
    clock.now += seconds
    stage.update(10_000, 20_000)
    stage.end()
    assert stream.getvalue() == f"digest 50% ... {SHORT:.0f} s\n" * lines


def test_a_long_step_is_said_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "TICK", 0.001)
    clock, stream, beaten = Clock(), io.StringIO(), threading.Event()
    stage = Stage("load", stream, clock=clock)

    def beat() -> None:
        stage.beat()
        beaten.set()

    clock.now += HEARTBEAT
    with beating(beat):
        assert beaten.wait(60)
    assert stream.getvalue() == "load · 1 min 0 s so far\n"


class SkippedTime:
    """The machine's clock, which a test sets forward."""

    def __init__(self) -> None:
        self.ahead, self._clock = 0.0, time.monotonic

    def __call__(self) -> float:
        return self._clock() + self.ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SkippedTime:
    clock = SkippedTime()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def test_a_command_says_that_it_is_at_work(clock: SkippedTime, capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.Terminal() as shown:
        for seconds in (SHORT / 2, SHORT, HEARTBEAT):
            clock.ahead += seconds
            shown._beat()
        shown.scoring("window", 1, 1)
        shown.show({}, lambda values, every: ())
    at_work, window = capsys.readouterr().err.splitlines()
    assert at_work == "at work · 1 min 15 s so far" and window.startswith("window 1/1 ... 1 min 15 s")


def test_what_the_library_counts_is_a_part_or_a_stage(clock: SkippedTime, capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.Terminal() as shown:
        for _ in count_each("ab", "file"):
            clock.ahead += HEARTBEAT
        shown.progress(0, 2, 0.0)
        for _ in count_each("ab", "layer"):
            clock.ahead += HEARTBEAT
        shown.progress(2, 2, 3.0)
        count_steps("digest", 1)()  # short
    assert [line.split(" ... ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "file 1/2 · 1 min 0 s left",
        "file 2/2",
        "block 0/2 · layer 1/2 · 1 min 0 s left",
        "block 0/2 · 2 min 0 s so far",
        "block 2/2 · 3 tokens/s",
    ]


def test_bars_of_libraries_are_our_progress(clock: SkippedTime, capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.Terminal():
        for _ in tqdm(range(3), desc="Loading weights: ", miniters=1, mininterval=0):
            clock.ahead += HEARTBEAT
        for _ in tqdm(range(3), desc="hidden", disable=True):
            pass
        with tqdm(total=5, desc="unfinished", leave=False) as bar:
            bar.update()
        for _ in tqdm(range(3), desc="short"):
            pass
    lines = [line.split(" ... ")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines[-1] == "Loading weights 3/3" and all(line.startswith("Loading weights ") for line in lines)
    tqdm(range(1)).close()
    assert "0%" in capsys.readouterr().err, "afterwards they are bars again"


def test_warnings_of_libraries_are_a_line_each_and_once(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.Terminal(), warnings.catch_warnings():
        warnings.simplefilter("always")
        for _ in range(2):
            warnings.warn("the kernels are slow\n  see there", stacklevel=1)
        warnings.warn("use another name", FutureWarning, stacklevel=1)
        logging.getLogger("llmcompress").warning("a layer is rough")
    assert capsys.readouterr().err == "warning: the kernels are slow\nwarning: a layer is rough\n"


def test_records_that_no_handler_takes_are_a_line_each_and_once(capsys: pytest.CaptureFixture[str]) -> None:
    logger, before = logging.getLogger("a.library"), logging.lastResort
    logger.propagate = False  # to the handlers of the tests
    with terminal.Terminal():
        for _ in range(3):
            logger.warning("inputs will be cast\n  see there")
            logger.info("nothing to say")
    assert capsys.readouterr().err == "warning: inputs will be cast\n" and logging.lastResort is before
    with terminal.Terminal(quiet=True):
        logger.warning("inputs will be cast")
    assert capsys.readouterr().err == ""


def test_of_deepspeed_errors_alone_are_heard(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("DeepSpeed")
    logger.addHandler(caplog.handler)
    try:
        with terminal.Terminal():
            logger.warning("there is no GPU")
            logger.error("no memory")
        logger.warning("back")
    finally:
        logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"no memory", "back"}
