"""The command `report`: a page on the disk, JSON on request, one sentence and an exit code for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmcompress.cli.app import app
from llmcompress.models.files.checkpoint import check_manifest
from llmcompress.pipeline.compress import compress
from tests.tiny import save_tiny

RULES = [{"match": "*.mlp.*", "steps": [{"method": "rtn", "bits": 3}]}]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose MLPs are compressed."""
    folder = tmp_path_factory.mktemp("report")
    recipe = {"version": 1, "name": "mlps", "calibration": {"samples": 2, "length": 32}, "rules": RULES}
    compress(save_tiny("llama", folder / "dense"), recipe, folder / "small")
    return folder / "small"


def run(*words: object) -> tuple[int, str, str]:
    """The exit code, what was printed, and what was said on standard error."""
    done = CliRunner().invoke(app, ["report", *map(str, words)])
    return done.exit_code, done.stdout, done.stderr


def test_it_writes_a_page_of_a_real_checkpoint(small: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, said, errors = run(small, "-o", page)
    assert code == 0, errors
    text = page.read_text(encoding="utf-8")
    assert str(page) in said and "Nobody has scored this checkpoint" in said
    for fact in ("mlps", "mlp.up_proj", "no rule of the recipe matches it", "self_attn.q_proj"):
        assert fact in text, fact
    assert str(tmp_path) not in text and check_manifest(small)  # the checkpoint is as it was


def test_json_and_sentences(small: Path, tmp_path: Path) -> None:
    sentences = tmp_path / "sentences.json"
    sentences.write_text(json.dumps({"Why": {"dense": "not", "compressed": "knot"}}))
    code, said, _ = run(small, "-o", tmp_path / "page.html", "--generations", sentences, "--json")
    found = json.loads(said)
    assert code == 0 and found["bytes"] == (tmp_path / "page.html").stat().st_size
    assert len(found["missing"]) == 1 and "knot" in (tmp_path / "page.html").read_text()


def test_each_fault_has_its_exit_code(small: Path, tmp_path: Path) -> None:
    (tmp_path / "there.html").write_text("mine")
    for words, code in (
        ((small, "-o", tmp_path / "there.html"), 4),
        ((small, "-o", small / "page.html"), 4),
        ((small, "-o", tmp_path / "page.txt"), 2),
        ((tmp_path, "-o", tmp_path.with_suffix(".html")), 5),
        ((small, "-o", tmp_path / "page.html", "--generations", tmp_path / "none.json"), 5),
        ((small,), 2),
    ):
        found, _, errors = run(*words)
        assert found == code, (words, errors)
    assert not (tmp_path / "page.html").exists()
