"""llama.cpp's own quantizer, importance matrix and mixtures, for the comparisons with ours.

The package xllamacpp calls no quantizer from Python, but its library exports ggml's, `ggml_quantize_chunk`, which
`llama-quantize` calls row by row. The importance of a column is the mean square of its inputs, dense, on the
calibration tokens, as `llama-imatrix` gathers it. The rules of mixtures are those of `src/llama-quant.cpp`, commit
007dbbf, for a dense model of a Llama's linears.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn

BASE = {"IQ2_M": "IQ2_S", "IQ3_M": "IQ3_S", "Q3_K_M": "Q3_K", "Q4_K_M": "Q4_K"}  # of a mixture not called as its type
VALUES = {  # where there are fewer than 4 heads to a key, and from there on
    "IQ1_S": ("Q2_K", "Q4_K"),
    "IQ2_XXS": ("Q2_K", "Q4_K"),
    "Q2_K": ("Q3_K", "Q4_K"),
    "IQ2_M": ("IQ3_S", "Q4_K"),
    "IQ3_M": ("Q4_K", "Q4_K"),
}
OUTPUTS = {"IQ1_S": "IQ2_XXS", "Q2_K": "Q3_K", "IQ2_M": "IQ3_S", "IQ3_M": "Q4_K", "Q3_K_M": "Q4_K"}
FIRST_DOWN = {"IQ1_S": "Q2_K", "IQ2_XXS": "Q2_K", "IQ2_M": "IQ3_S", "IQ3_M": "Q4_K"}  # in an eighth of the blocks
NEEDS_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS")  # it ends the process otherwise


def choose_type(mixture: str, leaf: str, block: int, blocks: int, heads: int) -> str:
    """Return the type of a linear before widths are looked at; a type is its own mixture.

    `leaf`: the last part of the linear's name. `heads`: of queries for one of keys.
    """
    first = block < blocks // 8
    more = first or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2
    base = BASE.get(mixture, mixture)
    match leaf, mixture:
        case "v_proj", "Q3_K_M":
            return "Q5_K" if block < 2 else "Q4_K"
        case (("v_proj" | "down_proj"), "Q4_K_M"):
            return "Q6_K" if more else base
        case "v_proj", _ if mixture in VALUES:
            return VALUES[mixture][heads >= 4]
        case "down_proj", "Q2_K":
            return "Q3_K"
        case "down_proj", "Q3_K_M":
            return "Q5_K" if block < blocks // 16 else "Q4_K"
        case "down_proj", _ if first:
            return FIRST_DOWN.get(mixture, base)
        case "o_proj", _:
            return OUTPUTS.get(mixture, base)
    return base


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears of the blocks by their whole names."""
    inside = model.get_submodule("model.layers").named_modules(prefix="model.layers")
    return {name: child for name, child in inside if isinstance(child, nn.Linear)}


@torch.no_grad()
def read_inputs(model: Any, windows: Tensor, read: Callable[[str, Tensor], None]) -> None:
    """Let `read` have the inputs `[tokens, in]` of each linear, by name, one window after the other."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: read(name, inputs[0].flatten(0, 1))

    handles = [child.register_forward_pre_hook(hook(name)) for name, child in linears(model).items()]
    for window in windows:
        model.model(window[None], use_cache=False)
    for handle in handles:
        handle.remove()


def measure_importance(model: Any, windows: Tensor) -> dict[str, Tensor]:
    """Return the mean square of each input column `[in]` of each linear over all tokens `[n, length]`, float32."""
    sums: dict[str, Tensor] = {}

    def add(name: str, inputs: Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros(())) + inputs.double().square().sum(0)

    read_inputs(model, windows, add)
    return {name: (total / windows.numel()).float() for name, total in sums.items()}


def quantize(weight: Tensor, kind: str, importance: Tensor | None = None) -> tuple[str, int, Tensor]:
    """Return `kind`, its bytes, and `weight [out, in]` as llama.cpp's own quantizer rounds it."""
    codes = encode(weight, kind, importance)
    return kind, codes.size, torch.from_numpy(gguf.quants.dequantize(codes, gguf.GGMLQuantizationType[kind]))


def encode(weight: Tensor, kind: str, importance: Tensor | None = None) -> np.ndarray:
    """Return the codes of `weight [out, in]`, uint8 `[out, bytes]`, by llama.cpp's own quantizer.

    `importance`: `[in]`; types that it refuses to fill without one get one of ones.
    """
    number = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[number]
    rows, width = weight.shape
    if importance is None and kind in NEEDS_IMPORTANCE:
        importance = torch.ones(width)
    source = np.ascontiguousarray(weight.numpy(), np.float32)
    codes = np.zeros((rows, width // block * block_bytes), np.uint8)
    matrix = None if importance is None else np.ascontiguousarray(importance.numpy(), np.float32)
    written = _engine().ggml_quantize_chunk(
        ctypes.c_int(number),
        source.ctypes.data_as(ctypes.c_void_p),
        codes.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(0),
        ctypes.c_int64(rows),
        ctypes.c_int64(width),
        None if matrix is None else matrix.ctypes.data_as(ctypes.c_void_p),
    )
    if written != codes.size:
        raise RuntimeError(f"llama.cpp wrote {written} bytes of {kind}, not {codes.size}")
    return codes


@cache
def _engine() -> ctypes.CDLL:
    """Return the library inside the package xllamacpp."""
    import xllamacpp

    [path] = Path(str(xllamacpp.__file__)).parent.glob("xllamacpp*.so")
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library
