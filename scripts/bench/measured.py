"""Writes llmcompress/recipe/measured.json, the numbers that `llmcompress recipes` shows, from docs/results.md.

    python scripts/bench/measured.py

They are the rows of the table in its section "Methods", in which all recipes were measured alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "docs" / "results.md"
MEASURED = ROOT / "llmcompress" / "recipe" / "measured.json"
SECTION = "## Methods"


def main() -> None:
    """Write the file."""
    MEASURED.write_text(content(RESULTS.read_text(encoding="utf-8")), encoding="utf-8")


def content(results: str) -> str:
    """Return what the file must hold, by the text of docs/results.md: one line for each recipe."""
    rows = {row["recipe"]: row for row in table(results)}
    lines = [f"  {json.dumps(name)}: {json.dumps(numbers(row))}" for name, row in rows.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def table(results: str) -> Iterator[dict[str, str]]:
    """Yield the rows of the section's table as cells by heading."""
    section = results.split(f"\n{SECTION}\n", 1)[1].split("\n## ", 1)[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    heading, _, *rows = cells
    for row in rows:
        yield dict(zip(heading, row, strict=True))


def numbers(row: dict[str, str]) -> dict[str, Any]:
    """Return the numbers of one row."""
    return {"bpw": float(row["bpw"]), "megabytes": float(row["MB"]), "perplexity": float(row["perplexity"])}


if __name__ == "__main__":
    main()
