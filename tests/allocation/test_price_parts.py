"""Prices measured by jobs that know nothing of each other: together they are those of one run, number for number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.allocation import price_file
from llmcompress.allocation.price_file import Part
from llmcompress.cli.app import app
from llmcompress.compression.job import prepare
from llmcompress.errors import DiskError, InputError, RecipeError
from llmcompress.models.dense.model import resolve
from llmcompress.pipeline.compress import price_part
from llmcompress.recipe.read import read_recipe
from tests.tiers import tiered
from tests.tiny import save_tiny

TEXT = "Forty farms bring their corn to the mill by the river, and the miller counts every sack of it. "


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` model of two blocks and two tables, and a text."""
    folder = tmp_path_factory.mktemp("parts")
    save_tiny("llama", folder / "dense", tie_word_embeddings=False)
    (folder / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(60)))
    return folder


def recipe(place: Path, **more: Any) -> dict[str, Any]:
    calibration = {"dataset": str(place / "text.txt"), "samples": 8, "length": 32, "held_out": 2}
    options = [[{"method": "rtn", "bits": bits, "group_size": 16}] for bits in (2, 3, 4, 8)]
    entries = {"version": 1, "name": "test", "calibration": calibration, "rules": [], "options": options}
    return entries | {"target": {"bytes": "60KB"}} | more


def measure(place: Path, out: Path, part: str, **more: Any) -> Path:
    return price_part(place / "dense", recipe(place, **more), out, Part.of(part))


def matrices(folder: Path) -> Any:
    return json.loads((folder / "allocation.json").read_text())["matrices"]


@pytest.mark.slow
@pytest.mark.parametrize("count", tiered([1, 3, 4], lambda count: count == 3))
def test_parts_together_are_the_prices_of_one_run(count: int, place: Path, tmp_path: Path) -> None:
    for number in reversed(range(1, count + 1)):
        found = measure(place, tmp_path / "out", f"{number}/{count}")
        assert found == tmp_path / f"out.prices-{number}-of-{count}.json" and found.is_file()
    done = lc.compress(place / "dense", recipe(place), tmp_path / "out", pricing=never)
    alone = lc.compress(place / "dense", recipe(place), tmp_path / "alone")
    assert matrices(done.folder) == matrices(alone.folder)
    assert (done.folder / "model.safetensors").read_bytes() == (alone.folder / "model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out"]


def never(done: int, blocks: int, rate: float) -> None:
    pytest.fail("what was measured is measured again")


def test_parts_that_outlive_their_list_are_removed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill just after they were joined leaves them; the next run has the list, and needs none of them."""
    measure(place, tmp_path / "out", "1/1")
    job = prepare(resolve(str(place / "dense")), read_recipe(recipe(place)))
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(price_file, "_remove_parts", interrupt)
        price_file.allocate_by(tmp_path / "out.prices.json", job)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.prices-1-of-1.json", "out.prices.json"]
    price_file.allocate_by(tmp_path / "out.prices.json", job, progress=never)
    assert [path.name for path in tmp_path.iterdir()] == ["out.prices.json"]


def interrupt(_: Path) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_missing_part_is_named(place: Path, tmp_path: Path) -> None:
    for number in (1, 3):
        measure(place, tmp_path / "out", f"{number}/4")
    with pytest.raises(InputError, match=r"of 4 parts .* 2, 4 are missing; run their jobs \(--price-part 2/4\)"):
        lc.compress(place / "dense", recipe(place), tmp_path / "out")
    measure(place, tmp_path / "out", "2/3")
    with pytest.raises(DiskError, match="has prices of out.prices in 3, 4 parts; remove all but one kind"):
        lc.compress(place / "dense", recipe(place), tmp_path / "out")
    lc.compress(place / "dense", recipe(place), tmp_path / "out", resume=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.slow
def test_parts_of_other_jobs_are_refused(place: Path, tmp_path: Path) -> None:
    measure(place, tmp_path / "out", "1/2")
    measure(place, tmp_path / "out", "2/2", seed=5)
    with pytest.raises(DiskError, match=r"out.prices-2-of-2.json was left by a different run \(recipe changed\)"):
        lc.compress(place / "dense", recipe(place), tmp_path / "out")


def test_damaged_parts_are_refused(place: Path, tmp_path: Path) -> None:
    path = measure(place, tmp_path / "out", "1/1")
    path.write_text(path.read_text().replace("sensitivities", "sensitivity"))
    with pytest.raises(DiskError, match="out.prices-1-of-1.json cannot be read"):
        lc.compress(place / "dense", recipe(place), tmp_path / "out")


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "a/b", "-1/2", "1/0", "1/2/3", ""])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="is no part of the prices; write the third of eight as 3/8"):
        Part.of(text)


def test_more_parts_than_blocks_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="5 parts are more than the 4 blocks and tables to price; take fewer"):
        measure(place, tmp_path / "out", "1/5")
    rules = [{"match": "*", "steps": [{"method": "rtn", "bits": 4, "group_size": 16}]}]
    with pytest.raises(RecipeError, match="there is nothing to choose steps for; give a recipe with a target"):
        measure(place, tmp_path / "out", "1/2", target=None, options=None, rules=rules)
    assert not list(tmp_path.iterdir())


def test_a_part_is_for_one_process(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="a part of the prices is measured by one process, and there are 2"):
        measure(place, tmp_path / "out", "1/2")


@pytest.mark.slow
def test_the_command_line_measures_a_part(place: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(place)))
    words = ["compress", str(place / "dense"), str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*words, "--price-part", "2/2", "--json"])
    assert json.loads(done.stdout) == {"part": "2/2", "file": str(tmp_path / "out.prices-2-of-2.json")}
    shown = CliRunner().invoke(app, [*words, "--price-part", "1/2"])
    assert "next    the same command without --price-part, once all parts are done" in shown.stdout
    assert CliRunner().invoke(app, words).exit_code == 0
