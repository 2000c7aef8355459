"""Draw docs/pictures/frontier.png of the records: sizes in their stages, the older line, and the peers.

    python scripts/bench/frontier_picture.py

Points above WORST are left out: nobody reads off a line what a ruined model is.
"""

from __future__ import annotations

from typing import Any

from records import RESULTS, Record
from tables import all_records, current

from llmcompress.evaluate.plots import frontier_pictures

PICTURE = RESULTS.parent / "pictures" / "frontier.png"
WORST = 10_000  # of perplexities
STAGES = {
    ", by calibration alone": "calibration alone",
    ", blocks learn": "blocks learn",
    ", then distilled": "distilled",
}
SEED = "a second seed"  # of a point that is drawn
PARTIAL = "partial binarization"


def main() -> None:
    """Draw the picture."""
    records = all_records()
    stages = [record for record in current("stages", records) if record["arm"] != "dense" and SEED not in record["arm"]]
    lines = {
        f"{name}, by gradient": [r for r in stages if mark in r["arm"] and PARTIAL not in r["arm"]]
        for mark, name in STAGES.items()
    }
    lines["calibration alone, by attention"] = [r for r in current("budgets", records) if r["arm"].count(",") == 0]
    lines[PARTIAL] = [record for record in stages if PARTIAL in record["arm"]]
    peers = [record for record in current("peers", records) if record["tool"] not in ("dense", "llmcompress")]
    found = {
        "axis": "bpw",
        "dense": _point(next(record for record in current("stages", records) if record["arm"] == "dense")),
        "series": [{"recipe": name, "points": _drawn(rows)} for name, rows in lines.items()],
        "peers": [point | {"name": _name(r)} for r in peers for point in _drawn([r])],
    }
    PICTURE.write_bytes(frontier_pictures(found)["png"])


def _drawn(records: list[Record]) -> list[dict[str, Any]]:
    """Return the points of records, without ruined models and without the dense one."""
    return [_point(r) for r in records if r["numbers"]["perplexity"] < WORST and r.get("arm") != "dense"]


def _point(record: Record) -> dict[str, Any]:
    numbers = record["numbers"]
    scores = {"blimp": {"acc": numbers["blimp"]}} if "blimp" in numbers else {}
    return {"bpw": numbers["bpw"], "perplexity": numbers["perplexity"], "tasks": scores}


def _name(record: Record) -> str:
    return f"{record['tool']} {record['arm'].partition(',')[0]}"


if __name__ == "__main__":
    main()
