"""Write the tables of docs/results.md, docs/results/*.md and the how-tos of engines from docs/results/*.jsonl.

    python research/tables.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; columns.py has its columns. `<!-- table: NAME of
ENGINE -->` has the rows of one engine. A verdict on a paper, in claims.jsonl, names the rows that it rests on:
`{trellis-2}` is that row's perplexity, `{trellis-2:bpw}` its bits, `{budgets/2.050}` is of another table than
`methods`. `--check` writes nothing and ends with 1 where a page is not what the records say.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterable
from decimal import Decimal

from columns import TABLES
from records import RESULTS, Record, read_records

PAGES = (RESULTS.parent / "results.md", *sorted(RESULTS.glob("*.md")))
HOW_TOS = tuple(sorted((RESULTS.parent / "how-to").glob("for-*.md")))
REGION = re.compile(r"<!-- table: ([\w-]+)(?: of ([\w.-]+))? -->\n.*?<!-- end -->", re.DOTALL)
REFERENCE = re.compile(r"\{(?:([\w-]+)/)?([\w.-]+)(?::(\w+))?\}")
UNMEASURED = "not measured yet"


def main() -> None:
    """Write the tables, or see that they are current."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table is out of date")
    options = parser.parse_args()
    records, stale = all_records(), 0
    for page in (*PAGES, *HOW_TOS):
        before = page.read_text(encoding="utf-8")
        after = rewritten(before, records)
        stale += before != after
        if not options.check:
            page.write_text(after, encoding="utf-8")
    sys.exit(int(options.check and stale > 0))


def all_records() -> list[Record]:
    """Return every record, in the order of the files' names."""
    return [record for path in sorted(RESULTS.glob("*.jsonl")) for record in read_records(path)]


def rewritten(document: str, records: list[Record]) -> str:
    """Return the document with its marked tables as the records say."""

    def table(found: re.Match[str]) -> str:
        name, engine = found.groups()
        shown = [record for record in records if engine in (None, record.get("numbers", {}).get("engine"))]
        return f"{found[0].partition(' -->')[0]} -->\n\n{written(name, shown)}\n<!-- end -->"

    return REGION.sub(table, document)


def written(name: str, records: list[Record]) -> str:
    """Return one table without the columns that are empty in all rows, or a sentence where there is no record."""
    rows = [fields(record, records) for record in current(name, records)]
    if not rows:
        return f"{UNMEASURED.capitalize()}.\n"
    cells = {heading: [cell(form, row) for row in rows] for heading, form in TABLES[name].items()}
    shown = {heading: column for heading, column in cells.items() if any(column)}
    head = f"| {' | '.join(shown)} |\n|{'---|' * len(shown)}\n"
    lines = zip(*shown.values(), strict=True)
    return head.replace("|  |", "| |") + "".join(f"| {' | '.join(line)} |\n".replace("  ", " ") for line in lines)


def current(name: str, records: Iterable[Record]) -> list[Record]:
    """Return the records of a table: of each row the last one, where the row first came, recipes in order of name."""
    rows: dict[tuple[str, str], Record] = {}
    for record in records:
        if record["table"] == name:
            key = (
                record.get("arm") or record.get("recipe") or record.get("paper") or record["topic"],
                record.get("text") or "",
            )
            rows[_key(name, record, key, rows)] = record
    if name != "methods":
        return list(rows.values())
    return sorted(rows.values(), key=lambda record: (record["recipe"] != "dense", _natural(record["recipe"])))


