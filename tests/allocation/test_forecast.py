"""The plan of a target before anything is measured: its size, and what prices take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.allocation import cost
from llmcompress.allocation.choices import find_choices
from llmcompress.allocation.forecast import forecast, spread_evenly
from llmcompress.cli.app import app
from llmcompress.compression import time_estimate
from llmcompress.compression.job import prepare
from llmcompress.compression.step_timing import Pace
from llmcompress.errors import RecipeError, format_bytes
from llmcompress.models.dense.model import DenseModel, resolve
from llmcompress.models.files.file_names import RECIPE
from llmcompress.recipe.read import read_recipe
from llmcompress.recipe.target import Target
from tests.allocation.aimed import OPTIONS, make, recipe
from tests.tiny import save_tiny
from tests.zoo import save_zoo


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("forecasts"))


@pytest.mark.parametrize("target", [{"bpw": 3.0}, {"bpw": 3.7}, {"bytes": 70_000}, {"bytes": 90_000}])
def test_a_forecast_spends_what_the_target_gives(place: Path, target: dict[str, Any]) -> None:
    found = find_choices(prepare(resolve(str(place / "dense")), read_recipe(recipe(place, target))))
    chosen = spread_evenly(found, Target(**target))
    bpw = found.bpw(chosen)
    assert bpw is not None
    if "bpw" in target:
        assert 0.99 * target["bpw"] <= bpw <= target["bpw"]
    else:
        assert 0.98 * target["bytes"] <= found.size(chosen) <= target["bytes"]
    widths = {one.options[option][-1].bits for one, option in zip(found.matrices, chosen, strict=True)}  # type: ignore[attr-defined]
    assert max(widths) - min(widths) <= 1, "evenly"


@pytest.mark.slow
def test_a_plan_of_a_target_has_the_size_of_its_run(place: Path, tmp_path: Path) -> None:
    asked = recipe(place, {"bpw": 3.3})
    planned = lc.plan(place / "dense", asked)
    done = lc.compress(place / "dense", asked, tmp_path / "out")
    chosen = lc.plan(place / "dense", done.folder / RECIPE)
    assert planned.bytes == pytest.approx(chosen.bytes, rel=0.01)
    assert planned.bpw == pytest.approx(done.report.bpw, rel=0.01)
    assert [row.name for row in planned.layers] == [row.name for row in done.report.layers]
    assert planned.to_json()["target"] == {"bpw": 3.3}


def test_it_reads_headers_alone_and_refuses_as_compress_does(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: Any, **named: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(DenseModel, "read", never)
    assert lc.plan(place / "dense", recipe(place, {"kl": 0.1})).bytes
    with pytest.raises(RecipeError, match=r"target: 1 bpw cannot be reached, 2\.\d+ is the least"):
        lc.plan(place / "dense", recipe(place, {"bpw": 1}))
    with pytest.raises(RecipeError, match="target: options are judged on held-out text"):
        lc.plan(place / "dense", recipe(place, {"bpw": 3}, calibration=None))


def test_the_size_of_a_quality_is_not_promised(place: Path) -> None:
    """But bounded: by the smallest and the largest option of each matrix."""
    asked = recipe(place, {"kl": 0.1})
    found = find_choices(prepare(resolve(str(place / "dense")), read_recipe(asked)))
    least, most = (
        format_bytes(found.fixed_bytes + sum(pick(one.bytes) for one in found.matrices)) for pick in (min, max)
    )
    [said] = [note for note in lc.plan(place / "dense", asked).warnings if "a KL takes" in note]
    assert said.endswith(f"the sizes here are of middle options, of {least} to {most} that are possible")
    assert not any("a KL" in note for note in lc.plan(place / "dense", recipe(place, {"bytes": 80_000})).warnings)


@pytest.fixture
def of_known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing has to be tried."""
    monkeypatch.setattr(time_estimate, "paces", lambda asked, data: dict.fromkeys(asked, Pace({1: 1e-6}, 0.0, 0.0)))
    monkeypatch.setattr(time_estimate, "product_speed", lambda dtype: 1e9)
    for module in (time_estimate, cost):
        monkeypatch.setattr(module, "text_seconds", lambda: 0.0)


def test_bits_per_weight_say_little_about_a_model_of_tables(tmp_path: Path) -> None:
    def warnings(vocabulary: int, target: dict[str, Any]) -> str:
        folder = save_tiny("llama", tmp_path / f"{vocabulary}", vocab_size=vocabulary, num_hidden_layers=6)
        asked = {"version": 1, "calibration": {"samples": 4, "length": 32}, "target": target}
        return " ".join(forecast(prepare(resolve(str(folder)), read_recipe(asked))).warnings)

    assert "% of the weights are in token tables" in warnings(2000, {"bpw": 2.5})
    assert "token tables" not in warnings(2000, {"bytes": "1MB"})
    assert "token tables" not in warnings(264, {"bpw": 2.5})


@pytest.mark.usefixtures("of_known_speed")
def test_prices_are_counted(place: Path) -> None:
    rules = [{"match": "*", "steps": OPTIONS[1]}]

    def both(**more: Any) -> tuple[float, int]:
        planned = lc.plan(place / "dense", recipe(place, **more))
        assert planned.seconds is not None
        return planned.seconds, planned.peak_memory_bytes

    settled, _ = both(target=None, options=None, rules=rules)
    plain, memory = both(target={"bpw": 3.3})
    assert plain > 1.2 * settled
    by_kl, more = both(target={"bpw": 3.3}, damage="kl")
    assert by_kl > plain and more > memory, "three changes of each matrix pass through the model, not one"
    with_table, _ = both(target={"bytes": 70_000})
    assert with_table > plain
    rows = both(target={"bpw": 3.3}, token_weights={"by": "attention", "rows": True})[0]
    assert both(target={"bpw": 3.3}, token_weights={"by": "gradient"})[0] > rows > plain


@pytest.mark.usefixtures("of_known_speed")
def test_an_expert_reads_its_share_of_the_tokens(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = read_recipe(recipe(place, {"bpw": 3.3}))
    assert asked.calibration is not None
    job = prepare(resolve(save_zoo("mixtral", tmp_path / "mixtral")), asked)
    found = find_choices(job)
    shared = cost.pricing_seconds(job, found, asked.calibration)
    monkeypatch.setattr(cost, "token_shares", lambda job: {})
    assert cost.pricing_seconds(job, found, asked.calibration) > 1.1 * shared


@pytest.mark.usefixtures("of_known_speed")
def test_the_command_takes_a_target_for_a_recipe(place: Path) -> None:
    done = CliRunner().invoke(app, ["plan", str(place / "dense"), "--bpw", "3.5", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert 3.4 <= found["bpw"] <= 3.5 and found["seconds"] > 0
    shown = CliRunner().invoke(app, ["plan", str(place / "dense"), "--size", "100kB"])
    assert "target  0.1 MB" in shown.stdout and "compress measures what options cost" in shown.stdout
    neither = CliRunner().invoke(app, ["plan", str(place / "dense")])
    assert neither.exit_code == 2 and "there is no RECIPE; name one, or give a target" in neither.stderr
