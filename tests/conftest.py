"""Settings of all tests."""

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("LLMCOMPRESS_FAST", "exact")  # kernels everywhere, without rounded inputs


def pytest_collection_finish() -> None:
    """Modules and cases stay to the end, so the garbage collector need not look through them again and again."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def brief_trials() -> Iterator[None]:
    """Estimates of time: products have a known speed, steps are tried once, and nothing of it is kept on this machine.

    `tests/compression/test_step_timing.py` has the trials as they are.
    """
    from llmcompress.compression import step_timing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_timing, "time_products", lambda dtype: 1e10)
        patch.setattr(step_timing, "BRIEF", 0.0)
        patch.setattr(step_timing, "_write", lambda store, what, values: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def brief_side_work() -> Iterator[None]:
    """What runs do beside their work: a training's picture is drawn once in a process, and freed pages stay with it.

    `tests/distillation/test_reporting.py` draws pictures, and `tests/runtime/test_memory.py` returns pages.
    """
    from llmcompress.distillation import result
    from llmcompress.reporting.plots import distillation_png
    from llmcompress.runtime import memory

    drawn: list[bytes] = []

    def draw_once(history: list[dict[str, Any]]) -> bytes:
        if not drawn:
            drawn.append(distillation_png(history))
        return drawn[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(result, "distillation_png", draw_once)
        patch.setattr(memory, "_c_function", lambda name: None)
        yield
