"""`verify` of what engines load: every tensor is read, and what is wrong is one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.cli.app import app
from llmcompress.evaluation.protocol import Protocol
from llmcompress.pipeline.engines import compress_for
from llmcompress.recipe.read import read_recipe
from tests.formats.gguf_files import tiny_llama
from tests.tiers import tiered

SIZES = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
STEPS: dict[str, list[dict[str, Any]]] = {
    "mlx": [{"method": "rtn", "bits": 4, "group_size": 64, "symmetric": False}],
    "llama.cpp": [{"method": "gguf", "type": "Q4_0"}],
    "vllm": [{"method": "rtn", "bits": 4, "group_size": 64, "narrow_range": True}],
    "exllamav3": [{"method": "exl3", "bits": 1}],
}
MATCH = {"exllamav3": "*.0.*.q_proj"}  # its search is slow
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("dense"), dtype=torch.bfloat16, max_position_embeddings=128, **SIZES)


def written(engine: str, dense: Path, place: Path) -> Path:
    rule = {"match": MATCH.get(engine, "*"), "steps": STEPS[engine]}
    return compress_for(engine, dense, read_recipe({"version": 1, "rules": [rule]}), place).folder


@pytest.fixture(scope="module")
def mlx(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written("mlx", dense, tmp_path_factory.mktemp("mlx") / "out")


@pytest.mark.parametrize("engine", tiered(list(STEPS), "llama.cpp".__eq__))
def test_what_an_engine_loads_is_verified(engine: str, dense: Path, tmp_path: Path) -> None:
    folder = written(engine, dense, tmp_path / "out")
    report, verified = lc.read(folder), lc.verify(folder, str(dense), windows=2, length=32)
    scored = lc.score(folder, Protocol(windows=2, length=32), against=str(dense))
    assert (verified.layers, verified.bytes, verified.notes) == (len(report.layers), report.bytes, ())
    assert verified.perplexity == pytest.approx(scored["perplexity"])
    assert verified.kl == pytest.approx(scored["kl"]) and verified.bytes == scored["bytes"]
    if engine == "llama.cpp":
        assert lc.verify(folder / "model.gguf", windows=2, length=32).layers == len(report.layers)
        shutil.copy(folder / "model.gguf", tmp_path / "copy.gguf")
        (tmp_path / "lora.gguf").write_bytes(b"GGUF")  # another model's
        assert lc.verify(tmp_path / "copy.gguf", windows=2, length=32).files == 1


def refusal(*words: str | Path) -> str:
    done = CliRunner().invoke(app, ["verify", *map(str, words), "--windows", "1", "--length", "16"])
    assert (done.exit_code, done.stdout, done.stderr[:4], done.stderr.count("\n")) == (5, "", "[5] ", 1), done.output
    return done.stderr


def test_a_changed_file_is_named(mlx: Path, tmp_path: Path) -> None:
    shutil.copytree(mlx, tmp_path / "out")
    content = bytearray((tmp_path / "out" / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (tmp_path / "out" / WEIGHTS).write_bytes(content)
    assert f"{WEIGHTS} is not as it was written; download or write it again" in refusal(tmp_path / "out")


def test_tensors_are_checked_where_no_manifest_is(mlx: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(mlx, folder)
    (folder / "manifest.json").unlink()
    [note] = lc.verify(folder, windows=1, length=16).notes
    assert "there is no manifest.json" in note
    tensors = load_file(folder / WEIGHTS)
    [scales, *_] = [name for name in tensors if name.endswith("q_proj.scales")]
    tensors[scales][0, 0] = torch.nan
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps(report | {"bytes": (folder / WEIGHTS).stat().st_size}))
    assert f"{scales.removesuffix('.scales')}.weight holds NaN or Inf" in refusal(folder)
    (folder / "report.json").write_text(json.dumps(report | {"bytes": 7}))
    assert "bytes of weights, and its report.json says 7; download or write it again" in refusal(folder)
    tensors.pop(scales)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    refusal(folder)


def test_an_index_beside_the_only_file_is_none_too_many(mlx: Path, tmp_path: Path) -> None:
    """mlx-lm writes one with every model."""
    folder = tmp_path / "out"
    shutil.copytree(mlx, folder)
    (folder / "manifest.json").unlink()
    placed = dict.fromkeys(load_file(folder / WEIGHTS), WEIGHTS)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    assert lc.verify(folder, windows=1, length=16).bytes == (folder / WEIGHTS).stat().st_size


def test_other_folders_and_files_are_refused(dense: Path, mlx: Path, tmp_path: Path) -> None:
    assert "holds a plain model; verify takes a checkpoint of llmcompress, a GGUF file, or a folder" in refusal(dense)
    assert "give a compressed checkpoint" in refusal(tmp_path / "nothing")
    assert "is a file; give the folder" in refusal(mlx / WEIGHTS)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    assert "ends or breaks off inside its header" in refusal(tmp_path / "broken.gguf")
