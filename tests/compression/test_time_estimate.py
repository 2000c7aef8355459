"""The estimate of a run's time: what trials measure, and what is counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import llmcompress as lc
from llmcompress.compression import time_estimate
from llmcompress.compression.plan import prepare
from llmcompress.compression.time_estimate import COLUMNS, FEW, ROWS, WIDE, Pace, Timed, pace, token_shares, tried
from llmcompress.methods.layer import step
from llmcompress.methods.moments import Moments
from llmcompress.models.dense import resolve
from llmcompress.recipe.compression import Recipe
from llmcompress.runtime import precision
from tests.tiny import save_tiny
from tests.zoo import save_zoo

RTN, GPTQ = {"method": "rtn", "bits": 4}, {"method": "gptq", "bits": 4, "group_size": 32}


@pytest.mark.parametrize("sizes", [[(576, 576), (192, 576), (1536, 576), (576, 1536)], [(8192, 2048)], [(64, 32)]])
def test_trials_tell_what_grows_with_rows_width_and_its_cube(
    sizes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def as_known(steps: Any, rows: int, width: int, data: bool) -> tuple[float, float]:
        asked.append((rows, width))
        return width * (3e-5 + 2e-7 * rows) + 1e-9 * rows * width**2, 5e-11 * width**3

    monkeypatch.setattr(time_estimate, "tried", as_known)
    found = pace((), sizes, True)
    assert all((rows <= ROWS and width <= COLUMNS) or (rows <= FEW and width <= WIDE) for rows, width in asked)
    for rows, width in sizes:
        own, shared = as_known((), min(rows, ROWS), width, True)
        assert found.seconds(rows, width) == pytest.approx(own * rows / min(rows, ROWS))
        if width > COLUMNS:
            assert found.cube * width**3 == pytest.approx(shared)


def test_what_layers_share_is_counted_once_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time_estimate.time, "perf_counter", lambda: now)

    def takes(seconds: float, found: Any) -> Any:
        nonlocal now
        now += seconds
        return found

    moments = Timed(1.0)
    turned = moments.memo("rotated", lambda: takes(2.0, Moments(1.0)))
    for _ in range(2):
        moments.memo("outer", lambda: takes(1.0, turned.memo("inner", lambda: takes(4.0, 7))))
    assert sum(moments.clock) == 7.0


@pytest.mark.parametrize("data", [False, True])
def test_a_trial_runs_the_steps(data: bool) -> None:
    own, shared = tried((step(GPTQ if data else RTN),), 16, 32, data)
    assert own > 0 and (shared > 0) == data


def test_a_plan_counts_tokens_and_learning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        time_estimate, "pace", lambda steps, sizes, data: Pace(dict.fromkeys(range(ROWS), 0.0), 0.0, 0.0)
    )
    monkeypatch.setattr(time_estimate, "speed", lambda dtype: 1e6)
    monkeypatch.setattr(time_estimate, "_of_text", lambda: 1.0)

    def seconds(model: Path, **sections: Any) -> float:
        recipe = {"version": 1, "rules": [{"match": "*", "steps": [GPTQ]}], **sections}
        found = lc.plan(model, recipe).seconds
        assert found is not None
        return found

    def text(samples: int) -> dict[str, Any]:
        return {"dataset": "stdlib", "samples": samples, "length": 16, "held_out": 1}

    llama = save_tiny("llama", tmp_path / "llama")
    one, two, four = (seconds(llama, calibration=text(samples)) for samples in (4, 8, 16))
    assert four - two == pytest.approx(2 * (two - one))
    taught = [seconds(llama, calibration=text(4), reconstruct={"steps": steps}) for steps in (4, 8)]
    assert taught[1] > taught[0] > one
    assert seconds(llama, calibration=text(4), asymmetric=0.5) > one
    between, once, window = (
        seconds(llama, calibration=text(4), reconstruct=learning)
        for learning in (
            {"steps": 64, "rates": {"scales": 1e-3, "weights": 1e-3}},
            {"steps": 64, "rates": {"scales": 1e-3}},
            {"steps": 64, "rates": {"scales": 1e-3}, "window": 2},
        )
    )
    assert (between - one) / (once - one) == pytest.approx(4, rel=0.1)  # groups of a block
    assert (window - one) / (once - one) == pytest.approx(2, rel=0.1)


def test_a_forecast_uses_the_products_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[bool] = []

    @contextmanager
    def by_onednn() -> Iterator[None]:
        entered.append(True)
        yield

    monkeypatch.setattr(precision, "_made_by_amd", lambda: True)
    monkeypatch.setattr(precision, "_onednn_is_precise", lambda: True)
    monkeypatch.setattr(precision, "by_onednn", by_onednn)
    plan = lc.plan(save_tiny("llama", tmp_path / "llama"), {"version": 1, "rules": [{"match": "*", "steps": [RTN]}]})
    assert plan.seconds and entered


def test_an_expert_reads_its_share_of_the_tokens(tmp_path: Path) -> None:
    source = resolve(save_zoo("mixtral", tmp_path / "mixtral"))
    job = prepare(source, Recipe.model_validate({"rules": [{"match": "*", "steps": [RTN]}]}))
    shares = token_shares(job)
    chosen = source.config.num_experts_per_tok / source.config.num_local_experts
    assert chosen < 1 and set(shares.values()) == {chosen}
    assert set(shares) == {name for name in job.arch.linears() if ".experts." in name}
