"""The commands on experts: a dry run shows what a run writes, and mistakes end in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmcompress.cli.app import app
from tests.tiers import tiered
from tests.zoo import save_zoo, text_for_calibration

WAYS = {
    "prune": ["--keep", "3"],
    "merge": ["--keep", "3"],
    "condense": ["--count", "1"],
    "replace": ["--count", "0.5", "--rank", "3"],
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_zoo("qwen3_moe", tmp_path_factory.mktemp("mixture") / "dense")


def run(way: str, mixture: Path, *more: str) -> Any:
    text = str(text_for_calibration(mixture.parent))
    return CliRunner().invoke(app, ["experts", way, str(mixture), "--text", text, "--samples", "4", *more])


@pytest.mark.parametrize("way", tiered(WAYS, "condense".__eq__))
def test_a_dry_run_is_the_plan_of_the_run(way: str, mixture: Path, tmp_path: Path) -> None:
    there = sorted(mixture.parent.iterdir())
    planned = run(way, mixture, *WAYS[way], "--dry-run", "--json", "-o", str(tmp_path / "out"))
    assert planned.exit_code == 0 and not (tmp_path / "out").exists()
    assert there == [path for path in sorted(mixture.parent.iterdir()) if path.name != "text.txt" or path in there]
    done = run(way, mixture, *WAYS[way], "--json", "-o", str(tmp_path / "out"))
    before, after = json.loads(planned.stdout), json.loads(done.stdout)
    assert before.pop("output") is None and after.pop("output") == str(tmp_path / "out")
    assert before == after
    assert (tmp_path / "out" / "manifest.json").is_file()
    assert json.loads((tmp_path / "out" / "experts.json").read_text()) == after | {"output": None}


@pytest.mark.parametrize(
    "way, words",
    [
        ("prune", ("3 of 4 stay in each block, by reap", "dropped ", "damage")),
        ("merge", ("4 in each block become 3, by averages of alike ones", "merged ", "damage")),
        ("condense", ("2 of 4 stay on, without a router, in 1 blocks", "folded ", "if condensed")),
        ("replace", ("2 of 4 in each block become factors of rank 3, by reap", "replaced ", "stays dense")),
    ],
)
def test_people_read_what_happens_to_each_block(way: str, words: tuple[str, ...], mixture: Path) -> None:
    shown = run(way, mixture, *WAYS[way], "--dry-run")
    assert shown.exit_code == 0
    assert all(word in shown.stdout + shown.stderr for word in (*words, "nothing was written", "to judge on"))


@pytest.mark.parametrize(
    "way, words, code, sentence",
    [
        ("prune", ["--keep", "3"], 2, "there is no OUT; name a folder with -o, or look at the plan with --dry-run"),
        ("prune", ["--keep", "9", "--dry-run"], 2, "keep is 9, where a block has 4 experts"),
        ("prune", ["--keep", "3", "--by", "luck", "--dry-run"], 2, "choose one of reap, frequency, random"),
        ("condense", ["--blocks", "4-2", "--dry-run"], 2, "such as 4,7-9"),
        ("condense", ["--dry-run"], 2, "exactly one of them"),
        ("replace", ["--count", "1", "--rank", "2", "--share", "0.5", "--dry-run"], 2, "give one of them"),
    ],
)
def test_mistakes_end_in_a_sentence(way: str, words: list[str], code: int, sentence: str, mixture: Path) -> None:
    done = run(way, mixture, *words)
    assert done.exit_code == code and sentence in done.stderr and "Traceback" not in done.stderr
