"""The load of the machine, on clocks that the test sets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llmcompress.runtime import load
from llmcompress.runtime.load import LoadWatch, SlowBlocks, busy_note


class Machine:
    """Two cores on which so many seconds pass, others work on `others` of them, and this process on `own`."""

    def __init__(self) -> None:
        self.now, self.own, self.idle = 100.0, 5.0, [50.0, 60.0]

    def passes(self, seconds: float, others: float = 0.0, own: float = 0.0) -> None:
        self.now += seconds
        self.own += own * seconds
        free = max(0.0, 2 - others - own) * seconds
        self.idle = [before + free / 2 for before in self.idle]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine()
    times = SimpleNamespace(
        monotonic=lambda: found.now, process_time=lambda: found.own, sleep=lambda seconds: found.passes(seconds)
    )
    monkeypatch.setattr(load, "time", times)
    monkeypatch.setattr(load, "_allowed_cores", lambda: [0, 1])
    monkeypatch.setattr(load, "usable_cores", lambda: 2)
    cpu_times: Any = lambda percpu: [SimpleNamespace(idle=idle) for idle in found.idle]  # noqa: E731
    monkeypatch.setattr(load.psutil, "cpu_times", cpu_times)
    return found


@pytest.mark.parametrize(("others", "own"), [(0.0, 0.0), (0.0, 2.0), (1.0, 0.5), (1.5, 0.5), (2.0, 0.0)])
def test_cores_taken_are_neither_idle_nor_own(others: float, own: float, machine: Machine) -> None:
    watch = LoadWatch()
    for seconds in (0.25, 3.0):
        machine.passes(seconds, others, own)
        assert watch.cores_taken() == pytest.approx(others)


@pytest.mark.parametrize(("others", "note"), [(0.0, None), (0.2, None), (1.0, "other work takes 1.0 of 2 cores")])
def test_busy_note_describes_a_busy_machine(
    others: float, note: str | None, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load.time, "sleep", lambda seconds: machine.passes(seconds, others))
    assert busy_note() == (None if note is None else f"this machine is busy ({note})")


def remarks(machine: Machine, blocks: list[tuple[str, float, float]]) -> list[str | None]:
    """Return what is said after each block of some kind, which takes so many seconds beside others' work."""
    slow, found = SlowBlocks(), []
    for kind, seconds, others in blocks:
        machine.passes(seconds, others, own=min(1.0, 2 - others))
        found.append(slow.end_block(kind))
    return found


def test_slow_blocks_are_remarked_once_beside_other_work(machine: Machine) -> None:
    quiet, slow, alone = ("a", 2.0, 0.0), ("a", 7.0, 1.0), ("a", 7.0, 0.0)
    said = remarks(machine, [quiet, alone, quiet, slow, slow])
    assert said == [None, None, None, said[3], None]
    assert said[3] is not None and "busy" in said[3] and "this one 7.0 s, an earlier one 2.0" in said[3]
    assert remarks(machine, [quiet, ("another", 20.0, 1.0)]) == [None, None]
    first = remarks(machine, [slow, slow])
    assert first == [first[0], None] and first[0] is not None and "than on a quiet one" in first[0]
