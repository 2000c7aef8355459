"""Progress in a notebook: one line that is replaced; nothing anywhere else."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from llmcompress.runtime import progress as progress_module


class Kernel:
    """An IPython that keeps what it is asked to show: a list for each line, of all its texts."""

    def __init__(self, is_notebook: bool = True) -> None:
        self.lines: list[list[str]] = []
        self.display = SimpleNamespace(display=self.show)
        self.shell = SimpleNamespace(kernel=self) if is_notebook else SimpleNamespace()

    def get_ipython(self) -> Any:
        return self.shell

    def show(self, data: dict[str, str], raw: bool, display_id: bool) -> Any:
        texts = [data["text/plain"]]
        self.lines.append(texts)
        return SimpleNamespace(update=lambda data, raw: texts.append(data["text/plain"]))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(progress_module, "PAUSE", 0.0)
    found = Kernel()
    monkeypatch.setitem(sys.modules, "IPython", found)
    return found


def test_no_progress_outside_of_notebooks(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (None, Kernel(is_notebook=False), SimpleNamespace(get_ipython=lambda: None)):
        monkeypatch.setitem(sys.modules, "IPython", there)
        assert progress_module.progress_line("block", "tokens/s") is None and progress_module.progress_lines() is None


def test_a_line_is_replaced(kernel: Kernel) -> None:
    progress = progress_module.progress_line("block", "tokens/s")
    assert progress is not None
    for done in (1, 2):
        progress(done, 2, 1234.5)
    assert kernel.lines == [["block 1/2 · 1,234 tokens/s", "block 2/2 · 1,234 tokens/s"]]


def test_every_kind_of_work_has_its_line(kernel: Kernel) -> None:
    progress = progress_module.progress_lines()
    assert progress is not None
    for step in (("window", 1, 2), ("window", 2, 2), ("tasks", 0, 0)):
        progress(*step)
    assert kernel.lines == [["window 1/2", "window 2/2"], ["tasks ..."]]


def test_a_line_skips_versions_but_shows_the_last(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "PAUSE", 1e9)
    progress = progress_module.progress_line("block")
    assert progress is not None
    for done in range(1, 6):
        progress(done, 5)
    assert kernel.lines == [["block 1/5", "block 5/5"]]
