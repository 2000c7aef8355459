"""Progress in a notebook, where nobody passes a function for it: one line that is replaced as the work goes on.

It asks the running IPython to show text under a name and to show other text there later, which every front end can do,
with ipywidgets or without. Scripts and terminals stay as quiet as ever.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

PAUSE = 0.2  # seconds between two versions of the line


class ReplacedLine:
    """The line: `show` replaces its text, but for the last one not more often than a reader can see."""

    def __init__(self, display: Callable[..., Any]) -> None:
        self._display, self._shown = display, 0.0
        self._handle: Any = None

    def show(self, text: str, last: bool = False) -> None:
        """Show a text in place of the one before."""
        if self._handle is None:
            self._handle = self._display({"text/plain": text}, raw=True, display_id=True)
        elif last or time.monotonic() - self._shown >= PAUSE:
            self._handle.update({"text/plain": text}, raw=True)
        else:
            return
        self._shown = time.monotonic()


def in_notebook() -> Callable[..., Any] | None:
    """Return IPython's `display` if this process is the kernel of a notebook, else None."""
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if shell is None or not hasattr(shell, "kernel"):
        return None
    display: Callable[..., Any] = ipython.display.display
    return display


def counted(what: str, *units: str) -> Callable[..., None] | None:
    """Return a function of (done, total, numbers...) that shows `what` is counted, and the numbers with their `units`;
    None outside of notebooks."""
    display = in_notebook()
    if display is None:
        return None
    line = ReplacedLine(display)

    def progress(done: int, total: int, *numbers: float) -> None:
        parts = [f"{what} {done}/{total}", *(f"{number:,.4g} {unit}" for number, unit in zip(numbers, units))]
        line.show(" · ".join(parts), last=done == total)

    return progress


def named() -> Callable[[str, int, int], None] | None:
    """Return `counted` for work that names what it counts, as (what, done, total), where a total of 0 is unknown; None
    outside of notebooks."""
    display = in_notebook()
    if display is None:
        return None
    lines: dict[str, ReplacedLine] = {}

    def progress(what: str, done: int, total: int) -> None:
        line = lines.setdefault(what, ReplacedLine(display))
        line.show(f"{what} {done}/{total}" if total else f"{what} ...", last=done == total)

    return progress
