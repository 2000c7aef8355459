"""Floats in compressed-tensors: its own library, which vLLM reads with, must find exactly what we store."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmcompress as lc
from llmcompress.errors import InputError
from llmcompress.formats.compressed_tensors import pack_matrix, shared_factors
from llmcompress.formats.engine_files import UnfitError
from llmcompress.formats.export import export
from llmcompress.methods.solvers.floats import LAYOUTS, nearest_floats
from llmcompress.models.dense.model import resolve
from llmcompress.models.files.compressed import CompressedCheckpoint
from llmcompress.models.files.reading import read_json
from llmcompress.weight.expression import dense
from llmcompress.weight.modules import compressed_linears
from llmcompress.weight.nodes import Minifloat
from llmcompress.weight.runtime_formats import compressed_tensors_obstacle
from tests.builders import compressed, correlated, gaussian, minifloat
from tests.tiny import save_tiny
from tests.zoo import save_zoo

compressors = pytest.importorskip("compressed_tensors.compressors")
HELD = ("fp8", "fp8_tensor", "mxfp8", "mxfp4", "nvfp4")
IDS = torch.arange(30)[None] * 7 % 256
STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
assert "llmcompress" not in sys.modules
torch.save(model(torch.arange(30)[None] * 7 % 256).logits, sys.argv[2])
"""


