"""Writes llmcompress/recipe/measured.json, what `llmcompress recipes` shows, from docs/results/methods.jsonl.

    python research/measured.py

They are those of the records in which all recipes were measured alike; of two of a recipe the later one counts. Records
of a recipe as it was before a change do not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from records import RESULTS, ROOT, Record, read_records

RECORDS = RESULTS / "methods.jsonl"
MEASURED = ROOT / "llmcompress" / "recipe" / "measured.json"
ALIKE = {"table": "methods", "model": "smollm2", "text": "wikitext2-test.raw", "windows": 8}


def main() -> None:
    """Write the file."""
    MEASURED.write_text(content(read_records(RECORDS)), encoding="utf-8")


def content(records: Iterable[Record]) -> str:
    """Return what the file must hold: one line for each recipe, and one for `dense`."""
    alike = [record for record in records if ALIKE.items() <= record.items() and not record.get("recipe_changed")]
    measured = {record["recipe"]: numbers(record["numbers"]) for record in alike}
    lines = [f"  {json.dumps(name)}: {json.dumps(measured[name])}" for name in sorted(measured)]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def numbers(measured: Record) -> Record:
    """Return the numbers of one recipe, as precise as people read them."""
    megabytes = measured["bytes"] / 1e6 if "bytes" in measured else measured["megabytes"]
    return {
        "bpw": round(measured["bpw"], 3),
        "megabytes": round(megabytes, 1),
        "perplexity": round(measured["perplexity"], 2),
    }


if __name__ == "__main__":
    main()
