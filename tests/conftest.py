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
def stand_ins() -> Iterator[None]:
    """Stand-ins for work beside that of a test; each saves seconds of the fast tests.

    - Trials of time: products have a known speed, steps are tried once, and nothing of it is kept on this machine;
      `tests/compression/test_step_timing.py` has the trials as they are.
    - Pictures: each kind is drawn once in a process; all of them were 3 % of the time.
    - Freed pages of memory stay with the process, 2 % of the time; `tests/runtime/test_memory.py` returns them, in one
      of its own.
    - The tree of commands, which the runner of commands makes at each call, is made once.
    """
    from typer import testing

    from llmcompress.compression import step_timing
    from llmcompress.reporting import plots
    from llmcompress.runtime import memory

    draw, drawn = plots.png_bytes, dict[tuple[str, ...], bytes]()

    def draw_once(figure: Figure) -> bytes:
        kind = tuple(axes.get_ylabel() for axes in figure.axes)
        if kind not in drawn:
            drawn[kind] = draw(figure)
        return drawn[kind]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_timing, "time_products", lambda dtype: 1e10)
        patch.setattr(step_timing, "BRIEF", 0.0)
        patch.setattr(step_timing, "_write", lambda store, what, values: None)
        patch.setattr(plots, "png_bytes", draw_once)
        patch.setattr(memory, "_c_function", lambda name: None)
        patch.setattr(testing, "_get_command", functools.cache(testing._get_command))
        yield
