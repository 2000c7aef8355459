"""Devices to compute on, by name, and work done side by side on one: one layer seldom fills a GPU.

Threads do the work, on a CUDA device each with its own stream. Meanwhile settings of the whole process, such as torch's
number of threads, must stay: see `alone`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, TypeVar

import torch

from llmcompress.errors import RecipeError

T = TypeVar("T")
ON_A_GPU = 4  # pieces of work at once, each with its own memory
_HERE = threading.local()  # `beside`: true in a thread of `side_by_side`; `stream`: its stream


def device_of(name: str) -> torch.device:
    """Return the CPU, or an accelerator that torch finds: `cuda`, `cuda:1`.

    Raises RecipeError for an unknown name, a missing device, and one without float64.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"{name!r} is no device; use cpu, cuda or cuda:1") from error
    module: Any = getattr(torch, device.type, None)
    if not hasattr(module, "device_count"):
        raise RecipeError(f"nothing can be computed on device {name}; use cpu, cuda or cuda:1")
    if device.type == "mps":
        raise RecipeError(f"device {name} has no float64, in which sums are taken here; use cpu")
    count = module.device_count() if module.is_available() else 0
    if count == 0:
        raise RecipeError(
            f"device {name} is not there: torch {torch.__version__} finds no {device.type} device; use cpu, or install "
            f"a torch and a driver for it"
        )
    if device.index is not None and device.index >= count:
        raise RecipeError(f"device {name} is not there: torch finds {count}, from {device.type}:0 on; use one of them")
    return device


def as_current(device: torch.device) -> AbstractContextManager[None]:
    """Return the context in which `device` is torch's current one, on which CUDA's events are recorded."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def is_at(place: torch.device, wanted: torch.device) -> bool:
    """True if `place` is the wanted device; a device without a number is the first one, or any where it is wanted."""
    return place.type == wanted.type and wanted.index in (None, place.index or 0)


def kind_of(name: str, processes: int) -> torch.device:
    """Return `device_of` for several `processes`, each with its own device of that kind.

    Raises RecipeError for the name of a single device, too.
    """
    device = device_of(name)
    if processes > 1 and device.index is not None:
        raise RecipeError(f"device {name} is one, and there are {processes} processes; use {device.type}, one for each")
    return device


def check_each(devices: int, processes: int, name: str) -> None:
    """Raise RecipeError unless Accelerate has as many `devices` as a launcher started `processes`."""
    if devices != processes:
        raise RecipeError(f"{processes} processes cannot each have a device like {name!r}; use cpu, or a GPU for each")


def workers_on(device: torch.device) -> int:
    """Return the number of pieces of work that a device does side by side."""
    return ON_A_GPU if device.type == "cuda" else 1


def alone() -> bool:
    """True if no other thread computes beside this one, so that it may change settings of the whole process."""
    return not getattr(_HERE, "beside", False)


def finish_here() -> None:
    """Wait for this thread's work on a GPU, so that other threads can read its results."""
    stream = getattr(_HERE, "stream", None)
    if stream is not None:
        stream.synchronize()


def side_by_side(tasks: Sequence[Callable[[], T]], workers: int, device: torch.device) -> Iterator[T]:
    """Yield the results of tasks in their order, `workers` at once; one worker starts a task when its result is wanted.

    Raises the error of the first failed task, in their order.
    """
    if workers == 1 or len(tasks) < 2:
        yield from (task() for task in tasks)
        return
    streams, gradients = _streams(device, workers), torch.is_grad_enabled()
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # the inputs of the tasks are ready

    def begin() -> None:
        _HERE.beside, _HERE.stream = True, free.pop()

    def run(task: Callable[[], T]) -> T:
        stream = _HERE.stream
        with torch.set_grad_enabled(gradients), nullcontext() if stream is None else torch.cuda.stream(stream):
            result = task()
            finish_here()
            return result

    free = list(streams)
    pool = ThreadPoolExecutor(workers, initializer=begin)
    try:
        futures = [pool.submit(run, task) for task in tasks]
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        pool.shutdown(cancel_futures=True)  # running tasks end; an earlier task has always begun earlier
    yield from (future.result() for future in futures)


@lru_cache
def _streams(device: torch.device, workers: int) -> list[Any]:
    """Return a stream for each worker, the same ones every time, since torch keeps freed memory by stream."""
    if device.type == "cuda":
        torch.linalg.inv(torch.eye(1, device=device))  # torch loads its solvers at the first call, in one thread alone
    return [torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(workers)]
