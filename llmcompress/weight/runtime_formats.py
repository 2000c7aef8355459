"""Formats of other engines for a compressed weight: its name there, or the reason why the engine cannot hold it.

Only the sizes and formats of an expression count, so it may be one without values, as in a plan.
"""

from __future__ import annotations

from collections.abc import Callable

from llmcompress.weight.expression import describe
from llmcompress.weight.inputs import InputName, describe_inputs
from llmcompress.weight.nodes import Dense, Grid, LowRank, Minifloat, Sum, Superblocks, Tiles, Weight, Zero
from llmcompress.weight.packing import stream_bits

# By form, scales, and columns of a scale
PACKED_FLOATS = {
    ("e2m1", "e8m0", 32): "mxfp4",
    ("e2m1", "e4m3", 16): "nvfp4",
    ("e4m3", "e8m0", 32): "mxfp8",
}
VLLM_BITS = (4, 8)  # of integers that its kernels read
VLLM_GROUPS = (32, 64, 128)
MLX_BITS = (1, 2, 3, 4, 5, 6, 8)
MLX_GROUPS = (128, 64, 32)  # columns
MLX_FLOATS = {"e2m1": ("mxfp4", 4), "e4m3": ("mxfp8", 8)}  # form of the numbers -> mode, bits
GGUF_BLOCK = 32  # columns of its smallest blocks


def integer_bits(w: Grid) -> int:
    """Return the bits of integers around 0 that hold the grid.

    They are odd integers, differences of codes, or, for odd levels, codes around 0.
    """
    return w.levels.bit_length() if w.zero is None else (w.levels - 1).bit_length() + 1


def float_format(w: Minifloat) -> str | None:
    """Return the name under which compressed-tensors has the floats: fp8, mxfp8, mxfp4 or nvfp4; None if not."""
    if w.scales == "bfloat16":
        return "fp8" if w.form == "e4m3" and w.group_size >= w.codes.shape[1] else None
    name = PACKED_FLOATS.get((w.form, w.scales, w.group_size))
    return name if (name == "nvfp4") == (w.tensor_scale is not None) else None


def compressed_tensors_obstacle(w: Weight) -> str | None:
    """Return the reason why compressed-tensors cannot hold `w` exactly; None if it can."""
    match w:
        case Grid(codes, group_size=group_size):
            if integer_bits(w) > 8:
                narrow = "narrow_range: true" if w.zero is None else "symmetric: true and narrow_range: true"
                return f"{describe(w)} would need {integer_bits(w)} bits, and 8 when it is compressed with {narrow}"
        case Minifloat(codes, group_size=group_size):
            if float_format(w) is None:
                return f"it has no {describe(w)}"
        case _:
            return f"{describe(w)} is no single grid"
    if codes.shape[1] % group_size:
        return f"groups of {group_size} do not divide the width {codes.shape[1]}"
    return None


def vllm_obstacle(w: Weight) -> str | None:
    """Return the reason why vLLM does not multiply by `w` as compressed-tensors holds it; None if it does."""
    if isinstance(w, Grid) and (why := _vllm_grid_obstacle(w)) is not None:
        return why
    if isinstance(w, Minifloat) and float_format(w) == "mxfp8":
        return "vLLM rounds what mxfp8 matrices multiply, too; give the rule inputs: {format: mxfp8}"
    return compressed_tensors_obstacle(w)


def vllm_inputs_obstacle(w: Weight, inputs: InputName, is_calibrated: bool) -> str | None:
    """Return the reason why vLLM does not multiply inputs in a format by `w`; None if it does."""
    words = describe_inputs(inputs, is_calibrated)
    match w:
        case Minifloat():
            fits = float_format(w) == inputs
        case Grid(codes, group_size=group_size) if inputs == "int8":
            whole_rows = integer_bits(w) == 8 and group_size >= codes.shape[1]
            fits = whole_rows or (integer_bits(w) == 4 and not is_calibrated)
        case Grid(group_size=group_size):
            fits = inputs == "fp8" and not is_calibrated and integer_bits(w) == 4 and group_size == 128
        case _:
            fits = False
    return compressed_tensors_obstacle(w) if fits else f"vLLM multiplies no {words} by {describe(w)}"