def _key(name: str, record: Record, key: tuple[str, str], rows: dict[tuple[str, str], Record]) -> tuple[str, str]:
    """Tell rows of one name apart: distilled students by the student before them, recipes by their bits."""
    if name.startswith("distilled-") and not record["student"]:
        student = next(before for before in reversed(rows.values()) if before["student"])
        tokens = record["numbers"].get("training_tokens", "")
        return (f"{student['arm']}, {key[0]} {tokens}", key[1])
    if name == "partial-binarization":
        return (f"{key[0]} {record['numbers']['bpw']}", key[1])
    return key


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def fields(record: Record, records: list[Record]) -> Record:
    """Return what cells are made of: the record's fields and numbers, and what follows from them and other rows."""
    if "here" in record:
        return record | {"verdict": verdict(record["here"], records)}
    row = record | record["numbers"]
    if "bytes" in row:
        row["megabytes"] = row["bytes"] / 1e6
    if "peak_memory_bytes" in row:
        row["peak_megabytes"] = row["peak_memory_bytes"] / 1e6
    if "planned_memory_bytes" in row:
        row["planned_megabytes"] = row["planned_memory_bytes"] / 1e6
    if "measured_kl" in row and "predicted_kl" in row:
        row["measured_over_predicted"] = row["measured_kl"] / row["predicted_kl"]
    if "kl_theirs" in row:
        row["ours_over_theirs"] = row["kl_ours"] / row["kl_theirs"]
    row |= {key: ", ".join(map(str, value)) for key, value in row.items() if isinstance(value, list)}
    if "perplexity" in row:
        row["perplexity_short"] = short(row["perplexity"])
        row |= _beside_dense(row, records)
    if record["table"].startswith("distilled-"):
        row |= _beside_student(record, records)
    if record["table"] == "regrets":
        group = record["arm"].partition(":")[0]
        peers = [each["numbers"]["kl"] for each in current("regrets", records) if each["arm"].startswith(f"{group}:")]
        row["regret"] = row["kl"] / min(peers) - 1
    return row


def _beside_dense(row: Record, records: list[Record]) -> Record:
    """Return ratio and gap to the dense model: its perplexity stands in the row, or is a row of the same table."""
    found = {each.get("arm") or each["recipe"]: each["numbers"] for each in current(row["table"], records)}
    dense = found.get("dense", {}).get("perplexity") or row.get("perplexity_dense")
    if dense is None or row["table"].startswith("distilled-"):
        return {}
    ratio = row["perplexity"] / dense
    more = {"ratio_short": short(ratio, 3), "gap": None if row["numbers"] == found.get("dense") else math.log(ratio)}
    if "perplexity_docs" in row:
        docs = row["perplexity_docs"] / found["dense"]["perplexity_docs"]
        more |= {"docs_short": short(row["perplexity_docs"]), "gap_there": math.log(docs) if docs != 1 else None}
    return more


def _beside_student(record: Record, records: list[Record]) -> Record:
    """Return which shares of the gap and of the KL training took away, if the row is of a trained student."""
    if record["student"]:
        return {}
    same = [each for each in records if each["table"] == record["table"]]
    before = [each for each in same[: same.index(record)] if each["student"] and each["text"] == record["text"]][-1]
    old, new = before["numbers"], record["numbers"]
    gap = math.log(old["perplexity"] / old["perplexity_dense"])
    left = math.log(new["perplexity"] / old["perplexity_dense"])
    return {"gap_gone": 1 - left / gap, "kl_gone": 1 - new["kl"] / old["kl"]}


def cell(form: str, row: Record) -> str:
    """Return a cell: each part of the format that the row has a number for, nothing for the others."""
    made: list[str] = []
    for part in re.split(r"(?= ± |, \{| \()", form):
        names = re.findall(r"\{(\w+)", part)
        if all(row.get(name) is not None for name in names):
            made.append(part.format(**row))
    return re.sub(r"(?<=\d)%", " %", "".join(made))


def short(value: float, digits: int = 2) -> str:
    """Return a number whose decimals nobody needs once it is large."""
    if value < 1e5:
        return f"{value:.{digits}f}"
    return f"{value:.0f}" if value < 1e6 else f"{value:.2e}"


def verdict(text: str, records: list[Record]) -> str:
    """Return a verdict with the numbers of the rows that it names."""

    def number(found: re.Match[str]) -> str:
        rows = {row.get("arm") or row["recipe"]: row["numbers"] for row in current(found[1] or "methods", records)}
        key = found[3] or "perplexity"
        return numeral(key, rows[found[2]][key]) if found[2] in rows else UNMEASURED

    return REFERENCE.sub(number, text)


def numeral(key: str, value: float) -> str:
    """Return the number of a row as a verdict writes it."""
    if key == "bpw":
        return f"{value:.3f}"
    decimal = Decimal(str(value))  # rounds 96.35 as a reader does, where a float is a little less
    return f"{decimal:,.1f}" if value < 1000 else f"{decimal:,.0f}"


if __name__ == "__main__":
    main()
