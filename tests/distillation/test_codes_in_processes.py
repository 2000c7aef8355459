"""Frozen codes and median scales in two processes: what one process does, and a resumed run ends as a whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distillation.launched import free_port, run
from tests.distillation.miniature import make, recipe
from tests.distillation.test_processes import answers, measured, weights

RULES = [{"match": "*", "steps": [{"method": "rotate"}, {"method": "rtn", "bits": "ternary", "group_size": 16}]}]
FREEZING = {"momentum": 0.4, "threshold": 0.3, "final_threshold": 0.3}


def jobs(place: Path, out: Path) -> dict[str, dict[str, Any]]:
    """Distillations by name: `cut` is interrupted and `resumed` resumes it."""
    codes = {"rates": {"codes": 0.1}, "latents": "teacher", "micro_batch": 1, "steps": 5, "save_every": 1000}
    frozen = codes | {"freezing": FREEZING, "evaluate_every": 1}

    def job(output: str, settings: dict[str, Any], stop: list[int] | None = None) -> dict[str, Any]:
        folders = {"student": str(place / "small"), "teacher": str(place / "dense"), "output": str(out / output)}
        return folders | {"recipe": recipe(place, **settings), "stop": stop, "port": free_port()}

    return {
        "whole": job("whole", frozen),
        "cut": job("cut", frozen, stop=[0, 3]),
        "resumed": job("cut", frozen),
        "median": job("median", codes | {"scales": "median"}),
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, dict[str, Any]]]:
    """The models' folder, the folder of one process's outputs, and what that process says of its jobs."""
    place = make(tmp_path_factory.mktemp("codes"), RULES)
    asked = jobs(place, place / "alone")
    return place, place / "alone", {name: run(asked[name]) for name in ("whole", "median")}


@pytest.mark.nightly
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])  # DeepSpeed: test_zero.py
def test_two_processes_freeze_as_one_does(engine: str, alone: Any) -> None:
    place, single, wanted = alone
    out = place / engine
    out.mkdir()
    asked = jobs(place, out)
    first, second = (dict(zip(asked, each, strict=True)) for each in answers(engine, list(asked.values()), out))
    assert first["cut"]["seen"] == [1, 2, 3, 4] and first["resumed"]["seen"] == [5]
    frozen = [each["whole"]["phases"][0]["frozen"] for each in (wanted, first, second)]
    assert frozen[1] == frozen[2] and frozen[1] == pytest.approx(frozen[0], rel=0.05) and frozen[0] > 20
    assert first["resumed"]["phases"][0]["frozen"] == frozen[1]
    assert first["whole"]["history"][-1]["kl"] == pytest.approx(wanted["whole"]["history"][-1]["kl"], rel=0.02)
    assert measured(out / "whole") == measured(out / "cut")
    ours, theirs, lone = (weights(folder) for folder in (out / "whole", out / "cut", single / "whole"))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    packed = [key for key, value in ours.items() if value.dtype == torch.uint8]
    assert sum(float((ours[key] != lone[key]).float().mean()) for key in packed) / len(packed) < 0.01
    if engine == "fsdp2":
        assert "scales: median requires whole groups of latents" in first["median"]["error"]
    else:
        assert first["median"]["history"][-1]["kl"] == second["median"]["history"][-1]["kl"]
        assert first["median"]["history"][-1]["kl"] == pytest.approx(wanted["median"]["history"][-1]["kl"], rel=0.02)
