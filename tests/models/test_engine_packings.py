"""Folders of MLX and ExLlamaV3 are read as their engines compute, and what is wrong in them is one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import llmcompress as lc
from llmcompress.errors import InputError
from llmcompress.evaluation.protocol import Protocol
from llmcompress.formats.exl3 import pack_words
from llmcompress.models.dense.engine_packings import unpack_words
from llmcompress.models.dense.model import resolve
from llmcompress.models.files.compressed import CompressedCheckpoint
from llmcompress.weight.expression import dense
from llmcompress.weight.tiles import Codebook, matrix
from tests.builders import seeded
from tests.formats.test_exl3 import codes_of
from tests.tiny import save_tiny
from tests.weight.test_tiles import read

WEIGHTS = "model.safetensors"
MLX_SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "dtype": torch.float16,
    "num_hidden_layers": 3,
}
EXL3_SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4}
FORMS = [("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
FORMS += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
Q = "model.layers.0.self_attn.q_proj"
PLAIN = {"group_size": 64, "bits": 4}


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def by_mlx(folder: Path) -> dict[str, np.ndarray]:
    """Store linears as MLX quantizes them, one in each form; what it dequantizes them to, by name."""
    mx = pytest.importorskip("mlx.core")
    expected, tensors, entry = {}, load_file(folder / WEIGHTS), dict[str, Any](PLAIN)
    names = [name for name in tensors if name.endswith("_proj.weight")]
    for name, (mode, bits, group) in zip(names, FORMS, strict=True):
        settings = {"group_size": group, "bits": bits, "mode": mode}
        parts = mx.quantize(mx.array(tensors.pop(name).numpy()), **settings)
        expected[name] = np.array(mx.dequantize(*parts, **settings).astype(mx.float32))
        layer = name.removesuffix(".weight")
        for part, value in zip(("weight", "scales", "biases"), parts, strict=False):
            tensors[f"{layer}.{part}"] = torch.from_numpy(np.array(value))
        entry |= {layer: settings} if (mode, bits, group) != ("affine", 4, 64) else {}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    configure(folder, quantization=entry, quantization_config=entry)
    return expected


def test_mlx_is_read_as_mlx_dequantizes_it(tmp_path: Path) -> None:
    """Within the rounding to float16; MLX rounds each of two operations."""
    folder = save_tiny("llama", tmp_path / "mlx", **MLX_SIZES)
    expected = by_mlx(folder)
    source = resolve(folder)
    for name, numbers in expected.items():
        np.testing.assert_allclose(source.read(name).float(), numbers, rtol=1e-3, atol=2e-4, err_msg=name)
    assert "2 bits of MLX, 3 bits of MLX" in source.notes[0] and "nvfp4 of MLX: what rounds" in source.notes[0]
    assert not {"quantization", "quantization_config"} & {*source.config_entries(), *vars(source.config)}
    stored = load_file(folder / WEIGHTS).values()
    assert source.bytes == sum(tensor.numel() * tensor.element_size() for tensor in stored)


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_of_exl3_are_read_from_the_highest_bit_on(bits: int) -> None:
    codes = torch.randint(1 << bits, (2, 3, 256), generator=seeded(bits), dtype=torch.uint8)
    words = pack_words(codes, bits)
    assert torch.equal(unpack_words(words, bits), codes)
    assert np.array_equal(unpack_words(words, bits).numpy(), codes_of(words.numpy()))


def exported(tmp_path: Path, to: str) -> tuple[Path, Path]:
    """A checkpoint of ours, and its export to an engine."""
    source = save_tiny("llama", tmp_path / "dense", **(MLX_SIZES if to == "mlx" else EXL3_SIZES))
    forms = [{"bits": 4, "group_size": 64}, {"bits": 3, "group_size": 32}] if to == "mlx" else [{"bits": 1}]
    method = {"method": "rtn", "symmetric": False} if to == "mlx" else {"method": "exl3"}
    steps = [[method | form] for form in forms]
    rules = [
        {"match": "*.q_proj", "steps": steps[0]},
        {"match": "*.0.*" if to == "mlx" else "*.k_proj", "steps": steps[-1]},
    ]
    recipe = {"version": 1, "rules": rules, "embeddings": steps[0] if to == "mlx" else []}
    folder = lc.compress(source, recipe, tmp_path / "ours").folder
    lc.export(folder, tmp_path / to, to, allow_dense=True)
    return folder, tmp_path / to


@pytest.mark.parametrize("to", ["mlx", pytest.param("exl3", marks=pytest.mark.slow)])
def test_an_export_is_read_and_scored_as_ours(to: str, tmp_path: Path) -> None:
    """Within its rounding to float16."""
    ours, theirs = exported(tmp_path, to)
    opened, source = CompressedCheckpoint(ours), resolve(theirs)
    assert len(opened.layouts) == {"mlx": 11, "exl3": 4}[to]
    for layer in opened.layouts:
        found, expected = source.read(f"{layer}.weight").float(), dense(opened.expression(layer))
        assert (found - expected).norm() < 1e-3 * expected.norm(), layer
    rows = lc.compare([ours, theirs, tmp_path / "dense"], Protocol(windows=2, length=32))["models"]
    assert rows[1]["kl"] < 1e-3 * rows[2]["kl"]
    assert rows[1]["bytes"] == sum(path.stat().st_size for path in theirs.glob("*.safetensors"))


def test_exl3_is_read_as_an_independent_reader_does(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "exl3", **EXL3_SIZES, num_hidden_layers=1, dtype=torch.float16)
    random = seeded(3)
    words = torch.randint(-(1 << 15), 1 << 15, (8, 8, 48), generator=random, dtype=torch.int16)
    suh, svh = (0.1 * torch.randn(128, generator=random).half() for _ in range(2))
    parts = {f"{Q}.trellis": words, f"{Q}.suh": suh, f"{Q}.svh": svh, f"{Q}.mul1": torch.tensor(1, dtype=torch.int32)}
    change(folder, lambda tensors: (tensors.pop(f"{Q}.weight"), tensors.update(parts)))
    configure(folder, quantization_config={"quant_method": "exl3", "bits": 3.0})
    expected = read(codes_of(words.numpy()), 3, suh.double().numpy(), svh.double().numpy())
    np.testing.assert_allclose(resolve(folder).read(f"{Q}.weight").float(), expected, rtol=1e-3, atol=1e-6)
    codebooks: dict[Codebook, Callable[[dict[str, Tensor]], Any]] = {
        "3inst": lambda tensors: tensors.pop(f"{Q}.mul1"),
        "mcg": lambda tensors: tensors.update({f"{Q}.mcg": torch.tensor(1, dtype=torch.int32)}),
    }
    for codebook, edit in codebooks.items():
        change(folder, edit)
        expected = matrix(unpack_words(words, 3), 3, suh, svh, codebook).numpy()
        np.testing.assert_allclose(resolve(folder).read(f"{Q}.weight").float(), expected, rtol=1e-3, atol=1e-6)
    change(folder, lambda tensors: tensors.__setitem__(f"{Q}.trellis", words[..., :40].contiguous()))
    with pytest.raises(InputError, match="are no matrices in EXL3"):
        resolve(folder)
    change(folder, lambda tensors: tensors.pop(f"{Q}.svh"))
    with pytest.raises(InputError, match="holds .*q_proj without svh, its factors; download"):
        resolve(folder)


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no biases": (lambda t: t.pop(f"{Q}.biases"), "holds .*q_proj without its biases; download"),
    "no scales": (lambda t: t.pop(f"{Q}.scales"), r"has shape \[128, 16\] where the config requires"),
    "scales of another shape": (
        lambda t: t.update({f"{Q}.scales": torch.ones(128, 3)}),
        "no matrices in 4 bits of MLX",
    ),
    "scales of integers": (lambda t: t.update({f"{Q}.scales": torch.ones(128, 2, dtype=torch.uint8)}), "no matrices"),
    "codes of another dtype": (lambda t: t.update({f"{Q}.weight": torch.ones(128, 16)}), "no matrices in 4 bits"),
    "experts in a stack": (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][None].clone()}), "no matrices in"),
    "fewer rows": (
        lambda t: t.update({f"{Q}.{name}": t[f"{Q}.{name}"][:64].clone() for name in ("weight", "scales", "biases")}),
        r"has shape \[64, 128\] where the config requires \[128, 128\]",
    ),
}
SETTINGS: list[tuple[dict[str, Any], str]] = [
    (PLAIN | {"bits": 7}, "7 bits in groups of 64, mode 'affine', which MLX lacks; correct quantization"),
    (PLAIN | {"group_size": 1 << 70}, "which MLX lacks"),
    (PLAIN | {"bits": "four"}, "four bits in groups of 64"),
    (PLAIN | {"bits": 4.0}, "4.0 bits in groups"),
    (PLAIN | {"mode": ["affine"]}, "which MLX lacks"),
    (PLAIN | {"mode": "mxfp4"}, "4 bits in groups of 64, mode 'mxfp4'"),
    (PLAIN | {Q: {"group_size": 64, "bits": None}}, "None bits"),
    (PLAIN | {"bits": 8}, "no matrices in 8 bits of MLX"),
    ({"bits": 4}, "has shape"),
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("llama", tmp_path_factory.mktemp("packed"), **MLX_SIZES | {"num_hidden_layers": 1})
    words, values = torch.ones(128, 16, dtype=torch.int32).view(torch.uint32), torch.ones(128, 2).half()
    parts = {f"{Q}.weight": words, f"{Q}.scales": values, f"{Q}.biases": values.clone()}
    change(folder, lambda tensors: tensors.update(parts))
    configure(folder, quantization=PLAIN)
    resolve(folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_mlx_is_refused_in_one_sentence(packed: Path, damage: str, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "bad")
    edit, sentence = DAMAGES[damage]
    change(tmp_path / "bad", edit)
    with pytest.raises(InputError, match=sentence) as caught:
        resolve(tmp_path / "bad")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("settings", "sentence"), SETTINGS)
def test_unknown_forms_of_mlx_are_refused_in_one_sentence(
    packed: Path, settings: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    shutil.copytree(packed, tmp_path / "bad")
    configure(tmp_path / "bad", quantization=settings)
    with pytest.raises(InputError, match=sentence) as caught:
        resolve(tmp_path / "bad")
    assert "\n" not in str(caught.value)
