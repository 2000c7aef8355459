"""Ranks that are threads of one process, of which one runs at a time: laws of several processes without starting any.

A thread hands the turn on where a process would wait for others, so nothing that is global to a process is touched by
two at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmcompress.runtime.ranks import Ranks, _pack

T = TypeVar("T")


class Meeting:
    """The things that the threads of a run share: whose turn it is, and what each has brought."""

    def __init__(self, count: int) -> None:
        self.turn, self.barrier = threading.Lock(), threading.Barrier(count)
        self.brought: list[Any] = [None] * count
        self.sent = 0  # bytes

    def exchange(self, rank: int, value: object) -> list[Any]:
        """Return what all have brought, once they have."""
        self.brought[rank] = value
        self.wait()
        found = list(self.brought)
        self.wait()
        return found

    def wait(self) -> None:
        """Let the others run until all are here."""
        self.turn.release()
        try:
            self.barrier.wait(60)
        finally:
            self.turn.acquire()


@dataclass(frozen=True)
class Lockstep(Ranks):
    """One of the threads of `meeting`."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1), repr=False)

    def gather(self, value: T) -> list[T]:
        """Return what each thread has, as copies."""
        found = self.meeting.exchange(self.rank, _pack(value))
        self.meeting.sent += sum(map(len, found)) if self.rank == 0 else 0
        return [value if rank == self.rank else self._unpack(one) for rank, one in enumerate(found)]

    def broadcast(self, value: Any) -> Any:
        """Return a copy of what the first thread has."""
        return self.gather(value)[0]

    def add(self, sums: Tensor) -> None:
        """Put the sum over all threads into `sums`."""
        together = self.meeting.exchange(self.rank, sums.clone())
        sums.copy_(torch.stack(together).sum(0))


def in_lockstep(count: int, work: Callable[[Ranks], T]) -> list[T]:
    """Return what `work` returns in each of `count` threads. Raises what the first of those that failed raised."""
    meeting = Meeting(count)
    ranks = [replace(Lockstep("cpu", rank, count, count), meeting=meeting) for rank in range(count)]

    def run(own: Ranks) -> T:
        with meeting.turn:
            try:
                return work(own)
            except BaseException:
                meeting.barrier.abort()
                raise

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(run, own) for own in ranks]
    errors = [future.exception() for future in futures]
    for error in sorted(filter(None, errors), key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]
