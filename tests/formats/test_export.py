"""Doors out, each entered by the engine it is for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmcompress as lc
from llmcompress.errors import DiskError, InputError, RecipeError
from llmcompress.formats.export import export
from llmcompress.models.files.checkpoint import check_manifest, copy_folder
from llmcompress.reporting.html.page import write_page
from llmcompress.surgery.drop import drop_blocks
from llmcompress.surgery.shrink import shrink
from tests.tiny import save_tiny

GRID = {"method": "rtn", "bits": 4, "group_size": 16}
SVD = {"method": "svd", "rank": 3, "factor_bits": 16}
IDS = torch.arange(30)[None] * 7 % 256
STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
assert "llmcompress" not in sys.modules
torch.save(model(torch.arange(30)[None] * 7 % 256).logits, sys.argv[2])
"""


def compressed(source: Path, out: Path, steps: list[dict[str, Any]], **more: Any) -> Path:
    return lc.compress(source, {"version": 1, "rules": [{"match": "*", "steps": steps}], **more}, out).folder


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


@pytest.mark.parametrize(
    "family, tied",
    [
        pytest.param("llama", True, marks=pytest.mark.slow),
        pytest.param("gpt2", True, marks=pytest.mark.nightly),
        pytest.param("gpt_neox", False, marks=pytest.mark.nightly),
    ],
)
def test_dense_export_loads_without_llmcompress(family: str, tied: bool, tmp_path: Path) -> None:
    source = save_tiny(family, tmp_path / "dense", tie_word_embeddings=tied, dtype=torch.bfloat16)
    folder = compressed(source, tmp_path / "out", [GRID], embeddings=[GRID])
    done = export(folder, tmp_path / "plain", "dense")
    subprocess.run([sys.executable, "-c", STOCK, str(tmp_path / "plain"), str(tmp_path / "logits")], check=True)
    found, expected = torch.load(tmp_path / "logits"), logits(folder)
    assert (found - expected).norm() < 0.01 * expected.norm()
    assert (
        done.bytes_before
        < done.bytes_after
        == sum(p.stat().st_size for p in (tmp_path / "plain").glob("*.safetensors"))
    )
    assert "rounded to bfloat16" in done.changed[0]
    prompt = "the mill"
    tokenizers = [AutoTokenizer.from_pretrained(place)(prompt)["input_ids"] for place in (folder, tmp_path / "plain")]
    assert tokenizers[0] == tokenizers[1]


def test_no_output_goes_into_the_checkpoint_that_is_read(tmp_path: Path) -> None:
    small = compressed(save_tiny("llama", tmp_path / "dense"), tmp_path / "small", [SVD])
    distillation = {"version": 1, "rates": {"scales": 1e-3}}
    recipe = {"version": 1, "rules": [{"match": "*", "steps": [GRID]}]}
    calls: list[Callable[[], object]] = [
        lambda: lc.export(small, small / "inside", "dense"),
        lambda: lc.score(small, output=small / "inside"),
        lambda: lc.compare([tmp_path / "dense", small], output=small / "inside.md"),
        lambda: shrink(small, 1, small / "inside"),
        lambda: lc.distill(small, tmp_path / "dense", distillation, small / "inside"),
        lambda: write_page(small, small / "inside.html"),
        lambda: lc.compress(tmp_path / "dense", recipe, small / "inside" / "deeper"),
        lambda: drop_blocks(tmp_path / "dense", [0], small / "inside"),
        lambda: copy_folder(tmp_path / "dense", small / "inside"),
    ]
    for call in calls:
        with pytest.raises(DiskError, match=r"inside.* is inside the checkpoint .*small, where only its own files"):
            call()
        assert check_manifest(small)


GRIDS: list[dict[str, Any]] = [
    {"method": "rtn", "bits": 1},
    {"method": "rtn", "bits": "ternary", "group_size": 16},
    {"method": "rtn", "bits": 2},
    {"method": "rtn", "bits": 3, "group_size": 16, "symmetric": False},
    {"method": "rtn", "bits": 4, "group_size": 16},
    {"method": "rtn", "bits": 7},
    {"method": "rtn", "bits": 7, "symmetric": False},
]


