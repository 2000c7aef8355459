"""Exports to MLX, read by numpy as its documentation describes the packing, and by MLX itself where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as torch_file
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import llmcompress as lc
from llmcompress.errors import InputError
from llmcompress.formats.engine_configs import MLX
from llmcompress.formats.export import export
from llmcompress.models.dense.model import resolve
from llmcompress.models.files.compressed import CompressedCheckpoint
from llmcompress.models.files.file_names import RECIPE
from llmcompress.pipeline.engines import compress_for, plan_for
from llmcompress.recipe.read import read_recipe
from llmcompress.weight.expression import dense
from tests.formats.test_gguf_families import CASES, GEMMA, LINEAR, PLAIN, YARN, every
from tests.tiers import tier_of
from tests.tiny import save_tiny

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2, "dtype": torch.bfloat16}
FORMS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {  # by layer: step, group and bits of MLX
    "*.0.*.q_proj": ({"method": "rtn", "bits": 1}, (64, 1)),
    "*.0.*.k_proj": ({"method": "rtn", "bits": "ternary", "group_size": 32}, (32, 2)),
    "*.0.*.v_proj": ({"method": "rtn", "bits": 2, "group_size": 64}, (64, 2)),
    "*.0.*.o_proj": ({"method": "rtn", "bits": 3, "group_size": 32, "symmetric": False}, (32, 3)),
    "*.0.*.gate_proj": ({"method": "rtn", "bits": 5}, (64, 5)),
    "*.0.*.up_proj": ({"method": "rtn", "bits": 6, "symmetric": False}, (64, 6)),
    "*.0.*.down_proj": ({"method": "rtn", "bits": 7, "group_size": 32}, (32, 8)),
    "*.1.*.q_proj": ({"method": "mxfp", "format": "mxfp4"}, (32, 4)),
    "*.1.*.k_proj": ({"method": "mxfp", "format": "mxfp8"}, (32, 8)),
    "*": ({"method": "rtn", "bits": 4, "group_size": 32}, (32, 4)),
}
EXACT = ("0.self_attn.q_proj", "0.self_attn.k_proj", "1.self_attn.q_proj", "1.self_attn.k_proj")
IDS = torch.arange(30)[None] * 7 % 256


def compressed(tmp_path: Path, family: str = "llama", tied: bool = True, **more: Any) -> Path:
    """A model with one layer of each kind of grid that MLX has, and a 4-bit table."""
    window = {"sliding_window": 64} if family in ("gemma2", "mistral") else {}  # mlx-lm sees every position
    source = save_tiny(family, tmp_path / "dense", tie_word_embeddings=tied, **SIZES | window | more)
    rules = [{"match": name, "steps": [step]} for name, (step, _) in FORMS.items()]
    recipe = {"version": 1, "rules": rules, "embeddings": [{"method": "rtn", "bits": 4, "group_size": 32}]}
    return lc.compress(source, recipe, tmp_path / "out").folder


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # as the specification lists them; then the negative ones


def e4m3(codes: np.ndarray) -> np.ndarray:
    """The numbers of MXFP8."""
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.where(exponent, 2.0 ** (exponent - 7) * (1 + mantissa / 8), 2.0**-6 * mantissa / 8)
    return np.where(codes >> 7, -size, size)


def decoded(tensors: dict[str, np.ndarray], layer: str, form: dict[str, Any]) -> np.ndarray:
    """A matrix in float64: codes lie in their row's words from the lowest bit up, across the words' borders."""
    words, bits = tensors[f"{layer}.weight"], form["bits"]
    assert words.dtype == np.dtype("<u4")
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    codes = (stream.reshape(len(words), -1, bits).astype(np.int64) << np.arange(bits)).sum(2)
    scales = tensors[f"{layer}.scales"].repeat(form["group_size"], 1)
    if "mode" not in form:
        return codes * scales.astype(float) + tensors[f"{layer}.biases"].repeat(form["group_size"], 1).astype(float)
    numbers = np.concatenate([E2M1, -E2M1])[codes] if form["mode"] == "mxfp4" else e4m3(codes)
    return numbers * 2.0 ** (scales.astype(int) - 127)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_plan_has_the_size_of_the_files(family: str, tmp_path: Path) -> None:
    """For every form of a matrix, and never less, also where dense tensors stay as they are."""
    folder = compressed(tmp_path, family, dtype=torch.float32)
    planned = plan_for("mlx", tmp_path / "dense", read_recipe(folder / RECIPE))
    written = export(folder, tmp_path / "mlx", "mlx").bytes_after
    assert written <= planned.bytes <= 1.03 * written
    bits = {row.name: row.bits for row in planned.layers}
    for path in (tmp_path / "mlx").glob("model*.safetensors"):
        tensors = load_file(path)
        for name in bits:
            parts = [
                tensors[f"{name}.{part}"] for part in ("weight", "scales", "biases") if f"{name}.{part}" in tensors
            ]
            assert bits[name] == 8 * sum(part.nbytes for part in parts)


@pytest.mark.slow
def test_bits_are_chosen_up_to_a_size(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense", tie_word_embeddings=False, **SIZES)
    text = {"dataset": "builtin", "samples": 6, "length": 32, "held_out": 2}
    recipe = read_recipe({"version": 1, "calibration": text, "target": {"bytes": 90_000}})
    report = compress_for("mlx", source, recipe, tmp_path / "out").report
    assert 0.97 * 90_000 <= report.bytes <= 90_000
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    bits = {entry["bits"]} | {form["bits"] for form in entry.values() if isinstance(form, dict)}
    assert len(bits) > 1 and bits <= {2, 3, 4, 5, 6, 8}


def test_every_grid_is_read_by_the_documented_packing(tmp_path: Path) -> None:
    folder = compressed(tmp_path)
    done = export(folder, tmp_path / "mlx", "mlx")
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float16"
    forms = config["quantization"]
    tensors: dict[str, np.ndarray] = {}
    for path in (tmp_path / "mlx").glob("model*.safetensors"):
        tensors |= load_file(path)
    common = {key: value for key, value in forms.items() if not isinstance(value, dict)}
    assert common == {"group_size": 32, "bits": 4}
    opened = CompressedCheckpoint(folder)
    assert "model.embed_tokens" in opened.layouts
    for layer in opened.layouts:
        expected = dense(opened.expression(layer)).numpy()
        found = decoded(tensors, layer, forms.get(layer, common))
        distance = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert distance < 1e-3
        assert distance == 0 or not layer.endswith(EXACT), layer
    for name, (_, (group, bits)) in list(FORMS.items())[:-1]:
        [layer] = [layer for layer in forms if layer.endswith(name.rpartition(".")[2]) and f".{name[2]}." in layer]
        assert (forms[layer]["group_size"], forms[layer]["bits"]) == (group, bits)
    assert done.kept == ("15 matrices, codes and scales as they are",)
    assert "moves a matrix by at most" in done.changed[0] and "became float16" in done.changed[1]
    assert not [name for name, tensor in tensors.items() if tensor.dtype not in (np.float16, np.uint32, np.uint8)]


def test_mlx_refuses_other_expressions_or_stores_them_dense(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense", **SIZES)
    steps = [{"method": "rtn", "bits": 4, "group_size": 16}]
    folder = lc.compress(source, {"version": 1, "rules": [{"match": "*", "steps": steps}]}, tmp_path / "out").folder
    with pytest.raises(InputError, match="does not fit MLX .*which 16 of 96 columns do not fill.*; allow dense"):
        export(folder, tmp_path / "mlx", "mlx")
    assert not (tmp_path / "mlx").exists()
    done = export(folder, tmp_path / "mlx", "mlx", allow_dense=True)
    assert "14 matrices became float16" in done.changed[0]
    with torch.no_grad():
        found, expected = (
            AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)(IDS).logits
            for place in (tmp_path / "mlx", folder)
        )
    assert (found - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize(
    "family, tied",
    [
        ("llama", True),
        pytest.param("llama", False, marks=pytest.mark.slow),
        pytest.param("qwen3", True, marks=pytest.mark.slow),
        pytest.param("gemma2", True, marks=pytest.mark.slow),
        ("mistral", False),
    ],
)
def test_mlx_computes_our_logits(family: str, tied: bool, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    load_model = pytest.importorskip("mlx_lm.utils").load_model
    folder = compressed(tmp_path, family, tied)
    export(folder, tmp_path / "mlx", "mlx")
    model, _ = load_model(tmp_path / "mlx")
    table = model.model.embed_tokens
    numbers = mx.dequantize(table.weight, table.scales, table.biases, table.group_size, table.bits)
    expected = dense(CompressedCheckpoint(folder).expression("model.embed_tokens")).numpy()
    assert np.linalg.norm(np.array(numbers) - expected) < 1e-3 * np.linalg.norm(expected)
    found = np.array(model(mx.array(IDS.numpy())).astype(mx.float32))
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits.numpy()
        read = resolve(tmp_path / "mlx").load()(IDS).logits.numpy()
    assert np.linalg.norm(found - ours) < 5e-3 * np.linalg.norm(ours)
    assert np.linalg.norm(found - read) < 5e-3 * np.linalg.norm(read), "what eval scores"


def test_gemma_computes_beyond_float16(tmp_path: Path) -> None:
    """Its activations are beyond 65,504, as those of the real ones."""
    mx = pytest.importorskip("mlx.core")
    load_model = pytest.importorskip("mlx_lm.utils").load_model
    path = save_tiny("gemma2", tmp_path / "dense", sliding_window=64, **SIZES) / "model.safetensors"
    tensors = torch_file(path)
    norms = [name for name in tensors if "post_feedforward_layernorm" in name]
    save_file(tensors | {name: torch.full_like(tensors[name], 60000) for name in norms}, path, {"format": "pt"})
    step = {"method": "rtn", "bits": 4, "group_size": 32}
    recipe = {"version": 1, "rules": [{"match": "*", "steps": [step]}], "embeddings": [step]}
    folder = lc.compress(path.parent, recipe, tmp_path / "out").folder
    export(folder, tmp_path / "mlx", "mlx")
    model, _ = load_model(tmp_path / "mlx")
    found = np.array(model(mx.array(IDS.numpy())).astype(mx.float32))
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits.numpy()
    assert np.linalg.norm(found - ours) < 5e-3 * np.linalg.norm(ours)


# --- configs --------------------------------------------------------------------------------------------------------

WINDOWS = {"sliding_attention": PLAIN | {"rope_theta": 100.0}, "full_attention": PLAIN}
FAMILY_SIZES: dict[str, dict[str, Any]] = {family: CASES[family][0] for family in MLX.families} | {
    "gemma2": GEMMA | every(2, 2) | {"sliding_window": 64},
    "gemma3_text": GEMMA | every(6, 6) | {"rope_parameters": WINDOWS},
    "smollm3": CASES["smollm3"][0] | every(4, 4) | {"no_rope_layers": [1, 0, 1, 1]},
}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROTARY: dict[str, dict[str, Any]] = {  # by type
    "default": {"rope_type": "default"},
    "linear": LINEAR,
    "llama3": LLAMA3 | {"original_max_position_embeddings": 16},
    "yarn": YARN | {"beta_fast": 4, "beta_slow": 0.5, "attention_factor": 1.5},
}


def changed_config(family: str, kind: str) -> dict[str, Any]:
    """Sizes of a family with other values of all that MLX reads, and rotary positions of a type."""
    sizes, row = FAMILY_SIZES[family], MLX.families[family]
    config, changes = AutoConfig.for_model(family, **sizes), dict(sizes)
    for entry in row.read.split():
        value = getattr(config, entry, None)
        if isinstance(value, bool):
            changes[entry] = not value
        elif isinstance(value, float):
            changes[entry] = 0.1 if "eps" in entry else value * 1.5
    plain = type(config)().rope_parameters
    rotary = ROTARY[kind] | {"rope_theta": 300.0}
    if "partial_rotary_factor" in row.entries:
        rotary |= {"partial_rotary_factor": 0.75}
    if "full_attention" in plain:
        theta = 100.0 if "rope_local_base_freq" in row.entries else 300.0
        rotary = {"full_attention": rotary, "sliding_attention": PLAIN | {"rope_theta": theta}}
    return changes | {"rope_parameters": rotary}


READ = [(family, kind) for family, row in MLX.families.items() for kind in ("default", *row.scaling)]


@pytest.mark.parametrize(
    "family, kind",
    [pytest.param(*case, id=" ".join(case), marks=tier_of(number % 2 == 0)) for number, case in enumerate(READ)],
)
def test_mlx_reads_every_listed_entry(family: str, kind: str, tmp_path: Path) -> None:
    """Each has another value than its default."""
    mx = pytest.importorskip("mlx.core")
    load_model = pytest.importorskip("mlx_lm.utils").load_model
    source = save_tiny(family, tmp_path / "dense", **changed_config(family, kind))
    rules = [{"match": "*.0.*", "steps": [{"method": "rtn", "bits": 8, "group_size": 32}]}]
    export(lc.compress(source, {"version": 1, "rules": rules}, tmp_path / "out").folder, tmp_path / "mlx", "mlx")
    model, _ = load_model(tmp_path / "mlx")
    found = np.array(model(mx.array(IDS.numpy())).astype(mx.float32))
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(IDS).logits.numpy()
    assert np.linalg.norm(found - ours) < 4e-2 * np.linalg.norm(ours), "float16 moves them by 2 % at most"
    again, before = (AutoConfig.from_pretrained(tmp_path / place).rope_parameters for place in ("mlx", "out"))
    assert before.items() <= again.items() or "full_attention" in before
