"""The ten minutes of a borrowed GPU: one process, the most valuable figure first, a record written and synced for each.

    scripts/gpu_check --loan FILE [--seconds 540] [--parts floors,search] [--small]

If it is killed, the records so far are on disk. It needs nothing but random weights. `--small` runs every part on a
CPU, the kernels for GPUs by Triton's interpreter, to show that they run; its numbers mean nothing.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from records import Record

from llmcompress.errors import LLMCompressError
from scripts.gpu.given import wait


@dataclass(frozen=True)
class Loan:
    """A device, sizes, and the file of the records; `facts`: the entries of every record."""

    file: Path
    device: torch.device
    small: bool
    facts: Record
    work: Path
    began: float = field(default_factory=time.monotonic)

    def say(self, arm: str, **numbers: Any) -> None:
        """Write a record at once, to the disk."""
        record = self.facts | {"arm": arm, "numbers": numbers | {"at": round(time.monotonic() - self.began, 1)}}
        with self.file.open("a") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(f"{record['numbers']['at']:6.1f} s  {arm}: {numbers}", flush=True)

    def milliseconds(self, call: Callable[[], Any], times: int = 5) -> float:
        """Return the median time of a call, host and device together, after one that does not count."""
        call()
        taken = []
        for _ in range(1 if self.small else times):
            started = wait(self.device)
            call()
            taken.append(1e3 * (wait(self.device) - started))
        return statistics.median(taken)

    def model(self, width: int, blocks: int) -> Path:
        """Return a random Llama; 64 wide in a small check."""
        from memory import make

        width = 64 if self.small else width
        place = self.work / f"model-{width}-{blocks}"
        if not place.exists():
            make(place, width, blocks)
        return place

    def calibration(self) -> dict[str, Any]:
        """Return the calibration of random models."""
        text = self.work / "text.txt"
        text.write_text("".join(f"Line {i} says {i * i} things about {i % 7} geese.\n" for i in range(4000)))
        samples, length = (6, 32) if self.small else (18, 1024)
        return {"dataset": str(text), "samples": samples, "length": length, "held_out": 2}


@dataclass(frozen=True)
class Part:
    """A question, and the most seconds that its answer may take."""

    name: str
    seconds: int
    find: Callable[[Loan], None]


FAILURES = (LLMCompressError, ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError,
            RuntimeError, TypeError, ValueError)  # fmt: skip


class LateError(Exception):
    """A part took too long."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise LateError in the body after so many seconds."""

    def late(*_: object) -> None:
        raise LateError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(file: Path, device: torch.device, facts: Record, seconds: float, parts: Sequence[Part], small: bool) -> int:
    """Run all parts within so many seconds; return the exit code, 1 if a part failed."""
    failed = 0
    with tempfile.TemporaryDirectory(prefix="loan-") as folder:
        loan = Loan(file, device, small, facts, Path(folder))
        for part in parts:
            left = seconds - (time.monotonic() - loan.began)
            if left <= 1:
                loan.say(f"{part.name}: not begun, no time was left")
                continue
            started, outcome = time.monotonic(), "done"
            try:
                with limited(left if small else min(part.seconds, left)):
                    part.find(loan)
            except LateError:
                outcome = "out of time"
            except FAILURES as error:  # the other parts go on, and the loan is soon over
                outcome, failed = f"{type(error).__name__}: {error}"[:300], 1
            loan.say(f"{part.name}: {outcome}", seconds=time.monotonic() - started)
    return failed