@pytest.mark.slow
def test_compressed_tensors_holds_every_grid(tmp_path: Path) -> None:
    """One layer of each kind of grid, in stock transformers with the compressed-tensors package."""
    pytest.importorskip("compressed_tensors")
    source = save_tiny("llama", tmp_path / "dense", dtype=torch.bfloat16)
    names = ["*.0.*.q_proj", "*.0.*.k_proj", "*.0.*.v_proj", "*.0.*.o_proj", "*.0.*.gate_proj", "*.0.*.up_proj", "*"]
    rules = [{"match": name, "steps": [grid]} for name, grid in zip(names, GRIDS, strict=True)]
    folder = lc.compress(source, {"version": 1, "rules": rules}, tmp_path / "out").folder
    done = export(folder, tmp_path / "packed", "compressed-tensors")
    subprocess.run([sys.executable, "-c", STOCK, str(tmp_path / "packed"), str(tmp_path / "logits")], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits"), logits(folder), rtol=1e-3, atol=1e-3)
    assert done.kept == ("14 grids, value for value",)
    assert [note.partition(":")[0] for note in done.changed] == ["vLLM will not load this"], "q, k and v differ"


@pytest.mark.slow
def test_compressed_tensors_refuses_other_expressions_or_stores_them_dense(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    source = save_tiny("llama", tmp_path / "dense", dtype=torch.bfloat16, tie_word_embeddings=True)
    rules = [{"match": "*.v_proj", "steps": [GRID, SVD]}, {"match": "*", "steps": [GRID]}]
    recipe = {"version": 1, "rules": rules, "embeddings": [GRID]}
    folder = lc.compress(source, recipe, tmp_path / "out").folder
    with pytest.raises(
        InputError, match=r"embed_tokens does not fit compressed-tensors \(it is no plain linear layer\); allow dense"
    ):
        export(folder, tmp_path / "packed", "compressed-tensors")
    done = export(folder, tmp_path / "packed", "compressed-tensors", allow_dense=True)
    assert done.kept == ("12 grids, value for value",) and "3 matrices became bfloat16" in done.changed[0]
    subprocess.run([sys.executable, "-c", STOCK, str(tmp_path / "packed"), str(tmp_path / "logits")], check=True)
    found, expected = torch.load(tmp_path / "logits"), logits(folder)
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_checkpoint_of_save_pretrained_is_exported(tmp_path: Path) -> None:
    """It has no manifest; its weights are what counts."""
    source = save_tiny("llama", tmp_path / "dense", dtype=torch.bfloat16)
    folder = compressed(source, tmp_path / "out", [GRID])
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    export(tmp_path / "saved", tmp_path / "plain", "dense")
    expected = logits(folder)
    assert (logits(tmp_path / "plain") - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("rotate", [pytest.param(False, marks=pytest.mark.slow), True])
def test_peft_reads_base_and_adapter(rotate: bool, tmp_path: Path) -> None:
    from peft import PeftModel

    source = save_tiny("llama", tmp_path / "dense", tie_word_embeddings=True)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i}. The miller counts every sack of corn. " for i in range(80)))
    data = {"dataset": str(text), "samples": 8, "length": 32, "held_out": 2}
    table = [{"method": "rtn", "bits": 2, "group_size": 16}, SVD]  # whose term stays in the base
    steps = [*([{"method": "rotate"}] if rotate else []), {"method": "gptq", "bits": 2}, SVD]
    folder = compressed(source, tmp_path / "out", steps, calibration=data, embeddings=table)
    done = export(folder, tmp_path / "parts", "peft")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "parts" / "base", dtype=torch.float32)
    with torch.no_grad():
        without = base(IDS).logits
        found = PeftModel.from_pretrained(base, tmp_path / "parts" / "adapter")(IDS).logits
    expected = logits(folder)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (without - expected).norm() > 10 * (found - expected).norm(), "the adapter does nothing"
    assert "14 low-rank terms" in done.changed[0]


def test_export_refuses_impossible_formats(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense")
    folder = compressed(source, tmp_path / "out", [GRID])
    with pytest.raises(InputError, match="has no low-rank terms"):
        export(folder, tmp_path / "a", "peft")
    assert not (tmp_path / "a").exists()
    with pytest.raises(RecipeError, match="choose one of dense, compressed-tensors, peft"):
        export(folder, tmp_path / "a", "onnx")
    with pytest.raises(InputError, match="no model compressed by llmcompress"):
        export(source, tmp_path / "a", "dense")
    with pytest.raises(DiskError, match="exists already"):
        export(folder, source, "dense")
