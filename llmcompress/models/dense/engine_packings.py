"""Matrices as MLX and ExLlamaV3 store them, decoded by the formulas of these engines, which need not be installed.

MLX: a group of columns holds `code * scale + bias`, or floats of few bits times a scale; codes lie in uint32 words from
the lowest bit up. EXL3: tiles in trellises (`weight/tiles.py`), whose codes lie in words of 32 bits from the highest
bit down. The engines multiply by these numbers without rounding them first; here they are rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.models.dense.config import MODEL
from llmcompress.models.dense.headers import FLOATS, Folder, Packing, Packings
from llmcompress.weight import tiles
from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import FloatFormat, Minifloat, ScaleFormat
from llmcompress.weight.packing import unpack
from llmcompress.weight.runtime_formats import MLX_BITS, MLX_GROUPS

AFFINE = "affine"
# By mode of MLX: numbers, scales, columns of a group, bits
MLX_FLOATS: dict[str, tuple[FloatFormat, ScaleFormat, int, int]] = {
    "mxfp4": ("e2m1", "e8m0", 32, 4),
    "mxfp8": ("e4m3", "e8m0", 32, 8),
    "nvfp4": ("e2m1", "e4m3", 16, 4),
}
WORD = 32  # bits
CODEBOOKS: tuple[tiles.Codebook, ...] = ("mul1", "mcg")  # of EXL3, named by a tensor
UNMARKED: tiles.Codebook = "3inst"  # without one


@dataclass(frozen=True)
class MLXForm:
    """The form of a matrix in MLX."""

    group_size: int
    bits: int
    mode: str

    @staticmethod
    def of(folder: Folder, layer: str) -> MLXForm:
        """Return the form that a config.json has for a layer, or for all. Raises InputError for one that MLX lacks."""
        own = folder.settings.get(layer, folder.settings)
        entries = own if isinstance(own, dict) else folder.settings
        size, bits, mode = (entries.get(key) for key in ("group_size", "bits", "mode"))
        mode = AFFINE if mode is None else mode
        is_known = size in MLX_GROUPS and bits in MLX_BITS
        if mode != AFFINE:
            is_known = isinstance(mode, str) and MLX_FLOATS.get(mode, ())[2:] == (size, bits)
        if not is_known or type(size) is not int or type(bits) is not int:
            given = f"{str(bits)[:20]} bits in groups of {str(size)[:20]}, mode {str(mode)[:20]!r}"
            raise InputError(f"{folder.place / MODEL} has {layer} in {given}, which MLX lacks; correct quantization")
        return MLXForm(size, bits, mode)

    def __str__(self) -> str:
        return f"{self.bits} bits of MLX" if self.mode == AFFINE else f"{self.mode} of MLX"


def mlx_packings(folder: Folder) -> Packings:
    """Return the matrices of MLX: those with scales beside them, as mlx-lm finds them."""
    packings = {}
    for key, scales in folder.stored.items():
        layer = key.removesuffix(".scales")
        codes = folder.stored.get(f"{layer}.weight")
        if layer == key or codes is None:
            continue
        form = MLXForm.of(folder, layer)
        rows, words = codes.shape if len(codes.shape) == 2 else (0, 0)
        width = words * WORD // form.bits
        parts = {"weight": codes, "scales": scales}
        if form.mode == AFFINE:
            biases = folder.stored.get(f"{layer}.biases")
            if biases is None:
                raise InputError(f"{codes.file} holds {layer} without its biases; download the model again")
            parts["biases"] = biases
        is_whole = codes.dtype == "U32" and width > 0 and words * WORD == width * form.bits
        groups = (rows, width // form.group_size)
        kind = FLOATS.keys() if form.mode == AFFINE else {"U8"}
        fit = all(part.shape == groups and part.dtype in kind for name, part in parts.items() if name != "weight")
        folder.require(is_whole and width % form.group_size == 0 and fit, codes.key, str(form))
        packings[f"{layer}.weight"] = Packing(str(form), (rows, width), parts, partial(_unpack_mlx, form=form))
    return packings


def _unpack_mlx(parts: dict[str, Tensor], form: MLXForm) -> Tensor:
    """Return the numbers `[out, in]` of words `[out, in * bits / 32]` and values `[out, groups]` of groups."""
    rows, words = parts["weight"].shape
    width = words * WORD // form.bits
    codes = unpack(parts["weight"].view(torch.uint8).flatten(), 1 << form.bits, rows * width).view(rows, width)
    if form.mode != AFFINE:
        numbers, scales, group, _ = MLX_FLOATS[form.mode]
        return dense(Minifloat(codes, parts["scales"], None, numbers, scales, group))
    scale, bias = (parts[name].float()[..., None] for name in ("scales", "biases"))
    return codes.unflatten(1, (-1, form.group_size)).float().mul_(scale).add_(bias).flatten(1)


def exl3_packings(folder: Folder) -> Packings:
    """Return the matrices of EXL3, each of the codebook whose mark is beside it."""
    packings = {}
    for key, words in folder.stored.items():
        layer = key.removesuffix(".trellis")
        if layer == key:
            continue
        codebook = next((name for name in CODEBOOKS if f"{layer}.{name}" in folder.stored), UNMARKED)
        names = ("trellis", "suh", "svh", codebook)
        held = {name: folder.stored[f"{layer}.{name}"] for name in names if f"{layer}.{name}" in folder.stored}
        if missing := {"suh", "svh"} - held.keys():
            raise InputError(
                f"{words.file} holds {layer} without {min(missing)}, its factors; download the model again"
            )
        down, across, length = words.shape if len(words.shape) == 3 else (0, 0, 0)
        bits, shape = length // tiles.SIDE, (across * tiles.SIDE, down * tiles.SIDE)
        is_whole = words.dtype == "I16" and length == bits * tiles.SIDE and 1 <= bits <= 8
        blocks = down > 0 < across and not (shape[0] % tiles.BLOCK or shape[1] % tiles.BLOCK)
        factors = held["suh"], held["svh"]
        fit = [part.shape for part in factors] == [shape[1:], shape[:1]] and {part.dtype for part in factors} == {"F16"}
        folder.require(is_whole and blocks and fit, words.key, "EXL3 of whole bits")
        unpack = partial(_unpack_exl3, bits=bits, codebook=codebook)
        packings[f"{layer}.weight"] = Packing(f"{bits} bits of EXL3", shape, held, unpack)
    return packings


def _unpack_exl3(parts: dict[str, Tensor], bits: int, codebook: tiles.Codebook) -> Tensor:
    codes = unpack_words(parts["trellis"], bits)
    return tiles.matrix(codes, bits, parts["suh"], parts["svh"], codebook)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Return the codes, uint8 `[..., 256]`, of int16 words `[..., 16 * bits]`, of which each two are one of 32 bits."""
    octets = words.contiguous().view(torch.uint8).reshape(-1, 4).flip(1).flatten()  # the highest first
    stream = (octets[:, None] >> torch.arange(7, -1, -1, dtype=torch.uint8)) & 1
    places = torch.arange(bits - 1, -1, -1, dtype=torch.uint8)
    return (stream.reshape(-1, bits) << places).sum(1, dtype=torch.uint8).reshape(*words.shape[:-1], tiles.STEPS)
