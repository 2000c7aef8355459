"""Work side by side: results in order, the first error, and what threads may not change."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch

from llmcompress.methods.moments import Moments
from llmcompress.methods.solvers.feedback import few_threads
from llmcompress.runtime.devices import alone, side_by_side, workers_on
from llmcompress.runtime.precision import bfloat16_factors

CPU = torch.device("cpu")
ONEDNN: Any = torch.backends.mkldnn


def test_only_a_gpu_does_several_things_at_once() -> None:
    assert workers_on(CPU) == 1 and workers_on(torch.device("cuda")) > 1


def test_results_come_in_order_and_all_threads_meet() -> None:
    """Three that wait for each other end only if they run at once."""
    meeting = threading.Barrier(3)

    def task(number: int) -> tuple[int, bool]:
        meeting.wait(timeout=60)
        return number, alone()

    assert list(side_by_side([partial(task, n) for n in range(3)], 3, CPU)) == [(n, False) for n in range(3)]
    assert alone()


def test_one_worker_starts_a_task_when_its_result_is_wanted() -> None:
    done: list[int] = []
    found = side_by_side([partial(done.append, n) for n in range(3)], 1, CPU)
    next(found)
    assert done == [0]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_error_in_order_is_raised(workers: int) -> None:
    def task(number: int) -> int:
        if number > 0:
            raise ValueError(str(number))
        return number

    found = side_by_side([partial(task, n) for n in range(5)], workers, CPU)
    with pytest.raises(ValueError, match="^1$"):
        list(found)


def test_process_settings_stay_while_threads_work() -> None:
    """Neither torch's number of threads nor its switch for products, where both would without others beside."""
    before = torch.get_num_threads(), ONEDNN.matmul.fp32_precision
    meeting = threading.Barrier(2)

    def task() -> tuple[int, str]:
        with few_threads(10), bfloat16_factors():
            meeting.wait(timeout=60)
            return torch.get_num_threads(), ONEDNN.matmul.fp32_precision

    torch.set_num_threads(2)
    try:
        settings = 2, before[1]
        assert list(side_by_side([task, task], 2, CPU)) == [settings, settings]
        with few_threads(10):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before[0])


def test_gradients_are_as_in_the_thread_that_asks() -> None:
    with torch.no_grad():
        assert list(side_by_side([torch.is_grad_enabled] * 2, 2, CPU)) == [False, False]
    assert list(side_by_side([torch.is_grad_enabled] * 2, 2, CPU)) == [True, True]


def test_shared_values_are_derived_once() -> None:
    moments, derived = Moments(1.0), []

    def task() -> int:
        return moments.memo("key", lambda: derived.append(0) or len(derived))

    assert list(side_by_side([task] * 8, 4, CPU)) == [1] * 8
