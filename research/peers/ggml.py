"""llama.cpp's types below 3 bits with an importance matrix, by the package xllamacpp; runs in our own environment.

xllamacpp calls no quantizer from Python, but its library exports ggml's, `ggml_quantize_chunk`, which is what
llama.cpp's `llama-quantize` calls row by row. The importance of a column is the mean square of its inputs, dense,
on the calibration tokens, as `llama-imatrix` gathers it.

These types are in blocks of 256 columns, which do not divide a width of 576. The arms of the plain names do what
`llama-quantize` does then: `MIXES`, `EARLY`, `SHARED` and `FALLBACKS` are its rules (`src/llama-quant.cpp`, commit
007dbbf) for a dense model. An arm `-joined` is what the tool does not offer: the pure
type everywhere, four rows of 576 being joined to one of 2304 columns, as if the type had a block that fits.
"""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from gguf import GGMLQuantizationType as Type
from handover import decoder_linears, hand_over, loaded, parser, sequences, timed
from safetensors.torch import load_file, save_file
from torch import Tensor

KINDS = {
    "iq1_s": Type.IQ1_S,
    "iq2_xxs": Type.IQ2_XXS,
    "iq3_xxs": Type.IQ3_XXS,
    "q2_k": Type.Q2_K,
    "q3_k": Type.Q3_K,
    "q4_0": Type.Q4_0,
    "q4_k": Type.Q4_K,
    "tq1_0": Type.TQ1_0,
    "tq2_0": Type.TQ2_0,
}
ARMS = (*KINDS, *(f"{kind}-joined" for kind in KINDS))
FALLBACKS = {  # where blocks do not divide the width
    Type.IQ1_S: Type.IQ4_NL,
    Type.IQ2_XXS: Type.IQ4_NL,
    Type.Q2_K: Type.Q4_0,
    Type.IQ3_XXS: Type.IQ4_NL,
    Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.TQ1_0: Type.Q4_0,
    Type.TQ2_0: Type.Q4_0,
}
MIXES = {  # the linears that an arm gives another type than its own
    "iq1_s": {"v_proj": Type.Q2_K, "o_proj": Type.IQ2_XXS},
    "iq2_xxs": {"v_proj": Type.Q2_K},
    "q2_k": {"v_proj": Type.Q3_K, "o_proj": Type.Q3_K, "down_proj": Type.Q3_K},
}
SHARED = Type.Q4_K  # of v_proj in a mix, where four or more query heads share a key head
EARLY = {"iq1_s": Type.Q2_K, "iq2_xxs": Type.Q2_K}  # and down_proj in the first eighth of the blocks


def main() -> None:
    """One arm."""
    arguments = parser(__doc__, ARMS)
    arguments.add_argument("--importance", type=Path, required=True, help="safetensors; made where it is not there")
    given = arguments.parse_args()
    model = loaded(given, "float32")
    if not given.importance.is_file():
        save_file(importance(model, sequences(given)), given.importance)
    columns, linears = load_file(given.importance), decoder_linears(model)
    kind, _, joined = given.arm.partition("-")
    config = model.config
    shared = config.num_attention_heads >= 4 * config.num_key_value_heads

    def work() -> tuple[dict[str, Tensor], dict[str, Type], int]:
        dense, types, size = {}, {}, 0
        for name, part in linears.items():
            place = (name, config.num_hidden_layers, shared)
            types[name] = KINDS[kind] if joined else chosen(kind, *place, part.in_features)
            dense[name], written = quantized(part.weight.detach(), columns[name], types[name])
            size += written
        return dense, types, size

    (dense, types, size), facts = timed(work)
    facts |= {"bits": 8 * size, "types": Counter(one.name for one in types.values())}
    hand_over(given, "llama.cpp", ("xllamacpp", "gguf", "transformers"), dense, facts)


@torch.no_grad()
def importance(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Module path -> the mean square of each input column [in] over all tokens [n, length], float32."""
    sums: dict[str, Tensor] = {}

    def add(name: str, _: Any, inputs: tuple[Tensor, ...]) -> None:
        sums[name] = sums.get(name, 0) + inputs[0].double().square().flatten(0, -2).sum(0)

    hooks = [part.register_forward_pre_hook(partial(add, name)) for name, part in decoder_linears(model).items()]
    for window in ids:
        model.model(window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: (total / ids.numel()).float() for name, total in sums.items()}


def chosen(kind: str, name: str, blocks: int, shared: bool, width: int) -> Type:
    """Return the type that llama-quantize gives a linear of an arm; `shared`: four query heads to a key head."""
    block, linear = int(re.findall(r"\.(\d+)\.", name)[0]), name.rpartition(".")[2]
    wanted = MIXES.get(kind, {}).get(linear, KINDS[kind])
    if linear == "v_proj" and shared and kind in MIXES:
        wanted = SHARED
    if linear == "down_proj" and block < blocks // 8:
        wanted = EARLY.get(kind, wanted)
    return FALLBACKS[wanted] if width % gguf.GGML_QUANT_SIZES[wanted][0] else wanted


def quantized(weight: Tensor, importance: Tensor, kind: Type) -> tuple[Tensor, int]:
    """([out, in] of what the codes are worth, their bytes)."""
    codes = quantize(weight, importance, kind)
    return torch.from_numpy(gguf.quants.dequantize(codes, kind)).reshape(weight.shape), codes.nbytes


def quantize(weight: Tensor, importance: Tensor, kind: Type) -> numpy.ndarray:
    """The codes of rows, uint8 [rows, bytes]. Rows that blocks do not divide are joined four by four."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    joined = 4 if weight.shape[1] % block else 1
    rows = weight.reshape(weight.shape[0] // joined, -1).contiguous().numpy()
    columns = importance.repeat(joined).contiguous().numpy()
    codes = numpy.zeros((rows.shape[0], rows.shape[1] // block * block_bytes), numpy.uint8)
    pointers = (rows.ctypes.data, codes.ctypes.data, 0, rows.shape[0], rows.shape[1], columns.ctypes.data)
    written = library().ggml_quantize_chunk(int(kind), *pointers)
    if written != codes.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes of {kind.name} where {codes.nbytes} were expected")
    return codes


def library() -> ctypes.CDLL:
    """The library of xllamacpp, with the signature of the one function."""
    found = find_spec("xllamacpp")
    folders = list(found.submodule_search_locations or ()) if found else []
    files = [file for folder in folders for file in Path(folder).glob("xllamacpp*.so")]
    opened = ctypes.CDLL(str(files[0]))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    opened.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    opened.ggml_quantize_chunk.restype = ctypes.c_size_t
    return opened


if __name__ == "__main__":
    main()
