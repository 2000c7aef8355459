"""Seconds by phase."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from llmcompress.runtime import phases
from llmcompress.runtime.phases import phase, time_phases


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that phases read."""
    made = Clock()
    monkeypatch.setattr(phases, "time", made)
    return made


def test_a_phase_within_another_counts_once(clock: Clock) -> None:
    with time_phases() as timed:
        for _ in range(2):
            with phase("forward"):
                clock.now += 1
                with phase("moments"):
                    clock.now += 4
                clock.now += 2
        clock.now += 100  # in no phase
    assert timed.seconds() == {"moments": {"host": 8.0}, "forward": {"host": 6.0}}


def test_stages_tell_like_phases_apart(clock: Clock) -> None:
    def step() -> None:
        with phase("forward"):
            clock.now += 1

    with time_phases() as timed:
        with time_phases("prices") as inner:
            step()
        step()
        step()
    assert inner is timed
    assert timed.seconds() == {"forward": {"host": 2.0}, "prices: forward": {"host": 1.0}}


def test_nothing_is_counted_outside_of_a_run(clock: Clock) -> None:
    with phase("forward"):
        clock.now += 1
    with time_phases() as timed:
        pass
    assert timed.seconds() == {}


def test_an_error_ends_its_phase_and_the_run(clock: Clock) -> None:
    with pytest.raises(ValueError), time_phases() as timed, phase("search"):
        clock.now += 3
        raise ValueError
    assert timed.seconds() == {"search": {"host": 3.0}}
    with time_phases() as later:
        pass
    assert later is not timed


def test_threads_count_each_and_nest_apart() -> None:
    with time_phases() as timed, ThreadPoolExecutor(4) as pool:

        def work(number: int) -> None:
            with phase(f"outer {number % 2}"), phase("inner"):
                pass

        list(pool.map(work, range(40)))
    counted = timed.seconds()
    assert counted.keys() == {"outer 0", "outer 1", "inner"}
    assert all(seconds["host"] >= 0 for seconds in counted.values())


class Event:
    """A mark on a stream whose operations each take a second, as far as the GPU has come."""

    issued = 0
    done = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        """Put the mark behind all operations so far."""
        self.place = Event.issued

    def query(self) -> bool:
        """Return whether the GPU has passed the mark."""
        return Event.done >= self.place

    def synchronize(self) -> None:
        """Let the GPU come to the mark."""
        Event.done = max(Event.done, self.place)

    def elapsed_time(self, later: Event) -> float:
        """Return the milliseconds to a later mark; both must be passed."""
        assert self.query() and later.query()
        return 1000.0 * (later.place - self.place)


def test_seconds_of_a_gpu_are_read_without_waiting(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "issued", 0)
    monkeypatch.setattr(Event, "done", 0)

    def launch(count: int) -> None:
        Event.issued += count

    with time_phases() as timed:
        with phase("forward"):
            launch(2)
            with phase("moments"):
                launch(5)
            launch(1)
        assert Event.done == 0  # the host did not wait
        counted: dict[str, dict[str, Any]] = timed.seconds()
    assert {name: seconds["device"] for name, seconds in counted.items()} == {"forward": 3.0, "moments": 5.0}
