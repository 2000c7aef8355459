"""Numbers, sizes, times and names as text, and escapes for Markdown, so that texts of others stay text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import PurePath
from typing import Any

from llmcompress.errors import format_bytes

SPECIAL = re.compile(r"([\\`*\[\]|~#])|(?<!\w)(_)|(_)(?!\w)")
LISTS = re.compile(r"^(\d*)([-+=.)])")  # what begins a list, or underlines a title


def duration(seconds: float) -> str:
    """Return seconds as "48 s", "3 min 20 s" or "1 h 2 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def phases_text(phases: Mapping[str, Mapping[str, float]], most: int = 5) -> str:
    """Return the longest phases of a report and their seconds, as "search 2 min 10 s, forward 31 s"; "" for none."""
    ranked = sorted(phases, key=lambda name: -phases[name]["host"])
    return ", ".join(f"{name} {duration(phases[name]['host'])}" for name in ranked[:most])


def target_text(target: Mapping[str, Any]) -> str:
    """Return a target of an allocation, such as "40.0 MB for vllm"."""
    [(kind, value)] = [(key, value) for key, value in target.items() if key != "engine"]
    if kind == "sparsity":
        return f"{value:g} of the weights zero"
    wanted = format_bytes(value) if kind == "bytes" else f"{value:g} {kind}"
    return f"{wanted} for {target['engine']}" if "engine" in target else wanted


def without_folders(name: str) -> str:
    """Return a name without the folders of the machine that it was made on."""
    path = PurePath(name)
    return path.name if path.is_absolute() or name.startswith((".", "~")) else name


def with_error(value: float, error: float | None, digits: int = 4) -> str:
    """Return a value with its standard error, if it has one, as "3.120 ± 0.045"."""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def number(value: float | None) -> str:
    """Return a number with three decimals; "?" for None."""
    return "?" if value is None else f"{value:.3f}"


def plain(text: str) -> str:
    """Return a text on one line with everything escaped that Markdown or HTML would read as more than text."""
    return LISTS.sub(r"\1\\\2", plain_cell(text))


def plain_cell(text: str) -> str:
    """Return a text as `plain` does, but for what begins a list, which a cell of a table cannot."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return SPECIAL.sub(lambda match: "\\" + match[0], line).replace("://", ":&#47;/")


def cell(text: str) -> str:
    """Return a text of ours for a cell of a table: on one line, with bars and tags escaped."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def code(text: str) -> str:
    """Return a text as code within a line, in a table too."""
    line = " ".join(text.split()).replace("|", "\\|")
    marks = "`" * (_longest_run(line) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{marks}{space}{line}{space}{marks}"


def code_block(text: str, language: str) -> str:
    """Return a text as a block of code that nothing in it can end."""
    marks = "`" * max(3, _longest_run(text) + 1)
    return f"{marks}{language}\n{text.strip()}\n{marks}"


def _longest_run(text: str) -> int:
    """Return the length of the longest run of backticks."""
    return max((len(list(run)) for letter, run in groupby(text) if letter == "`"), default=0)
