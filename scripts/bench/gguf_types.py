"""Is a GGUF type better filled by our feedback than by llama.cpp's own quantizer? KL from the dense model, equal bytes.

    python scripts/bench/gguf_types.py --data DATA [TYPE ...]

All linears of SmolLM2 become one type (those that it does not fit, the type that llama.cpp takes instead), the rest
stays. Calibrated on WikiText-2 validation, as is the importance matrix of llama.cpp's quantizer; KL on the test split.
The package's SmolLM2 was stored as Q4_1, which flatters types of 4 bits; so its input channels are scaled first, by
random factors that its norms and the rows before take back: the same model, but no longer on a grid.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from rows import calibration
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmcompress as lc
from llmcompress.evaluate.distance import distance
from llmcompress.evaluate.perplexity import evaluation_windows
from llmcompress.export.formats import export
from llmcompress.methods.gguf import FORMS, fitting
from llmcompress.models.locate import locate

INPUTS = {  # linears of a block that read one input, and what is before it
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): "input_layernorm",
    ("mlp.gate_proj", "mlp.up_proj"): "post_attention_layernorm",
    ("mlp.down_proj",): "mlp.up_proj",
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="GGUF types (default: all)")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--samples", type=int, default=18, help="windows of calibration, of as many tokens")
    options = parser.parse_args()
    if unknown := set(options.types) - FORMS.keys():
        parser.error(f"{', '.join(sorted(unknown))} cannot be filled; choose among {', '.join(FORMS)}")
    source = locate("smollm2").folder
    dense: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    scale_channels(dense)
    text = calibration(options.data) | {"samples": options.samples, "length": options.length}
    energy = energies(dense, calibration_tokens(options.data, tokenizer, text))
    protocol = lc.Protocol(text=options.data / "wikitext2-test.raw", windows=options.windows, length=options.length)
    ids = evaluation_windows(tokenizer, protocol, dense.config)
    print("| type | matrices | MB | ours | llama.cpp | llama.cpp, importance matrix |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "dense"
        dense.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for kind in options.types or FORMS:
            recipe = {"version": 1, "calibration": text, "rules": [{"match": "*", "steps": [step(kind)]}]}
            made = lc.compress(str(folder), recipe, Path(place) / kind).folder
            kept = export(made, Path(place) / f"{kind}.gguf", "gguf").kept[0]
            ours: Any = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
            with lc.decoded(ours):
                found = [distance(dense, ours, ids)]
            del ours
            for importance in (None, energy):
                theirs, size = quantized(dense, kind, importance)
                found.append(distance(dense, theirs, ids))
                del theirs
            numbers = " | ".join(f"{each.kl:.5f} ± {each.kl_stderr or 0:.5f}" for each in found)
            print(f"| {kind} | {kept} | {size / 1e6:.1f} | {numbers} |", flush=True)


def step(kind: str) -> dict[str, Any]:
    """Return our step."""
    return {"method": "gguf", "type": kind}


def scale_channels(model: nn.Module) -> None:
    """Scale the inputs of linears by random factors, and what is before them by the inverse, in place."""
    random = torch.Generator().manual_seed(0)
    blocks: Any = model.get_submodule("model.layers")
    for block in blocks:
        for names, before in INPUTS.items():
            source = block.get_submodule(before).weight.data
            factors = (0.4 * torch.rand(len(source), generator=random) + 0.8).reshape(-1, *[1] * (source.dim() - 1))
            source.div_(factors)
            for name in names:
                block.get_submodule(name).weight.data.mul_(factors.flatten())


def calibration_tokens(data: Path, tokenizer: Any, text: dict[str, Any]) -> Tensor:
    """Return the windows of calibration."""
    words = (data / "wikitext2-valid.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(words, add_special_tokens=False)["input_ids"])
    return ids[: text["samples"] * text["length"]].reshape(text["samples"], text["length"])


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linears of the blocks."""
    layers = model.get_submodule("model.layers")
    return ((name, child) for name, child in layers.named_modules() if isinstance(child, nn.Linear))


@torch.no_grad()
def energies(model: Any, windows: Tensor) -> dict[str, Tensor]:
    """The mean square of each input channel of each linear: an importance matrix as llama.cpp computes it."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = found.get(name, torch.zeros(())) + inputs[0].square().flatten(0, 1).sum(0)

        return add

    handles = [child.register_forward_pre_hook(hook(name)) for name, child in linears(model)]
    for window in windows:
        model.model(window[None])
    for handle in handles:
        handle.remove()
    return {name: total / windows.numel() for name, total in found.items()}


def quantized(dense: Any, kind: str, importance: dict[str, Tensor] | None) -> tuple[Any, int]:
    """A copy of the model whose linears llama.cpp's quantizer has rounded, and their bytes."""
    model, size = copy.deepcopy(dense), 0
    for name, child in linears(model):
        matrix = None if importance is None else importance[name]
        written = quantize(child.weight.data, fitting(kind, child.in_features), matrix)  # type: ignore[arg-type]
        child.weight.data, count = written
        size += count
    return model, size


def quantize(weight: Tensor, kind: str, importance: Tensor | None = None) -> tuple[Tensor, int]:
    """Return `weight [out, in]` as llama.cpp's own quantizer rounds it, and its bytes."""
    number = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[number]
    rows, width = weight.shape
    source = np.ascontiguousarray(weight.numpy(), np.float32)
    written = np.zeros((rows, width // block * block_bytes), np.uint8)
    matrix = None if importance is None else np.ascontiguousarray(importance.numpy(), np.float32)
    count = engine().ggml_quantize_chunk(
        ctypes.c_int(number),
        source.ctypes.data_as(ctypes.c_void_p),
        written.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(0),
        ctypes.c_int64(rows),
        ctypes.c_int64(width),
        None if matrix is None else matrix.ctypes.data_as(ctypes.c_void_p),
    )
    if count != written.size:
        raise RuntimeError(f"llama.cpp wrote {count} bytes of {kind}, not {written.size}")
    return torch.from_numpy(gguf.quants.dequantize(written, number)), written.size


@cache
def engine() -> ctypes.CDLL:
    """The library inside the package xllamacpp, which has llama.cpp's quantizer."""
    import xllamacpp

    [path] = Path(str(xllamacpp.__file__)).parent.glob("xllamacpp*.so")
    found = ctypes.CDLL(str(path))
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    return found


if __name__ == "__main__":
    main()
