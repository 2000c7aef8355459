"""The estimate of a run's time: what is counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import llmcompress as lc
from llmcompress.compression import time_estimate
from llmcompress.compression.job import prepare
from llmcompress.compression.step_timing import Pace
from llmcompress.compression.time_estimate import token_shares
from llmcompress.models.dense.model import resolve
from llmcompress.recipe.compression import Recipe
from llmcompress.runtime import precision
from tests.tiny import save_tiny
from tests.zoo import save_zoo

RTN, GPTQ = {"method": "rtn", "bits": 4}, {"method": "gptq", "bits": 4, "group_size": 32}


def test_a_plan_counts_tokens_and_learning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_estimate, "paces", lambda asked, data: dict.fromkeys(asked, Pace({1: 0.0}, 0.0, 0.0)))
    monkeypatch.setattr(time_estimate, "product_speed", lambda dtype: 1e6)
    monkeypatch.setattr(time_estimate, "text_seconds", lambda: 1.0)

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
