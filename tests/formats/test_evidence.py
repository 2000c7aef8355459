"""The evidence for a checkpoint's quality: each part of it is told, or missed by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import llmcompress as lc
from llmcompress.cli.publish import pushed_view
from llmcompress.evaluation.protocol import Protocol
from llmcompress.evaluation.score import score
from llmcompress.formats.hub import _card, _proof, push
from llmcompress.formats.model_card import gather_evidence
from tests.tiny import save_tiny

NLL = {"value": 0.1, "stderr": 0.01, "items": 8, "beyond_noise": True}
SCORES: dict[str, Any] = {
    "dense": {"calibration_error": 0.021, "tasks": {}},
    "compressed": {"calibration_error": 0.043, "tasks": {"arc": {"acc": 0.5}}},
    "differences": {"nll": NLL, "tasks": {"arc": {"acc": NLL | {"beyond_noise": False}}}},
}
ALLOCATION = {"predicted_kl": 0.3, "baselines": {"uniform": 0.4, "random": 0.9}}
KINDS = {"compressed": SCORES["compressed"] | {"domains": {"law": {"kl": 0.7}, "code": {"kl": 0.6}}}}
DISTILLATION: dict[str, Any] = {
    "history": [{"kl": 0.5}, {"domains": {"wiki": {"kl": 0.2}, "docs": {"kl": 0.45}}}],
    "controls": {"vanilla": {"kl": 0.3}},
}


def test_gather_evidence_lists_all_findings() -> None:
    found = gather_evidence(SCORES, ALLOCATION, DISTILLATION)
    assert found.missing == ()
    said = "\n".join(found.findings)
    for part in (
        "differs from the dense model in: perplexity",
        "off by 0.0430 on average, that of the dense model by 0.0210",
        "0.3000 for the plan that was chosen, 0.4000 for a uniform plan and 0.9000 for a random plan",
        "Of 2 kinds of held-out text it is worst on docs: KL 0.4500",
        "Controls of the distillation",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("scores", "allocation", "distillation", "missed"),
    [
        (None, None, None, ["perplexity, KL and tasks", "quality by kinds of text"]),
        (SCORES, {"predicted_kl": 0.3}, DISTILLATION, ["plans of equal size"]),
        (SCORES, None, DISTILLATION | {"controls": {}}, ["controls of the distillation"]),
        (SCORES, None, DISTILLATION | {"history": [{"kl": 0.1}]}, ["quality by kinds of text"]),
        (SCORES | KINDS, None, DISTILLATION | {"history": [{"kl": 0.1}]}, []),
        (SCORES | {"compressed": {"tasks": {}}}, None, DISTILLATION, ["tasks", "the calibration error"]),
        ({**SCORES, "differences": None}, None, DISTILLATION, ["beyond noise"]),
    ],
)
def test_gather_evidence_names_missing_measurements(
    scores: Any, allocation: Any, distillation: Any, missed: list[str]
) -> None:
    found = gather_evidence(scores, allocation, distillation).missing
    assert len(found) == len(missed)
    assert all(part in name for part, name in zip(missed, found, strict=True))


def test_gather_evidence_names_the_worst_domain() -> None:
    said = "\n".join(gather_evidence(SCORES | KINDS, None, DISTILLATION).findings)
    assert "Of 2 kinds of text it is worst on law: KL 0.7000" in said
    assert "Of 2 kinds of held-out text it is worst on docs: KL 0.4500" in said


@pytest.mark.slow
def test_push_reports_missing_evidence_until_it_is_measured(tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense")
    steps = [{"method": "rtn", "bits": 3, "group_size": 16}]
    out = lc.compress(dense, {"version": 1, "rules": [{"match": "*", "steps": steps}]}, tmp_path / "out").folder
    before = push(out, "me/small", dry_run=True)
    assert "perplexity, KL and tasks" in before.unmeasured[0]
    shown = [line for line in pushed_view(before.to_json(), False) if isinstance(line, str)]
    assert shown[0].startswith("lacks   perplexity, KL and tasks")
    text = "The mill by the river grinds the corn of forty farms. " * 80
    (tmp_path / "kinds").mkdir()
    (tmp_path / "kinds" / "mills.txt").write_text(text[::-1])
    score(out, Protocol(text, 4, 32, domains=tmp_path / "kinds"), against=dense, save=True)
    after = push(out, "me/small", dry_run=True)
    assert after.unmeasured == ("tasks",)
    assert "it is worst on mills" in _card(out, "me/small", _proof(out))["README.md"].decode()
    assert after.files["README.md"] != before.files["README.md"]
