"""Sizes for vLLM: those of the tensors that it gets, known before anything is written."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from llmcompress.pipeline.engines import compress_for, plan_for
from llmcompress.recipe.read import read_recipe
from tests.formats.gguf_files import tiny_llama
from tests.tiers import tiered
from tests.zoo import save_zoo

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
TEXT = {"dataset": "builtin", "samples": 6, "length": 32, "held_out": 2}
GRID = {"method": "rtn", "bits": 4, "group_size": 64, "narrow_range": True}
ROWS = {"method": "rtn", "bits": 8, "narrow_range": True, "group_size": 256}
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = {
    "3 bits": ({"method": "rtn", "bits": 3, "group_size": 64}, None, "4-bit integers g64"),
    "4 bits": (GRID, None, "4-bit integers g64"),
    "4 bits g128": (GRID | {"group_size": 128}, None, "4-bit integers "),
    "7 bits": (ROWS | {"bits": 7, "narrow_range": False}, None, "8-bit integers row"),
    "8 bits": (ROWS, None, "8-bit integers row"),
    "4 bits, int8": (GRID, {"format": "int8"}, "4-bit integers g64 in bytes, int8 inputs with a scale a token"),
    "8 bits, int8": (
        ROWS,
        {"format": "int8", "scale": "tensor"},
        "8-bit integers row, int8 inputs with a scale for all",
    ),
    "4 bits, fp8": (GRID | {"group_size": 128}, {"format": "fp8"}, "4-bit integers "),
    "fp8": ({"method": "mxfp", "format": "fp8"}, {"format": "fp8", "scale": "tensor"}, "e4m3 floats row, scales"),
    "fp8_tensor": ({"method": "mxfp", "format": "fp8_tensor"}, None, "e4m3 floats row of all rows"),
    "nvfp4": ({"method": "mxfp", "format": "nvfp4"}, {"format": "nvfp4"}, "e2m1 floats g16, scales e4m3, nvfp4 inputs"),
    "mxfp4": ({"method": "mxfp", "format": "mxfp4"}, None, "e2m1 floats g32, scales e8m0"),
    "mxfp8": ({"method": "mxfp", "format": "mxfp8"}, {"format": "mxfp8"}, "e4m3 floats g32, scales e8m0, mxfp8 inputs"),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("dense")
    return tiny_llama(place, dtype=torch.bfloat16, max_position_embeddings=128, **SIZES)


def stored(folder: Path) -> dict[str, int]:
    """The bytes of each tensor in the files of a model."""
    found: dict[str, int] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("form", tiered(FORMS, {"3 bits", "8 bits, int8", "nvfp4"}.__contains__))
def test_the_plan_has_the_sizes_of_the_files(form: str, dense: Path, tmp_path: Path) -> None:
    step, inputs, said = FORMS[form]
    rule = {"match": "*", "steps": [step]} | ({} if inputs is None else {"inputs": inputs})
    recipe = read_recipe({"version": 1, "calibration": TEXT, "rules": [rule], "kv_cache": "fp8"})
    planned = plan_for("vllm", dense, recipe)
    report = compress_for("vllm", dense, recipe, tmp_path / "out").report
    files, tensors = (
        sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")),
        stored(tmp_path / "out"),
    )
    assert files == report.bytes <= planned.bytes <= 1.03 * report.bytes
    for row in planned.layers:
        assert row.bits == 8 * sum(size for name, size in tensors.items() if name.startswith(f"{row.name}."))
        assert row.description.startswith(said)
    assert [(row.bpw, row.stored) for row in report.layers] == [(row.bpw, row.description) for row in planned.layers]
    assert report.bpw == pytest.approx(planned.bpw) and planned.model_bpw >= report.model_bpw


def test_experts_have_other_names_in_the_files(tmp_path: Path) -> None:
    source = save_zoo("mixtral", tmp_path / "dense", hidden_size=64, intermediate_size=128, dtype=torch.bfloat16)
    recipe = read_recipe({"version": 1, "rules": [{"match": "*", "steps": [GRID | {"group_size": 32}]}]})
    planned = plan_for("vllm", source, recipe)
    report = compress_for("vllm", source, recipe, tmp_path / "out").report
    assert report.bytes <= planned.bytes <= 1.03 * report.bytes
    packed = sum(size for name, size in stored(tmp_path / "out").items() if "weight_" in name)
    assert sum(row.bits for row in planned.layers) == 8 * packed
    assert report.bpw == 8 * packed / sum(prod(row.shape) for row in report.layers)


def test_a_size_is_that_of_the_files(dense: Path, tmp_path: Path) -> None:
    """Though they have three tensors for a matrix, and ours have one."""
    most = 510_000
    recipe = read_recipe({"version": 1, "calibration": TEXT, "target": {"bytes": most}})
    planned, result = plan_for("vllm", dense, recipe), compress_for("vllm", dense, recipe, tmp_path / "out")
    assert result.report.bytes <= planned.bytes <= most and result.allocation is not None
    assert result.report.bytes <= result.allocation["predicted_bytes"] <= most
