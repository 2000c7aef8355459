"""The documents for readers, and what stands in their fenced blocks."""

from __future__ import annotations

import re
import shlex
from itertools import takewhile

from tests.rules.source_tree import ROOT

RECORDS = {  # of what was run when it was run: their commands may be of that day
    "docs/results.md",
    *(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "results").glob("*.md")),
}
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(
        name for path in (ROOT / "docs").rglob("*.md") if (name := path.relative_to(ROOT).as_posix()) not in RECORDS
    ),
]


def blocks(language: str, document: str = "README.md") -> list[str]:
    """Return the fenced blocks of a document in one language."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(document: str = "README.md") -> list[list[str]]:
    """Return every command line of a document, split as a shell would, without what comes after a > or a |."""
    lines = [line for block in blocks("sh", document) for line in block.replace("\\\n", " ").splitlines()]
    split = [list(takewhile(lambda word: word not in (">", "|"), shlex.split(line, comments=True))) for line in lines]
    return [words for words in split if words]


def prose(document: str) -> str:
    """Return a document without its fenced blocks."""
    return re.sub(r"```.*?```", "", (ROOT / document).read_text(encoding="utf-8"), flags=re.DOTALL)