def decompressed(tensors: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
    """Return the matrix that the library makes of the tensors of a linear, as a group of a config describes it."""
    from compressed_tensors.quantization import QuantizationScheme

    found = compressors.BaseCompressor.get_value_from_registry(group["format"])
    scheme = QuantizationScheme.model_validate(group)
    assert set(tensors) == set(found.compression_param_names(scheme)), "it would look for others"
    value: Tensor = found.decompress(tensors, scheme)["weight"]
    return value


def as_group(w: Minifloat) -> Tensor:
    scheme, tensors = pack_matrix(w)
    return decompressed(tensors, {"targets": ["x"], "weights": scheme.to_json(), "format": scheme.format})


@pytest.mark.parametrize("name", HELD)
def test_compressed_tensors_decompresses_every_value(name: str) -> None:
    layout = LAYOUTS[name]  # type: ignore[index]
    fed = compressed(gaussian(24, 96), correlated(900, 96), {"method": "gptq", "format": name}).approx
    drawn = [minifloat((6, 64), layout.form, layout.scales, layout.group(64), seed, layout.of_all) for seed in range(3)]
    drawn = [w if w.tensor_scale is None else replace(w, tensor_scale=torch.tensor([2.0**-9])) for w in drawn]
    for w in (fed, *drawn, nearest_floats(torch.zeros(4, 32), layout)):
        assert isinstance(w, Minifloat) and compressed_tensors_obstacle(w) is None
        assert torch.equal(as_group(w), dense(w).bfloat16())


@pytest.mark.parametrize("name", HELD)
def test_pack_matrix_equals_the_library_compressor(name: str) -> None:
    """Its compressor, given our values and scales, stores the bytes that we store."""
    from compressed_tensors.quantization import QuantizationScheme

    w = nearest_floats(gaussian(8, 64), LAYOUTS[name])  # type: ignore[index]
    scheme, ours = pack_matrix(w)
    scales = {key: value.float() for key, value in ours.items() if "scale" in key}
    if name.startswith("mx"):
        scales["weight_scale"] = 2.0 ** (scales["weight_scale"] - 127)
    asked = QuantizationScheme(targets=["x"], weights=scheme.to_json())
    compressor = compressors.BaseCompressor.get_value_from_registry(scheme.format)
    theirs = compressor.compress({"weight": dense(w), **scales}, asked)
    for key in {"weight", "weight_packed"} & set(ours) | ({"weight_scale"} if "fp4" in name or "mx" in name else set()):
        assert theirs[key].dtype == ours[key].dtype
        assert torch.equal(theirs[key].view(torch.uint8), ours[key].view(torch.uint8))


def test_pack_matrix_says_why_a_matrix_does_not_fit() -> None:
    for w, why in (
        (minifloat((4, 64), "e2m3", "e8m0", 32, 0), "it has no e2m3 floats g32, scales e8m0"),
        (minifloat((4, 40), "e2m1", "e8m0", 32, 0), "groups of 32 do not divide the width 40"),
        (minifloat((4, 64), "e4m3", "bfloat16", 32, 0), "it has no e4m3 floats g32, scales bfloat16"),
    ):
        with pytest.raises(UnfitError, match=f"^{why}$"):
            pack_matrix(w)
    odd = minifloat((4, 64), "e2m1", "e4m3", 16, 0)  # under a factor of 0.3
    with pytest.raises(UnfitError, match="not exact under the factor"):
        pack_matrix(odd, odd.tensor_scale)


@pytest.mark.parametrize("symmetric", [True, False])
def test_error_for_eight_bits_names_the_option(symmetric: bool, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense")
    step = {"method": "rtn", "bits": 8, "symmetric": symmetric}
    rules = [{"match": "*", "steps": [step]}]
    folder = lc.compress(source, {"version": 1, "rules": rules}, tmp_path / "out").folder
    narrow = "narrow_range: true" if symmetric else "symmetric: true and narrow_range: true"
    wanted = rf"would need 9 bits, and 8 when it is compressed with {narrow}\); allow dense layers \(--allow-dense,"
    with pytest.raises(InputError, match=wanted):
        export(folder, tmp_path / "packed", "compressed-tensors")


RULES = [
    {"match": "*.q_proj", "steps": [{"method": "gptq", "format": "nvfp4"}]},
    {"match": "*.[kv]_proj", "steps": [{"method": "mxfp", "format": "nvfp4"}]},
    {"match": "*.o_proj", "steps": [{"method": "mxfp", "format": "fp8_tensor"}]},
    {"match": "*.gate_proj", "steps": [{"method": "mxfp", "format": "mxfp4"}]},
    {"match": "*.up_proj", "steps": [{"method": "rtn", "bits": 4, "group_size": 16}]},
    {"match": "*", "steps": [{"method": "gptq", "format": "fp8"}]},
]
WITH_INPUTS = [
    {
        "match": "*.[qkv]_proj",
        "steps": [{"method": "gptq", "format": "fp8"}],
        "inputs": {"format": "fp8", "scale": "tensor"},
    },
    {
        "match": "*.o_proj",
        "steps": [{"method": "rtn", "bits": 8, "narrow_range": True}],
        "inputs": {"format": "int8"},
    },
    {"match": "*.down_proj", "steps": [{"method": "mxfp", "format": "mxfp8"}], "inputs": {"format": "mxfp8"}},
    {"match": "*.*.0.*", "steps": [{"method": "mxfp", "format": "nvfp4"}], "inputs": {"format": "nvfp4"}},
    {
        "match": "*",
        "steps": [{"method": "gptq", "bits": 4, "group_size": 16, "narrow_range": True}],
        "inputs": {"format": "int8"},
    },
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a format for each of its linears; queries are so small that their factor is another."""
    return built(tmp_path_factory.mktemp("model"), RULES)


@pytest.fixture(scope="module")
def with_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model whose inputs have few bits, too."""
    return built(tmp_path_factory.mktemp("inputs"), WITH_INPUTS)


def built(place: Path, rules: list[dict[str, Any]]) -> Path:
    source = save_tiny("llama", place / "dense", dtype=torch.bfloat16, intermediate_size=64)
    model = AutoModelForCausalLM.from_pretrained(source)
    for block in model.model.layers:
        block.self_attn.q_proj.weight.data *= 0.1
    model.save_pretrained(source)
    text = place / "text.txt"
    text.write_text("".join(f"{i}. The miller counts every sack of corn. " for i in range(80)))
    data = {"dataset": str(text), "samples": 8, "length": 32, "held_out": 2}
    return lc.compress(source, {"version": 1, "rules": rules, "calibration": data}, place / "out").folder


def test_exported_floats_equal_ours(folder: Path, tmp_path: Path) -> None:
    done = export(folder, tmp_path / "out", "compressed-tensors")
    assert sorted(done.kept) == ["12 matrices of floats, value for value", "2 grids, value for value"]
    assert [note.partition(":")[0] for note in done.changed] == ["vLLM will not load this"]
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert config["format"] == "mixed-precision"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    opened, checked = CompressedCheckpoint(folder), 0
    for group in config["config_groups"].values():
        for name in group["targets"]:
            tensors = {key.removeprefix(f"{name}."): v for key, v in stored.items() if key.startswith(f"{name}.")}
            if group["format"] != "pack-quantized":
                assert torch.equal(decompressed(tensors, group), dense(opened.expression(name)).bfloat16()), name
                checked += 1
    assert checked == 12


def test_matrices_with_the_same_input_share_a_factor(folder: Path, tmp_path: Path) -> None:
    """As vLLM multiplies them as one, by the inverse of the largest number that is stored for them."""
    own = {float(w.tensor_scale) for part in "qkv" if (w := projection(folder, part)).tensor_scale is not None}
    assert len(own) > 1, "they had one factor before"
    export(folder, tmp_path / "out", "compressed-tensors")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    shared = {float(stored[f"model.layers.0.self_attn.{part}_proj.weight_global_scale"]) for part in "qkv"}
    assert shared == {1 / max(own)}


def projection(folder: Path, part: str) -> Minifloat:
    w = CompressedCheckpoint(folder).expression(f"model.layers.0.self_attn.{part}_proj")
    assert isinstance(w, Minifloat)
    return w


def test_pack_matrix_refuses_a_factor_too_far_away(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    w, factor = projection(folder, "q"), shared_factors(CompressedCheckpoint(folder))[name]
    pack_matrix(w, factor)
    with pytest.raises(UnfitError):  # scales of e4m3 do not go down that far
        pack_matrix(w, factor * 2.0**14)


def test_widths_that_groups_do_not_divide_are_refused_or_dense(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense", dtype=torch.bfloat16)
    steps = [{"method": "mxfp", "format": "mxfp4"}]
    folder = lc.compress(source, {"version": 1, "rules": [{"match": "*", "steps": steps}]}, tmp_path / "out").folder
    with pytest.raises(InputError, match=r"down_proj does not fit .* \(groups of 32 do not divide the width 48\)"):
        export(folder, tmp_path / "packed", "compressed-tensors")
    done = export(folder, tmp_path / "packed", "compressed-tensors", allow_dense=True)
    assert done.kept == ("12 matrices of floats, value for value",)
    assert done.changed == ("2 matrices became bfloat16, model.layers.0.mlp.down_proj first",)
    assert read_json(tmp_path / "packed" / "config.json")["quantization_config"]["format"] == "mxfp4-pack-quantized"


def test_a_compressed_head_is_refused_or_dense(tmp_path: Path) -> None:
    """The readers ignore it, and would make up another."""
    source = save_tiny("llama", tmp_path / "dense", dtype=torch.bfloat16)
    steps = [{"method": "mxfp", "format": "fp8"}]
    recipe = {"version": 1, "rules": [{"match": "*", "steps": steps}], "head": steps}
    folder = lc.compress(source, recipe, tmp_path / "out").folder
    with pytest.raises(InputError, match=r"lm_head does not fit compressed-tensors \(it is no plain linear layer\)"):
        export(folder, tmp_path / "packed", "compressed-tensors")
    done = export(folder, tmp_path / "packed", "compressed-tensors", allow_dense=True)
    assert done.changed == ("1 matrices became bfloat16, lm_head first",)
    assert "lm_head.weight" in load_file(tmp_path / "packed" / "model.safetensors")


def test_a_mamba_has_the_name_that_vllm_looks_up(tmp_path: Path) -> None:
    """`mixer`, in its Granite 4, and that of the files, in transformers."""
    from compressed_tensors.utils.match import match_name

    source = save_zoo("granite4", tmp_path / "dense")
    rules = [{"match": "*", "steps": [{"method": "rtn", "bits": 4, "group_size": 16}]}]
    folder = lc.compress(source, {"version": 1, "rules": rules}, tmp_path / "out").folder
    export(folder, tmp_path / "packed", "compressed-tensors")
    groups = read_json(tmp_path / "packed" / "config.json")["quantization_config"]["config_groups"]
    targets = [target for group in groups.values() for target in group["targets"]]
    for path in (f"model.layers.0.{name}.{leaf}" for name in ("mamba", "mixer") for leaf in ("in_proj", "out_proj")):
        assert sum(match_name(path, target) for target in targets) == 1, path
    name = "model.layers.0.mamba.in_proj"
    read, written = resolve(tmp_path / "packed").read(f"{name}.weight"), CompressedCheckpoint(folder).expression(name)
    torch.testing.assert_close(read.float(), dense(written), rtol=0.01, atol=1e-3)


def loaded(folder: Path) -> Any:
    """Return the model as transformers and the library load it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def test_linears_of_the_library_answer_as_ours(with_inputs: Path, tmp_path: Path) -> None:
    """They round inputs, and multiply, bit for bit; but for scales of integers, which they round to bfloat16."""
    done = export(with_inputs, tmp_path / "out", "compressed-tensors")
    assert sorted(done.kept) == ["10 matrices of floats, value for value", "4 grids, value for value"]
    theirs, ours = loaded(tmp_path / "out"), loaded(with_inputs)
    with torch.no_grad():
        theirs(IDS)
        for name, linear in compressed_linears(ours).items():
            x = 3 * torch.randn(2, 9, linear.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
            found, wanted = theirs.get_submodule(name)(x), linear(x)
            is_grid = linear.layout.header["node"] == "grid"
            assert (found - wanted).float().norm() <= (5e-3 if is_grid else 0) * wanted.float().norm(), name


def test_groups_of_the_config_say_what_inputs_become(with_inputs: Path, tmp_path: Path) -> None:
    export(with_inputs, tmp_path / "out", "compressed-tensors")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    groups = read_json(tmp_path / "out" / "config.json")["quantization_config"]["config_groups"].values()
    found = {(group["format"], group["input_activations"]["strategy"]) for group in groups}
    assert found == {
        ("float-quantized", "tensor"),
        ("int-quantized", "token"),
        ("mxfp8-quantized", "group"),
        ("nvfp4-pack-quantized", "tensor_group"),
    }
    shared = {float(stored[f"model.layers.0.self_attn.{part}_proj.input_scale"]) for part in "qkv"}
    assert len(shared) == 1 and "model.layers.0.mlp.up_proj.input_global_scale" in stored


@pytest.mark.slow
@pytest.mark.parametrize("which", ["folder", "with_inputs"])
def test_stock_transformers_computes_our_logits(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(which)
    export(folder, tmp_path / "out", "compressed-tensors")
    subprocess.run([sys.executable, "-c", STOCK, str(tmp_path / "out"), str(tmp_path / "logits")], check=True)
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(IDS).logits
    found = torch.load(tmp_path / "logits")
    # a rounded scale of integers moves numbers to others
    assert (found - ours).float().norm() < (0.01 if which == "folder" else 0.05) * ours.float().norm()
