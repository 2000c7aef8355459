"""To MLX, whose quantized layers run on Apple's GPUs: grids as its affine groups, MXFP4 and MXFP8 as its own modes.

A group of MLX holds `code * scale + bias`, codes of 1 to 6 or 8 bits from the lowest bit of uint32 words up, groups of
32, 64 or 128 columns. A grid's codes and scales go over as they are; longer groups are repeated. Its bias,
`-zero * scale`, is rounded to float16 where that has too few digits (never for 1 bit and ternary), and the report says
by how much that moves a matrix. All else becomes float16 too, but for a family whose activations are beyond its range:
there the rest stays as it is, and MLX computes in float32, since dtypes are mixed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.formats.engine_configs import MLX, readable_entries
from llmcompress.formats.engine_files import ExportReport, UnfitError, write_layers
from llmcompress.models.files.checkpoint import write_checkpoint
from llmcompress.models.files.compressed import CompressedCheckpoint
from llmcompress.weight.expression import dense, describe
from llmcompress.weight.nodes import Grid, Minifloat, Weight, unknown
from llmcompress.weight.packing import pack, stream_bits
from llmcompress.weight.runtime_formats import MLX_BITS, MLX_FLOATS, mlx_group, mlx_obstacle


@dataclass(frozen=True)
class Quantization:
    """The form in which MLX stores a matrix, as an entry of config.json's `quantization`. `moved`: the relative change
    of the matrix."""

    group_size: int
    bits: int
    mode: str = "affine"
    moved: float = field(default=0.0, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Return the entry; an affine mode goes without saying."""
        sizes = {"group_size": self.group_size, "bits": self.bits}
        return sizes if self.mode == "affine" else sizes | {"mode": self.mode}


def to_mlx(opened: CompressedCheckpoint, output: Path, allow_dense: bool = False) -> ExportReport:
    """Write grids and MX floats packed; other expressions raise InputError, or become float16 with `allow_dense`."""
    read = readable_entries(opened.folder, opened.config, MLX)
    wide = MLX.families[opened.config["model_type"]].wide
    dtype = torch.bfloat16 if wide else torch.float16
    with write_checkpoint(output, opened.dense_bytes if allow_dense else opened.bytes) as writer:
        files = write_layers(opened, writer, MLX.name, pack_matrix, dtype, allow_dense)
        size = writer.close()
        entry = {"quantization": _quantization_entry(files.packed)} if files.packed else {}
        named = {"dtype": str(dtype).removeprefix("torch.")}
        writer.write("config.json", json.dumps(opened.config | read | named | entry, indent=1))
    moved = max((form.moved for form in files.packed.values()), default=0.0)
    biases = f"biases of groups were rounded to float16, which moves a matrix by at most {moved:.1e} of its size"
    rest = "stayed as it was, so that the model computes in float32" if wide else "became float16, in which it computes"
    changed = (*files.changes(), f"what was not compressed {rest}")
    kept = f"{len(files.packed)} matrices, codes and scales as they are"
    return ExportReport("mlx", str(output), opened.bytes, size, (kept,), (biases, *changed) if moved else changed)


def pack_matrix(layer: str, w: Weight) -> tuple[Quantization, dict[str, Tensor]]:
    """Return the form of a matrix, and its tensors. Raises UnfitError where MLX cannot hold it, InputError for biases
    beyond float16."""
    form = form_of(w)
    if isinstance(w, Minifloat):
        return form, {"weight": pack_words(w.codes, form.bits), "scales": w.scale}
    if not isinstance(w, Grid):
        raise unknown("pack_matrix", w)
    return _pack_grid(w, form)


def form_of(w: Weight) -> Quantization:
    """Return the form of a matrix, which may be without values. Raises UnfitError where MLX cannot hold it."""
    if (why := mlx_obstacle(w)) is not None:
        raise UnfitError(why)
    match w:
        case Minifloat(form=form):
            mode, bits = MLX_FLOATS[form]
            return Quantization(32, bits, mode)
        case Grid():
            bits = next(size for size in MLX_BITS if size >= stream_bits(w.levels))
            return Quantization(mlx_group(w) or w.codes.shape[1], bits)
    raise unknown("form_of", w)


def _pack_grid(w: Grid, form: Quantization) -> tuple[Quantization, dict[str, Tensor]]:
    rows, width = w.codes.shape
    group, bits = form.group_size, form.bits
    firsts = torch.arange(0, width, group) // w.group_size  # the grid's group of each group of MLX
    scales = w.scale.expand(rows, -1)[:, firsts]
    centres = (w.levels - 1) / 2 if w.zero is None else w.zero.expand(rows, -1)[:, firsts].float()
    exact = -centres * scales.float()
    biases = exact.to(torch.float16)
    if not biases.isfinite().all():
        raise InputError(f"a bias of a {describe(w)} is beyond float16's range; export to dense instead")
    moved = (biases.float() - exact).norm() * group**0.5 / dense(w).norm().clamp_min(1e-30)
    tensors = {"weight": pack_words(w.codes, bits), "scales": scales.contiguous(), "biases": biases}
    return replace(form, moved=float(moved)), tensors


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Return codes, uint8 `[out, in]`, as uint32 words `[out, in * bits / 32]`; the width is a multiple of 32."""
    return pack(codes, 1 << bits).view(torch.uint32).reshape(len(codes), -1)


def _quantization_entry(forms: Mapping[str, Quantization]) -> dict[str, Any]:
    """Return config.json's `quantization`: the commonest form for all, then the layers that differ."""
    common = Counter(forms.values()).most_common(1)[0][0]
    return common.to_json() | {name: form.to_json() for name, form in forms.items() if form != common}
