"""Factors of columns and groups along the output, all the way to a checkpoint, its report, and its doors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import llmcompress as lc
from llmcompress.errors import InputError, RecipeError
from llmcompress.formats.compressed_tensors import to_compressed_tensors
from llmcompress.models.files.compressed import CompressedCheckpoint
from llmcompress.weight.expression import dense, describe
from llmcompress.weight.modules import compressed_linears
from llmcompress.weight.nodes import ScaledInputs, Transpose
from tests.compression.test_run import TEXT, recipe
from tests.tiny import save_tiny

COLUMNS = [{"method": "planes", "bits": 2, "columns": True}]
AXES = [{"method": "adadim", "bits": 4, "group_size": 8}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model some of whose linears have columns of very unlike size."""
    folder = save_tiny("llama", tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("o_proj.weight"):
            parameter.data[:, ::4] *= 30
    model.save_pretrained(folder)
    return folder


def compressed(source: Path, tmp_path: Path, steps: list[dict[str, Any]], **more: Any) -> lc.Result:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i}. {TEXT}" for i in range(40)))
    return lc.compress(source, recipe(text, steps, **more), tmp_path / "out")


@pytest.mark.parametrize(
    "steps, node",
    [
        pytest.param(COLUMNS, ScaledInputs, id="columns", marks=pytest.mark.slow),
        pytest.param(AXES, Transpose, id="axes"),
    ],
)
def test_a_checkpoint_holds_them_and_its_report_says_which(
    source: Path, tmp_path: Path, steps: list[dict[str, Any]], node: type
) -> None:
    result = compressed(source, tmp_path, steps)
    layers, rows = compressed_linears(result.model), {row.name: row for row in result.report.layers}
    outs = {name: layer.expression() for name, layer in layers.items() if name.endswith("o_proj")}
    assert outs and all(isinstance(w, node) for w in outs.values())
    for name, layer in layers.items():
        w = layer.expression()
        assert rows[name].stored == describe(w) and rows[name].fallback is None and rows[name].error < 0.3
        x = torch.randn(3, layer.in_features)
        torch.testing.assert_close(layer(x), x @ dense(w).T, rtol=1e-4, atol=1e-4)
    if node is Transpose:
        assert any(not isinstance(layer.expression(), node) for layer in layers.values()), "nothing was chosen"
    with pytest.raises(InputError, match="is no single grid"):
        to_compressed_tensors(CompressedCheckpoint(tmp_path / "out"), tmp_path / "exported")


def test_a_table_that_is_head_and_embedding_has_no_groups_along_the_output(tmp_path: Path) -> None:
    """Its rows are looked up, one by one."""
    tied = save_tiny("llama", tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(RecipeError, match="groups along the input"):
        compressed(tied, tmp_path, COLUMNS, embeddings=AXES)
