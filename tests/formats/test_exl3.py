"""Exports to EXL3, read once more from their bits, in float64, and what cannot go there."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import llmcompress as lc
from llmcompress.errors import InputError
from llmcompress.formats.exl3 import Bits, pack_tiles, pack_words
from llmcompress.formats.export import export
from llmcompress.models.files.compressed import CompressedCheckpoint
from llmcompress.pipeline.engines import compress_for, plan_for
from llmcompress.recipe.read import read_recipe
from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import Tiles
from tests.builders import seeded
from tests.tiny import save_tiny
from tests.weight.test_tiles import read

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4, "num_hidden_layers": 1}
GRID = {"method": "rtn", "bits": 4}
IDS = torch.arange(30)[None] * 7 % 256


def codes_of(words: np.ndarray) -> np.ndarray:
    """The codes `[..., 256]` of a tensor `trellis`, as the kernels of ExLlamaV3 read it.

    Two words of 16 bits are one of 32, in little endian; of these, the highest bit is the first of the stream.
    """
    tiles, bits = words.shape[:2], words.shape[2] // 16
    pairs = words.view("<u4").reshape(*tiles, -1)
    found = np.empty((*tiles, 256), np.uint8)
    for place in np.ndindex(*tiles):
        stream = "".join(f"{word:032b}" for word in pairs[place].tolist())
        found[place] = [int(stream[at : at + bits], 2) for at in range(0, len(stream), bits)]
    return found


@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_words_starts_with_the_highest_bit(bits: int) -> None:
    codes = torch.randint(1 << bits, (10, 3, 256), generator=seeded(bits), dtype=torch.uint8)
    words = pack_words(codes, bits)
    assert words.dtype == torch.int16 and words.shape == (10, 3, 16 * bits)
    assert np.array_equal(codes_of(words.numpy()), codes.numpy())


def test_codes_of_a_packed_matrix_are_let_go() -> None:
    codes, factors = torch.zeros(8, 8, 256, dtype=torch.uint8), torch.ones(128, dtype=torch.float16)
    alive = weakref.ref(codes)
    form, tensors = pack_tiles("layer", Tiles(codes, factors, factors, 2))
    del codes
    assert alive() is None and form == Bits(128 * 128, 2) and tensors["trellis"].shape == (8, 8, 32)


@pytest.mark.slow
def test_exl3_file_decodes_to_our_weights_and_logits(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense", **SIZES)
    rules = [
        {"match": "*.q_proj", "steps": [GRID]},
        {"match": "*.v_proj", "steps": [{"method": "exl3", "bits": 3}]},
        {"match": "*", "steps": [{"method": "exl3"}]},
    ]
    folder = lc.compress(source, {"version": 1, "rules": rules}, tmp_path / "out").folder
    with pytest.raises(InputError, match="q_proj does not fit EXL3 .*, no tiles.; allow dense layers"):
        export(folder, tmp_path / "exl3", "exl3")
    done = export(folder, tmp_path / "exl3", "exl3", allow_dense=True)
    assert done.kept == ("6 matrices, value for value",) and "q_proj first" in done.changed[0]
    entry = json.loads((tmp_path / "exl3" / "config.json").read_text())["quantization_config"]
    assert entry == {"quant_method": "exl3", "bits": 2.17, "head_bits": 16, "codebook": "mul1"}
    tensors: dict[str, np.ndarray] = {}
    for path in (tmp_path / "exl3").glob("*.safetensors"):
        tensors |= load_file(path)
    opened = CompressedCheckpoint(folder)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, module in model.named_modules():
        if f"{name}.trellis" in tensors:
            assert tensors[f"{name}.mul1"].view(np.uint32) == 0x83DCD12D and tensors[f"{name}.mul1"].shape == ()
            words, bits = tensors[f"{name}.trellis"], 3 if name.endswith("v_proj") else 2
            found = read(codes_of(words), bits, *(tensors[f"{name}.{key}"].astype(float) for key in ("suh", "svh")))
            np.testing.assert_allclose(found, dense(opened.expression(name)).numpy(), rtol=1e-5, atol=1e-6)
            module.weight.data = torch.from_numpy(found).float()
        elif f"{name}.weight" in tensors:
            module.weight.data = torch.from_numpy(tensors[f"{name}.weight"]).float()
    with torch.no_grad():
        found, expected = (m(IDS).logits for m in (model, AutoModelForCausalLM.from_pretrained(folder)))
    assert (found - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.slow
def test_bits_are_chosen_up_to_a_size_of_the_files(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense", **SIZES | {"dtype": torch.float16})
    text = {"dataset": "builtin", "samples": 6, "length": 32, "held_out": 2}
    recipe = read_recipe({"version": 1, "calibration": text, "target": {"bpw": 3.6}})
    report = compress_for("exllamav3", source, recipe, tmp_path / "out").report
    assert report.bpw is not None and 3.3 < report.bpw <= 3.6
    planned = plan_for("exllamav3", source, read_recipe(tmp_path / "out" / "recipe.yaml"))
    assert report.bytes <= planned.bytes <= 1.03 * report.bytes and planned.bpw == report.bpw
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for row in report.layers:
        parts = [tensors[f"{row.name}.{part}"] for part in ("trellis", "suh", "svh", "mul1")]
        assert row.bpw * 128 * 128 == 8 * sum(part.nbytes for part in parts)
    assert len({row.stored for row in report.layers}) > 1 and all("bits EXL3" in row.stored for row in report.layers)


def test_exl3_refuses_a_checkpoint_without_tiles(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense")
    folder = lc.compress(source, {"version": 1, "rules": [{"match": "*", "steps": [GRID]}]}, tmp_path / "out").folder
    with pytest.raises(InputError, match="has no matrix of the method exl3; choose another"):
        export(folder, tmp_path / "exl3", "exl3", allow_dense=True)
