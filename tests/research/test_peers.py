"""The benchmark of peers: bits by hand, llama.cpp's choice of types, and the folder that every tool hands over."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
import score
import torch
from bitsandbytes_nf4 import bits
from handover import WEIGHTS, decoder_linears, grouped_bits, hand_over, loaded
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmcompress.methods.grids.gguf import fitting
from llmcompress.pipeline.frontier_inputs import read_peers
from tests.tiny import save_tiny

pytest.importorskip("gguf", reason="needs the package gguf (extra `export`)")
import gguf
from llama_quantizer import choose_type, measure_importance  # imports gguf

SHAPES = {  # of one block of SmolLM2-135M: rows, columns
    "q_proj": (576, 576),
    "k_proj": (192, 576),
    "v_proj": (192, 576),
    "o_proj": (576, 576),
    "gate_proj": (1536, 576),
    "up_proj": (1536, 576),
    "down_proj": (576, 1536),
}


def given_for(folder: Path) -> argparse.Namespace:
    save_tiny("llama", folder / "dense")
    return argparse.Namespace(model=folder / "dense", out=folder / "out", arm="arm", threads=torch.get_num_threads())


def test_bits_of_groups_by_hand() -> None:
    """3 rows of 10 columns: 30 codes of 2 bits, and in each row groups of 4, 4 and 2 with 18 bits beside them."""
    assert grouped_bits([torch.zeros(3, 10)], 2, 4, 18) == 30 * 2 + 3 * 3 * 18
    assert grouped_bits([torch.zeros(1, 64), torch.zeros(2, 64)], 2, 64, 18) / 192 == 2.28125


@pytest.mark.parametrize("shape", [(3, 10), (96, 192), (40, 1024)])
def test_bits_of_nf4_are_those_that_bitsandbytes_holds(shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="an extra")
    codes, state = functional.quantize_4bit(
        torch.randn(shape), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    held = (codes, state.absmax, state.state2.absmax, state.offset)
    assert bits(math.prod(shape), 64) == sum(8 * part.nbytes for part in held)


@pytest.mark.parametrize(
    ("arm", "kept", "early"), [("IQ1_S", 1.5625, 2.625), ("IQ2_XXS", 2.0625, 2.625), ("Q2_K", 3.4375, 3.4375)]
)
def test_llama_cpp_falls_back_where_blocks_do_not_divide(arm: str, kept: float, early: float) -> None:
    """All but down_proj, a quarter of the weights, is at 4.5 bits; of 30 blocks the first three are the early ones."""
    size = weights = 0.0
    for block in range(30):
        for linear, (rows, columns) in SHAPES.items():
            kind = fitting(choose_type(arm, linear.rpartition(".")[2], block, 30, 3), columns)
            values, size_of_block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
            size += rows * columns / values * size_of_block * 8
            weights += rows * columns
    assert weights == 106_168_320
    assert math.isclose(size / weights, 0.75 * 4.5 + 0.25 * (0.9 * kept + 0.1 * early))


def test_importance_is_the_mean_square_of_inputs(tmp_path: Path) -> None:
    """Of the first block's q_proj: what its norm gives for the embedded tokens."""
    given = given_for(tmp_path)
    model, ids = loaded(given, "float32"), torch.arange(48).reshape(3, 16)
    inputs = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    found = measure_importance(model, ids)
    assert found.keys() == decoder_linears(model).keys()
    torch.testing.assert_close(found["model.layers.0.self_attn.q_proj"], inputs.square().mean((0, 1)).detach())


def test_folder_holds_these_weights_and_else_the_model(tmp_path: Path) -> None:
    given = given_for(tmp_path)
    linears = decoder_linears(loaded(given, "bfloat16"))
    weights = {name: torch.randn_like(part.weight, dtype=torch.float32) for name, part in linears.items()}
    hand_over(given, "tool", ("safetensors",), weights, {"bits": 1000})
    again = AutoModelForCausalLM.from_pretrained(given.out)
    assert again.dtype == torch.float32
    dense = load_file(given.model / WEIGHTS)
    for name, value in again.named_parameters():
        expected = weights.get(name.removesuffix(".weight"), dense.get(name))
        assert torch.equal(value, expected), name
    report = json.loads((given.out / "peer.json").read_text(encoding="utf-8"))
    assert report["bpw"] == 1000 / sum(weight.numel() for weight in weights.values())
    with pytest.raises(ValueError, match="not exactly the decoder's linears"):
        hand_over(given, "tool", (), dict(list(weights.items())[1:]), {"bits": 1000})


def test_scales_moved_into_norms_are_handed_over(tmp_path: Path) -> None:
    """A norm divided by what the linears behind it are multiplied by leaves the logits; the linears alone do not."""
    given = given_for(tmp_path)
    model = loaded(given, "float32")
    ids = torch.arange(16)[None]
    expected, weights, norms = model(ids).logits, {n: p.weight for n, p in decoder_linears(model).items()}, {}
    for number, block in enumerate(model.model.layers):
        scales = torch.rand(block.input_layernorm.weight.shape) + 0.5
        norms[f"model.layers.{number}.input_layernorm.weight"] = block.input_layernorm.weight / scales
        for name in (f"model.layers.{number}.self_attn.{kind}_proj" for kind in "qkv"):
            weights[name] = weights[name] * scales
    hand_over(given, "tool", (), weights, {"bits": 1000}, norms)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(given.out)(ids).logits, expected)
    hand_over(given, "tool", (), weights, {"bits": 1000})
    assert not torch.allclose(AutoModelForCausalLM.from_pretrained(given.out)(ids).logits, expected, atol=1e-3)
    with pytest.raises(ValueError, match=r"no model\.norm\.bias of this shape"):
        hand_over(given, "tool", (), weights, {"bits": 1000}, {"model.norm.bias": torch.zeros(3)})


def test_points_are_those_that_a_sweep_draws(tmp_path: Path) -> None:
    """Bytes are of the whole model: the linears' as the tool has them, all else as it is stored."""
    given = given_for(tmp_path)
    rest = sum(
        tensor.nbytes for name, tensor in load_file(given.model / WEIGHTS).items() if not name.endswith("_proj.weight")
    )
    row = {"tool": "tool", "arm": "arm", "bpw": 2.5, "bytes": 1000.0, "perplexity": 30.0, "blimp": 0.6}
    found = score.points([row, row | {"tool": "dense"}], str(given.model))
    file = tmp_path / "peers.json"
    file.write_text(json.dumps({"peers": found}), encoding="utf-8")
    (peer,) = read_peers(file, "bytes")
    assert (peer.name, peer.bpw, peer.bytes) == ("tool arm", 2.5, 1000 + rest)