def vllm_expert_obstacle(w: Weight, inputs: InputName | None, is_calibrated: bool) -> str | None:
    """Return the reason why vLLM does not multiply by `w` in an expert, as it does elsewhere; None if it does."""
    if inputs in ("fp8", "int8") and is_calibrated:
        return "vLLM takes one scale for the inputs of all experts; give the rule scale: token"
    if not isinstance(w, Minifloat) or float_format(w) != "fp8":
        return None
    if inputs is None:
        return "vLLM rounds what fp8 matrices of experts multiply, too; give the rule inputs: {format: fp8}"
    return None if len(w.scale) == len(w.codes) else "vLLM rounds an expert's fp8_tensor matrices again; take fp8"


def _vllm_grid_obstacle(w: Grid) -> str | None:
    if integer_bits(w) not in VLLM_BITS:
        return f"{describe(w)} is stored in integers of {integer_bits(w)} bits, and vLLM reads those of 4 or 8"
    if w.group_size < w.codes.shape[1] and w.group_size not in VLLM_GROUPS:
        return f"vLLM reads groups of 32, 64, 128 or a row, not of {w.group_size}"
    return None


def mlx_obstacle(w: Weight) -> str | None:
    """Return the reason why MLX cannot hold `w`; None if it can."""
    match w:
        case Grid(codes, levels=levels):
            if stream_bits(levels) > max(MLX_BITS):
                return f"{describe(w)} has more than {max(MLX_BITS)} bits"
            if mlx_group(w) is None:
                return f"MLX has groups of 32, 64 or 128, which {w.group_size} of {codes.shape[1]} columns do not fill"
        case Minifloat(codes, _, factor, form, scales, group_size):
            fits = form in MLX_FLOATS and scales == "e8m0" and group_size == 32 and factor is None
            if not fits or codes.shape[1] % 32:
                return f"MLX has no {describe(w)}"
        case _:
            return f"{describe(w)} is no single grid"
    return None


def mlx_group(w: Grid) -> int | None:
    """Return the columns of the groups in which MLX holds a grid; None if none of its groups fit."""
    width = w.codes.shape[1]
    whole = w.group_size >= width
    return next((size for size in MLX_GROUPS if width % size == 0 and (whole or w.group_size % size == 0)), None)


def llama_cpp_obstacle(w: Weight) -> str | None:
    """Return the reason why GGUF cannot hold `w`; None if it may: whether scales suit a type, the export tells."""
    match w:
        case Dense() | Zero() | Superblocks():
            return None
        case Grid(codes) | Sum((LowRank(), Grid(codes))):
            fills = codes.shape[1] % GGUF_BLOCK == 0
        case Minifloat(codes, tensor_scale=None, form="e2m1", scales="e8m0", group_size=32):
            fills = codes.shape[1] % GGUF_BLOCK == 0
        case _:
            return f"{describe(w)} is no single grid"
    return None if fills else f"blocks of {GGUF_BLOCK} columns do not fill the width {codes.shape[1]}"


def exllamav3_obstacle(w: Weight) -> str | None:
    """Return the reason why EXL3 cannot hold `w`; None if it can."""
    return None if isinstance(w, Tiles) else f"{describe(w)}, no tiles"


# By the name of an engine: why it cannot hold a weight
OBSTACLES: dict[str, Callable[[Weight], str | None]] = {
    "vllm": vllm_obstacle,
    "llama.cpp": llama_cpp_obstacle,
    "mlx": mlx_obstacle,
    "exllamav3": exllamav3_obstacle,
}
WITH_TABLES = ("llama.cpp", "mlx")  # engines that read compressed token tables
