"""The note on a cut line of calibration text is among the warnings of the report."""

from __future__ import annotations

from pathlib import Path

from llmcompress.data.calibration import LONG_LINE, PIECE
from llmcompress.pipeline.compress import compress
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
