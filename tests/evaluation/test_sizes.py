"""The size of a model is that of its files, and its bits those that they hold for its linears, whoever wrote them."""

from __future__ import annotations

import json
import shutil
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import llmcompress as lc
from llmcompress.evaluation.score import Size, size_of
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.model import resolve
from llmcompress.weight.modules import CompressedLinear
from tests.formats.gguf_files import BYTE, compressed, tiny_llama
from tests.models import test_structure as structure
from tests.tiny import save_tiny
from tests.zoo import save_zoo

pytestmark = pytest.mark.filterwarnings("ignore")
GRID = {"method": "rtn", "bits": 4, "group_size": 32, "narrow_range": True}
RECIPE = {"version": 1, "rules": [{"match": "*", "steps": [GRID]}]}
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def size(folder: Path) -> Size:
    return size_of(locate(folder))


def file_bytes(*folders: Path) -> int:
    return sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))


def stored_bits(folder: Path, *parts: str) -> int:
    """The bits of all tensors of a folder with one of `parts` in their names."""
    tensors = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    found = [value for name, value in tensors.items() if any(part in name for part in parts)]
    return 8 * sum(value.numel() * value.element_size() for value in found)


def weights(model: nn.Module) -> int:
    """The weights of the linears of a model but for its head."""
    parts = [part for name, part in model.named_modules() if name.endswith("_proj")]
    return sum(prod(part.layout.size) if isinstance(part, CompressedLinear) else part.weight.numel() for part in parts)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


# --- of other tools -------------------------------------------------------------------------------------------------


def test_experts_count_under_the_names_of_the_hub(tmp_path: Path) -> None:
    """`block_sparse_moe.experts.0.w1` in the file, `mlp.experts.gate_up_proj` in transformers."""
    dense = save_zoo("mixtral", tmp_path / "dense", hidden_size=128, head_dim=32, intermediate_size=128)
    lc.compress(dense, RECIPE, tmp_path / "ours")
    lc.export(tmp_path / "ours", tmp_path / "out", "compressed-tensors")
    tensors, found = load_file(dense / "model.safetensors"), size(tmp_path / "out")
    count = sum(value.numel() for name, value in tensors.items() if ".experts." in name or "_proj" in name)
    assert found.bytes == file_bytes(tmp_path / "out")
    assert found.bpw == stored_bits(tmp_path / "out", ".experts.", "_proj") / count > 4


def adapted(dense: Path, base: Path, to: Path) -> Path:
    """Write a LoRA of a `dense` model that names `base`."""
    get_peft_model(load(dense), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(to)
    config = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    return to


def test_an_adapter_counts_beside_a_base_in_few_bits(tmp_path: Path) -> None:
    dense, base = save_tiny("llama", tmp_path / "dense", **SIZES), tmp_path / "nf4"
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=asked).save_pretrained(base)
    lora = adapted(dense, base, tmp_path / "lora")
    alone, both = size(base), size(lora)
    assert both.bytes == file_bytes(base, lora) > alone.bytes == file_bytes(base)
    assert alone.bpw == stored_bits(base, "_proj") / weights(load(dense))
    assert both.bpw == (stored_bits(base, "_proj") + stored_bits(lora, "lora_")) / weights(load(dense))


def test_a_gguf_file_counts_as_it_is_stored_wherever_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a model, as one that was opened, and as the base of an adapter."""
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "cache"))
    dense = tiny_llama(tmp_path / "dense", dtype=torch.bfloat16)
    lc.export(compressed(dense, tmp_path / "small", ("*_proj", [BYTE])), tmp_path / "gguf", "gguf")
    file = tmp_path / "gguf" / "model.gguf"
    alone, lora = size(file), adapted(dense, file, tmp_path / "lora")
    assert alone == size_of(resolve(file).place) == size(tmp_path / "gguf") and alone.bytes == file.stat().st_size
    both, base = size(lora), alone.bpw
    assert base == 8.5 and both.bytes == alone.bytes + file_bytes(lora)
    assert both.bpw == base + stored_bits(lora, "lora_") / weights(load(dense))


# --- ours, saved again ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sizes")
    return lc.compress(save_tiny("llama", place / "dense", **SIZES), RECIPE, place / "small").folder


def test_a_report_counts_for_its_own_weights(small: Path, tmp_path: Path) -> None:
    report = lc.read(small)
    assert size(small) == Size(report.bytes, report.bpw, report.model_bpw)
    own = Path(shutil.copytree(small, tmp_path / "own"))
    load(own).dequantize().save_pretrained(own)
    assert (own / "report.json").is_file() and file_bytes(own) > size(own).bytes > report.bytes
    assert size(own).bpw == 32


def test_a_folded_model_counts_with_its_terms(small: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(small, tmp_path / "own"))
    model: Any = get_peft_model(load(own), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data.normal_()
    lc.fold(model).save_pretrained(own)
    found = size(own)
    assert found.bytes == file_bytes(own) > lc.read(small).bytes
    assert found.bpw == stored_bits(own, "_proj") / weights(load(own)) > lc.read(small).bpw


def test_widths_of_their_own_count(tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense")
    model = lc.compress(dense, structure.RECIPE, tmp_path / "out").model
    folder = structure.save(model, structure.narrow(model), tmp_path / "narrow")
    found = size(folder)
    assert found.bpw == stored_bits(folder, "_proj") / weights(load(folder))
    assert found.bytes == file_bytes(folder) and found.model_bpw == found.bytes * 8 / load(folder).num_parameters()


def test_what_blocks_have_in_common_counts_once(tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense", num_hidden_layers=4, dtype="float32")
    done = lc.compress(dense, {"version": 1, "tie": {"blocks": 2}}, tmp_path / "out")
    load(done.folder).save_pretrained(tmp_path / "again")
    found = size(tmp_path / "again")
    assert found.bpw == stored_bits(tmp_path / "again", "_proj") / weights(load(dense)) == done.report.bpw
