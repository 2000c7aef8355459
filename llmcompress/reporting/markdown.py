"""Escapes for Markdown, so that names and sentences of others stay text."""

from __future__ import annotations

import re
from itertools import groupby

SPECIAL = re.compile(r"([\\`*\[\]|~#])|(?<!\w)(_)|(_)(?!\w)")
LISTS = re.compile(r"^(\d*)([-+=.)])")  # what begins a list, or underlines a title


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
