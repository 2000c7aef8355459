"""Settings of all tests."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

os.environ.setdefault("LLMCOMPRESS_FAST", "exact")  # kernels everywhere, without rounded inputs
gc.disable()  # modules and cases, which stay to the end: the collector need not look through them again and again


def pytest_collection_finish() -> None:
    """Begin to collect garbage, in what is made from now on."""
    gc.freeze()
    gc.enable()


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
    """Work beside that of a run: a picture of each kind is drawn once in a process, and freed pages stay with it.

    transformers writes out each config that it reads, for a log that nobody keeps; here it writes its address.
    The runner of commands makes the whole tree of them at each call; here once.
    `tests/runtime/test_memory.py` returns pages, in a process of its own.
    """
    from transformers import PreTrainedConfig
    from typer import testing

    from llmcompress.reporting import plots
    from llmcompress.runtime import memory

    draw, drawn = plots.png_bytes, dict[tuple[str, ...], bytes]()

    def draw_once(figure: Figure) -> bytes:
        kind = tuple(axes.get_ylabel() for axes in figure.axes)
        if kind not in drawn:
            drawn[kind] = draw(figure)
        return drawn[kind]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "png_bytes", draw_once)
        patch.setattr(memory, "_c_function", lambda name: None)
        patch.setattr(PreTrainedConfig, "__repr__", object.__repr__)
        patch.setattr(testing, "_get_command", functools.cache(testing._get_command))
        yield
