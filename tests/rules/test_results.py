"""Every row of the results has a record of how it was made, and says what that record says."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tables
from records import recipe_path, recipe_sha256
from rows import asks_for_text, calibration

from llmcompress.allocation.allocate import RANGE
from llmcompress.recipe.read import read_recipe
from tests.rules.source_tree import ROOT

DISTILLATIONS = {path.stem for path in (ROOT / "configs" / "distillation").glob("*.yaml")}
RECIPES = {path.stem for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name != "accelerate"}
RECORDS = [record for record in tables.all_records() if "numbers" in record]
OF_RECIPES = [record for record in RECORDS if record.get("recipe", "dense") != "dense"]
KEYS = {"table", "command", "date", "commit", "model", "text", "calibration", "machine", "versions", "numbers"}
LONGEST_PAGE, LONGEST_ENTRY = 150, 12  # lines
COMMANDS = {"python", "llmcompress", "./scripts/demo", "./scripts/gpu_check"}
PENDING = {  # recipes that nobody has measured yet
    "exl3",  # no side of the embedded model's linears is a multiple of 128
    "gptq-2-g64-flexround",
    "vllm-int8",
    *("budget-2", "budget-2-tuned", "sparsity-60"),  # these six only as they were before they changed
    *("learned-masks", "pruned", "shortened"),
}


def _name(record: dict[str, Any]) -> str:
    return f"{record['table']}: {record.get('arm') or record.get('recipe')}"


def _document() -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in tables.PAGES)


def test_tables_are_those_of_the_records() -> None:
    text = _document() + "\n".join(page.read_text(encoding="utf-8") for page in tables.HOW_TOS)
    assert tables.rewritten(text, tables.all_records()) == text, "run research/tables.py"


def test_every_record_is_shown() -> None:
    marked = {name for name, _ in tables.REGION.findall(_document())}
    assert {record["table"] for record in tables.all_records()} <= marked


def test_a_page_has_one_question_and_is_short() -> None:
    lines = {page.name: len(page.read_text(encoding="utf-8").splitlines()) for page in tables.PAGES}
    long = {name: count for name, count in lines.items() if count > LONGEST_PAGE}
    assert not long, f"{long} lines (at most {LONGEST_PAGE}); give a question its own page, and history to research/log"
    asks = {page.name: page.read_text(encoding="utf-8").split("\n\n")[1] for page in tables.PAGES[1:]}
    assert not {name for name, text in asks.items() if "?" not in text}, "a page of results begins with its question"


def test_no_table_is_written_by_hand() -> None:
    free = tables.REGION.sub("", _document())
    headings = re.findall(r"^(\|.+\|)\n\|[-|]+\|$", free, re.MULTILINE)
    assert not headings, "tables without records: add records to docs/results/ and marks to a page of theirs"


def test_every_recipe_has_a_record_of_its_present_form() -> None:
    measured = {record.get("recipe") for record in RECORDS if not record.get("recipe_changed")}
    assert RECIPES - measured == PENDING, "measure a new or changed recipe by research/rows.py; take measured ones out"


def test_records_say_how_they_were_made() -> None:
    incomplete = [_name(record) for record in RECORDS if not _says_how(record)]
    assert not incomplete, f"{incomplete} lack a key, a command of ours, or the commit, machine and versions"


def _says_how(record: dict[str, Any]) -> bool:
    if not record.keys() >= KEYS or record["command"].split()[0] not in COMMANDS:
        return False
    if record.get("source") == "transcribed":
        return len(record["recorded_at"]) == 40  # the commit whose page had the row
    machine = record["machine"]
    return bool(
        re.fullmatch(r"[0-9a-f]{40}", record["commit"].removesuffix("+changes"))
        and machine["cpu"]
        and machine["threads"]
        and record["versions"]["torch"]
    )


def test_records_name_commits_of_this_repository() -> None:
    named = {record.get("recorded_at") or record["commit"].removesuffix("+changes") for record in RECORDS}
    git = ["git", "-C", str(ROOT)]
    if (
        subprocess.run([*git, "rev-parse", "--is-shallow-repository"], capture_output=True, text=True).stdout
        != "false\n"
    ):
        pytest.skip("a clone without history")
    listing = "".join(f"{commit}^{{commit}}\n" for commit in sorted(named))
    check = subprocess.run(
        [*git, "cat-file", "--batch-check"], input=listing, capture_output=True, text=True, check=True
    )
    missing = [line for line in check.stdout.splitlines() if line.endswith("missing")]
    assert not missing, f"{missing}: a record names the commit that can run it again"


def test_records_say_whether_their_recipe_has_changed() -> None:
    today = {name: recipe_sha256(recipe_path(name).read_text(encoding="utf-8")) for name in RECIPES}
    wrong = [
        _name(record)
        for record in OF_RECIPES
        if (record["recipe_sha256"] == today[record["recipe"]]) == record.get("recipe_changed", False)
    ]
    assert not wrong, f"{wrong}: a record says by recipe_changed that its recipe has changed"


def test_doors_by_recipe_name_their_recipe() -> None:
    doors = [(record, record["command"].split()) for record in RECORDS if record["table"] == "three-models"]
    by_recipe = [record for record, (_, verb, _, *words) in doors if verb == "compress" and words[0] in RECIPES]
    assert by_recipe and all(record.get("recipe") == record["command"].split()[3] for record in by_recipe)


def test_records_of_methods_are_calibrated_as_their_recipe_asks() -> None:
    """The command gives every recipe one text, but for those that ask for none; a run without has no held-out error."""
    wrong = [_name(record) for record in RECORDS if record["table"] == "methods" and not _is_calibrated_alike(record)]
    assert not wrong, f"{wrong}: measure them by research/rows.py as the others"


def _is_calibrated_alike(record: dict[str, Any]) -> bool:
    name, command = record["recipe"], record["command"]
    recipe = None if name == "dense" else read_recipe(recipe_path(name))
    asks = recipe is not None and asks_for_text(recipe)
    holds_out = recipe is not None and recipe.calibration is not None and recipe.calibration.held_out > 0
    as_all = command.startswith("python research/rows.py --data DATA --windows 8 ") and command.endswith(f" {name}")
    text = record["calibration"] == (calibration(Path()) if asks else None)
    return (
        as_all
        and text
        and (record.get("recipe_changed") or (record["numbers"].get("error_heldout") is not None) == holds_out)
    )


def test_the_range_of_a_predicted_kl_holds_nine_of_ten_plans() -> None:
    plans = [record["numbers"] for record in RECORDS if {"kl_predicted", "kl_probing"} <= record["numbers"].keys()]
    held = [RANGE[0] <= plan["kl_probing"] / plan["kl_predicted"] <= RANGE[1] for plan in plans]
    assert len(plans) > 20 and sum(held) >= 0.9 * len(plans), held


def test_distilled_rows_stand_below_their_students() -> None:
    for record in (record for record in RECORDS if record.get("recipe") in DISTILLATIONS):
        rows = tables.current(record["table"], RECORDS)
        above = rows[: rows.index(record)]
        assert any(row["student"] and row["text"] == record["text"] for row in above), _name(record)


def test_verdicts_name_rows_that_exist_or_are_waited_for() -> None:
    claims = [record for record in tables.all_records() if "here" in record]
    assert claims
    for record in claims:
        for table, row, _ in tables.REFERENCE.findall(record["here"]):
            rows = {each.get("arm") or each["recipe"] for each in tables.current(table or "methods", RECORDS)}
            assert row in rows | PENDING, f"{record['here']}: no table has a row {row}"


def test_a_number_that_changes_changes_its_table() -> None:
    """Nothing between the marks is kept from the page; the other tests rely on that."""
    records = tables.all_records()
    changed = [dict(record) for record in records]
    at = next(number for number, record in enumerate(records) if record.get("recipe") == "trellis-2")
    changed[at]["numbers"] = changed[at]["numbers"] | {"perplexity": 12.5}
    before, after = tables.rewritten(_document(), records), tables.rewritten(_document(), changed)
    lines = [new for old, new in zip(before.splitlines(), after.splitlines(), strict=True) if old != new]
    assert any("| 12.50 |" in line for line in lines), "the row itself"
    assert any(line.startswith("| QTIP") and "12.5 at" in line for line in lines), "and the verdicts that rest on it"


def test_the_log_is_short_and_what_failed_names_its_entries() -> None:
    months = sorted((ROOT / "research" / "log").glob("20*.md"))  # beside pages that entries point to
    log = "".join(path.read_text(encoding="utf-8") for path in months)
    entries = [entry.rstrip().splitlines() for entry in re.split(r"^## ", log, flags=re.MULTILINE)[1:]]
    long = {lines[0]: len(lines) - 1 for lines in entries if len(lines) - 1 > LONGEST_ENTRY}
    assert not long, f"{long} lines (at most {LONGEST_ENTRY}); give a question its own entry"
    titles = {re.sub(r"\s*\([^()]*\)$", "", lines[0]) for lines in entries}
    table = (ROOT / "docs" / "what-did-not-work.md").read_text(encoding="utf-8")
    named = {title for cell in re.findall(r"\| (2026-[^|]*) \|$", table, re.MULTILINE) for title in cell.split("; ")}
    assert named
    assert named <= titles, f"no entries of these titles: {named - titles}"
