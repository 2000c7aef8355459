"""To MLX, whose quantized layers run on Apple's GPUs: grids as its affine groups, MXFP4 and MXFP8 as its own modes.

A group of MLX holds `code * scale + bias`, codes of 1 to 6 or 8 bits from the lowest bit of uint32 words up, groups of
32, 64 or 128 columns. A grid's codes and scales go over as they are; longer groups are repeated. Its bias,
`-zero * scale`, is rounded to float16 where that has too few digits (never for 1 bit and ternary), and the report says
by how much that moves a matrix. All else becomes float16 too: MLX computes in float32 where dtypes are mixed.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.formats.engine_configs import MLX, readable_entries
from llmcompress.formats.exported import ALLOW_DENSE, Exported
from llmcompress.formats.half import as_half
from llmcompress.models.dense.companions import copy_companions
from llmcompress.models.dense.skeleton import transposed_linears
from llmcompress.models.files.checkpoint import write_checkpoint
from llmcompress.models.files.compressed import CompressedCheckpoint
from llmcompress.weight.expression import dense, describe
from llmcompress.weight.nodes import Grid, Minifloat, Weight
from llmcompress.weight.packing import pack, stream_bits

GROUPS = (128, 64, 32)  # columns
BITS = (1, 2, 3, 4, 5, 6, 8)
MX = {"e2m1": ("mxfp4", 4), "e4m3": ("mxfp8", 8)}  # form of the numbers -> mode, bits; groups of 32, e8m0 scales


@dataclass(frozen=True)
class Quantization:
    """The form in which MLX stores a matrix, as an entry of config.json's `quantization`."""

    group_size: int
    bits: int
    mode: str = "affine"

    def to_json(self) -> dict[str, Any]:
        """The entry; the mode goes without saying where it is affine."""
        sizes = {"group_size": self.group_size, "bits": self.bits}
        return sizes if self.mode == "affine" else sizes | {"mode": self.mode}


def to_mlx(opened: CompressedCheckpoint, output: Path, allow_dense: bool = False) -> Exported:
    """Write what MLX can hold packed; other expressions raise InputError, or become float16 with `allow_dense`."""
    read = readable_entries(opened.folder, opened.config, MLX, "MLX")
    turned = transposed_linears(opened.folder, opened.trust_remote_code)
    forms: dict[str, Quantization] = {}
    plain: list[str] = []
    moved = 0.0
    with write_checkpoint(output, opened.dense_bytes) as writer:
        copy_companions(opened.folder, writer.folder, opened.trust_remote_code)
        for layers, others in opened.parts():
            tensors = {name: as_half(value, name) for name, value in opened.read_plain(others).items()}
            for layer in layers:
                weight = opened.expression(layer)
                why = "it is no plain linear layer" if layer in turned else obstacle(weight)
                if why is None:
                    forms[layer], stored, error = converted(weight)
                    tensors |= {f"{layer}.{key}": value for key, value in stored.items()}
                    moved = max(moved, error)
                    continue
                if not allow_dense:
                    raise InputError(f"{layer} does not fit MLX ({why}); {ALLOW_DENSE}")
                plain.append(layer)
                value = as_half(dense(weight), layer)
                tensors[f"{layer}.weight"] = value.T.contiguous() if layer in turned else value
            writer.add(tensors)
        size = writer.close()
        entry = {"quantization": _config(forms)} if forms else {}
        writer.write("config.json", json.dumps(opened.config | read | {"dtype": "float16"} | entry, indent=1))
    biases = f"biases of groups were rounded to float16, which moves a matrix by at most {moved:.1e} of its size"
    return Exported(
        to="mlx",
        output=str(output),
        bytes_before=opened.bytes,
        bytes_after=size,
        kept=(f"{len(forms)} matrices, codes and scales as they are",),
        changed=(
            *((biases,) if moved else ()),
            *((f"{len(plain)} matrices became float16, {plain[0]} first",) if plain else ()),
            "what was not compressed became float16, in which the model computes",
        ),
    )


def obstacle(w: Weight) -> str | None:
    """Return the reason why MLX cannot hold `w`; None if it can."""
    match w:
        case Grid(codes, levels=levels, group_size=group_size):
            if _group(codes.shape[1], group_size) is None:
                return f"MLX has groups of 32, 64 or 128, which {group_size} of {codes.shape[1]} columns do not fill"
            return None if stream_bits(levels) <= max(BITS) else f"{describe(w)} has more than {max(BITS)} bits"
        case Minifloat(codes, _, factor, form, scales, group_size):
            fits = form in MX and scales == "e8m0" and group_size == 32 and factor is None
            return None if fits and codes.shape[1] % 32 == 0 else f"MLX has no {describe(w)}"
        case _:
            return f"{describe(w)} is no single grid"


def _group(width: int, group_size: int) -> int | None:
    """Return the longest group of MLX that lies within the groups of a grid, None if there is none."""
    whole = group_size >= width
    return next((size for size in GROUPS if width % size == 0 and (whole or group_size % size == 0)), None)


def converted(w: Weight) -> tuple[Quantization, dict[str, Tensor], float]:
    """Return the form, the tensors, and the relative change of the matrix, of a weight without an `obstacle`."""
    if isinstance(w, Minifloat):
        mode, bits = MX[w.form]
        return Quantization(32, bits, mode), {"weight": packed_words(w.codes, bits), "scales": w.scale}, 0.0
    if not isinstance(w, Grid):
        raise TypeError(f"MLX does not hold a {type(w).__name__}")
    rows, width = w.codes.shape
    group = _group(width, w.group_size) or 0
    bits = next(size for size in BITS if size >= stream_bits(w.levels))
    firsts = torch.arange(0, width, group) // w.group_size  # the grid's group of each group of MLX
    scales = w.scale.expand(rows, -1)[:, firsts]
    centres = (w.levels - 1) / 2 if w.zero is None else w.zero.expand(rows, -1)[:, firsts].float()
    exact = -centres * scales.float()
    biases = exact.to(torch.float16)
    if not biases.isfinite().all():
        raise InputError(f"a bias of a {describe(w)} is beyond float16's range; export to dense instead")
    change = (biases.float() - exact).norm() * group**0.5 / dense(w).norm().clamp_min(1e-30)
    tensors = {"weight": packed_words(w.codes, bits), "scales": scales.contiguous(), "biases": biases}
    return Quantization(group, bits), tensors, float(change)


def packed_words(codes: Tensor, bits: int) -> Tensor:
    """Return codes, uint8 `[out, in]`, as uint32 words `[out, in * bits / 32]`; the width is a multiple of 32."""
    return pack(codes, 1 << bits).view(torch.uint32).reshape(len(codes), -1)


def _config(forms: dict[str, Quantization]) -> dict[str, Any]:
    """Return config.json's `quantization`: the commonest form for all, then the layers that differ."""
    common = Counter(forms.values()).most_common(1)[0][0]
    return common.to_json() | {name: form.to_json() for name, form in forms.items() if form != common}
