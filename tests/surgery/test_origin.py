"""Origins: a model that several commands changed one after another still tells what it was made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import llmcompress as lc
from llmcompress.errors import InputError
from llmcompress.formats.hub import _card, _proof
from llmcompress.models.dense.locate import Place
from llmcompress.models.files.file_names import ORIGIN
from llmcompress.reporting.report import Report
from tests.tiny import save_tiny
from tests.zoo import save_zoo, text_for_calibration

COMMIT, TERMS = "0123456789" * 4, "its terms are elsewhere"
MADE = "the dense model was made by llmcompress from org/dense"
RULES = [{"match": "*", "steps": [{"method": "rtn", "bits": 4, "group_size": 8}]}]
TAUGHT = {"version": 1, "rates": {"weights": 1e-2}, "steps": 1, "batch": 2, "micro_batch": 2, "compute": "float32"}


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A text file."""
    return str(text_for_calibration(tmp_path))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what the Hub has as org/dense, yet to be filled."""

    def download(name: str, *_: object) -> Place:
        return Place(name, tmp_path / "dense", revision=COMMIT, hub_id=name, license="its-own", notes=(TERMS,))

    monkeypatch.setattr("llmcompress.models.dense.locate.download", download)
    return tmp_path


def compressed(folder: Path, output: Path) -> Report:
    """The report on a model without its gates."""
    recipe = {"version": 1, "calibration": None, "rules": RULES, "gates": {"kl": None, "perplexity_ratio": None}}
    return lc.compress(folder, recipe, output).report


def test_the_origin_survives_changes_of_shape_and_a_distillation(place: Path, text: str) -> None:
    save_tiny("llama", place / "dense", num_hidden_layers=4)
    assert lc.drop_blocks("org/dense", [1], place / "short").warnings == (TERMS,)
    data = {"dataset": text, "samples": 8, "length": 32, "held_out": 2}
    lc.distill(place / "short", place / "dense", TAUGHT | {"data": data}, place / "taught")
    slim = lc.narrow(place / "taught", place / "slim", neurons=45, text=text, samples=8)
    assert slim.warnings[:2] == (TERMS, MADE)
    report = compressed(place / "slim", place / "out")
    assert (report.model, report.base_model, report.revision) == ("slim", "org/dense", COMMIT)
    assert report.license == "its-own" and {TERMS, MADE} <= set(report.warnings)
    card = _card(place / "out", "me/small", _proof(place / "out"))["README.md"].decode()
    metadata = ModelCard(card).data.to_dict()
    assert (metadata["license"], metadata["base_model"]) == ("its-own", "org/dense")
    assert TERMS[1:] in card and MADE[1:] in card  # as sentences


def test_the_origin_survives_fewer_experts(place: Path, text: str) -> None:
    save_zoo("qwen3_moe", place / "dense")
    lc.prune_experts("org/dense", place / "pruned", keep=3, text=text, samples=4)
    report = compressed(place / "pruned", place / "out")
    assert (report.base_model, report.revision, report.license) == ("org/dense", COMMIT, "its-own")
    assert {TERMS, MADE} <= set(report.warnings)


def test_a_model_of_this_machine_tells_its_licence_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by which name its folder went."""
    save_tiny("llama", tmp_path / "dense", num_hidden_layers=4)
    monkeypatch.chdir(tmp_path)
    assert len(lc.drop_blocks("dense", [1], "short").warnings) == 1
    assert not Path("short", ORIGIN).exists()
    Path("dense", "README.md").write_text("---\nlicense: mit\n---\nA model.")
    lc.drop_blocks("dense", [1], "next")
    lc.drop_blocks("next", [1], "last")
    expected: dict[str, object] = {"base_model": None, "revision": None, "license": "mit", "notes": []}
    assert json.loads(Path("last", ORIGIN).read_text()) == expected
    for damage in ('{"notes": 5}', '{"license": [5]}', "[]"):
        Path("last", ORIGIN).write_text(damage)
        with pytest.raises(InputError, match="write the model again, or remove that file"):
            lc.drop_blocks("last", [0], "never")
