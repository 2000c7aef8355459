"""Names and sentences of others in Markdown, so that none is read as Markdown or HTML."""

from __future__ import annotations

import re
from itertools import groupby

SPECIAL = re.compile(r"([\\`*\[\]|~#])|(?<!\w)(_)|(_)(?!\w)")
LISTS = re.compile(r"^(\d*)([-+=.)])")  # what begins a list, or underlines a title


def plain(text: str) -> str:
    """Return a text on one line with everything escaped that Markdown or HTML would read as more than text."""
    one = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    escaped = SPECIAL.sub(lambda found: "\\" + found[0], one).replace("://", ":&#47;/")
    return LISTS.sub(r"\1\\\2", escaped)


def cell(text: str) -> str:
    """Return a text for a cell of a table: on one line, without bars between cells and tags."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def code(text: str) -> str:
    """Return a text as code within a line, in a table too."""
    one = " ".join(text.split()).replace("|", "\\|")
    marks = "`" * (_longest(one) + 1)
    space = " " if one.startswith("`") or one.endswith("`") else ""
    return f"{marks}{space}{one}{space}{marks}"


def fenced(text: str, language: str) -> str:
    """Return a text as a block of code that nothing in it can end."""
    marks = "`" * max(3, _longest(text) + 1)
    return f"{marks}{language}\n{text.strip()}\n{marks}"


def _longest(text: str) -> int:
    """Return the length of the longest run of backticks."""
    return max((len(list(run)) for letter, run in groupby(text) if letter == "`"), default=0)
