"""To EXL3, which ExLlamaV3 runs on NVIDIA's GPUs: matrices of the method `exl3`, value for value.

A linear has `trellis`, int16 `[in / 16, out / 16, 16 * bits]`, the factors `suh` of inputs and `svh` of outputs in
float16, and `mul1`, whose presence names the codebook. The codes of a tile are a stream of bits, the highest first, in
16-bit words of which each two have changed places. All else becomes float16. Facts from ExLlamaV3 1.4.1, which needs a
GPU and was not run: an independent reader of this form judges the files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.formats.engine_configs import EXL3, readable_entries
from llmcompress.formats.engine_files import ExportReport, UnfitError, write_layers
from llmcompress.models.files.checkpoint import write_checkpoint
from llmcompress.models.files.compressed import CompressedCheckpoint
from llmcompress.weight.expression import describe
from llmcompress.weight.nodes import Tiles, Weight
from llmcompress.weight.tiles import MULTIPLIER, STEPS

WORD = 16  # bits
RUN = 8  # rows of tiles packed at once: each bit of a code takes four bytes meanwhile


@dataclass(frozen=True)
class Bits:
    """The form in which EXL3 stores a matrix: its weights, and bits of each code."""

    weights: int
    bits: int


def to_exl3(opened: CompressedCheckpoint, output: Path, allow_dense: bool = False) -> ExportReport:
    """Write tiles as they are; other expressions raise InputError, or become float16 with `allow_dense`."""
    read = readable_entries(opened.folder, opened.config, EXL3)
    with write_checkpoint(output, opened.dense_bytes if allow_dense else opened.bytes) as writer:
        files = write_layers(opened, writer, EXL3.name, pack_tiles, torch.float16, allow_dense)
        if not files.packed:
            raise InputError(f"{opened.folder} has no matrix of the method exl3; choose another format")
        size = writer.close()
        forms = files.packed.values()
        bits = sum(form.weights * form.bits for form in forms) / sum(form.weights for form in forms)
        packing = {"quant_method": "exl3", "bits": round(bits, 2), "head_bits": 16, "codebook": "mul1"}
        entries = opened.config | read | {"dtype": "float16", "quantization_config": packing}
        writer.write("config.json", json.dumps(entries, indent=1))
    kept = f"{len(files.packed)} matrices, value for value"
    changed = (*files.changes(), "what was not compressed became float16")
    return ExportReport("exl3", str(output), opened.bytes, size, (kept,), changed)


def pack_tiles(layer: str, w: Weight) -> tuple[Bits, dict[str, Tensor]]:
    """Return the form of a linear, and its tensors. Raises UnfitError for other expressions."""
    if not isinstance(w, Tiles):
        raise UnfitError(f"{describe(w)}, no tiles")
    mark = torch.tensor(MULTIPLIER - (1 << 32), dtype=torch.int32)  # its bits, as those of a signed number
    tensors = {"trellis": pack_words(w.codes, w.bits), "suh": w.inputs, "svh": w.outputs, "mul1": mark}
    return Bits(w.codes.numel(), w.bits), tensors


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Return codes, uint8 `[rows, ..., 256]`, as int16 words `[rows, ..., 16 * bits]`."""
    return torch.cat([_pack_run(run, bits) for run in codes.split(RUN)])


def _pack_run(codes: Tensor, bits: int) -> Tensor:
    places = torch.arange(bits - 1, -1, -1, device=codes.device)
    stream = (codes[..., None].int() >> places & 1).reshape(*codes.shape[:-1], STEPS * bits // WORD, WORD)
    words = (stream << torch.arange(WORD - 1, -1, -1, device=codes.device)).sum(-1)
    swapped = words.reshape(*words.shape[:-1], -1, 2).flip(-1).reshape(words.shape)
    return (swapped - ((swapped >> 15) << WORD)).to(torch.int16)
