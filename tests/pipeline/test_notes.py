"""The note on a cut line of calibration text is among the warnings of the report, and `plan` says how text is read."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from llmcompress.data.calibration import LONG_LINE, PIECE
from llmcompress.pipeline.compress import compress, plan
from tests.tiny import save_tiny


def test_a_cut_line_is_a_warning(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("word " * (PIECE // 2))
    recipe = {
        "version": 1,
        "calibration": {"dataset": str(text), "samples": 4, "length": 16},
        "rules": [{"match": "*", "steps": [{"method": "gptq", "bits": 4, "group_size": 16}]}],
    }
    result = compress(str(save_tiny("llama", tmp_path / "model")), recipe, tmp_path / "small")
    assert LONG_LINE in result.report.warnings
    assert result.report.calibration is not None
    assert result.report.calibration["notes"] == [LONG_LINE]


def test_plan_says_how_local_text_is_read_and_warns_of_one_that_cannot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "rows.csv").write_text("prompt,answer\nHi,Hello.\n")
    recipe = {
        "version": 1,
        "calibration": {"dataset": [str(tmp_path / "rows.csv"), str(tmp_path / "absent.csv")], "length": 32},
        "distill": {"version": 1, "data": {"dataset": str(tmp_path / "absent.*.gz"), "length": 32}},
        "rules": [{"match": "*", "steps": [{"method": "rtn", "bits": 4}]}],
    }
    with caplog.at_level(logging.INFO, "llmcompress"):
        plan(str(save_tiny("llama", tmp_path / "model")), recipe)
    [note] = [record.getMessage() for record in caplog.records if hasattr(record, "note")]
    assert note.endswith("(2 files) is read as chats from prompt, answer; first: user: Hi | assistant: Hello.")
    [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith("there is no file ") and "absent.*.gz" in warning
