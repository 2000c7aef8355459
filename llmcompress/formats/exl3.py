"""To EXL3, which ExLlamaV3 runs on NVIDIA's GPUs: what the method `exl3` made, value for value.

A linear has `trellis`, int16 `[in / 16, out / 16, 16 * bits]`, the factors `suh` of inputs and `svh` of outputs in
float16, and `mul1`, whose presence names the codebook. The codes of a tile are a stream of bits, the highest first, in
16-bit words of which each two have changed places. All else becomes float16. Facts from ExLlamaV3 1.4.1, which needs a
GPU and was not run: an independent reader of this form judges the files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.formats.engine_configs import EXL3, readable_entries
from llmcompress.formats.exported import ALLOW_DENSE, Exported
from llmcompress.formats.half import as_half
from llmcompress.models.dense.companions import copy_companions
from llmcompress.models.dense.skeleton import transposed_linears
from llmcompress.models.files.checkpoint import write_checkpoint
from llmcompress.models.files.compressed import CompressedCheckpoint
from llmcompress.weight.expression import dense, describe
from llmcompress.weight.nodes import Tiles
from llmcompress.weight.tiles import MULTIPLIER, STEPS

WORD = 16  # bits


def to_exl3(opened: CompressedCheckpoint, output: Path, allow_dense: bool = False) -> Exported:
    """Write tiles as they are; other expressions raise InputError, or become float16 with `allow_dense`."""
    read = readable_entries(opened.folder, opened.config, EXL3, "EXL3")
    turned = transposed_linears(opened.folder, opened.trust_remote_code)
    stored: list[Tiles] = []
    plain: list[str] = []
    with write_checkpoint(output, opened.dense_bytes) as writer:
        copy_companions(opened.folder, writer.folder, opened.trust_remote_code)
        for layers, others in opened.parts():
            tensors = {name: as_half(value, name) for name, value in opened.read_plain(others).items()}
            for layer in layers:
                weight = opened.expression(layer)
                if isinstance(weight, Tiles) and layer not in turned:
                    stored.append(weight)
                    tensors |= {f"{layer}.{key}": value for key, value in converted(weight).items()}
                    continue
                if not allow_dense:
                    raise InputError(f"{layer} does not fit EXL3 ({describe(weight)}, no tiles); {ALLOW_DENSE}")
                plain.append(layer)
                value = as_half(dense(weight), layer)
                tensors[f"{layer}.weight"] = value.T.contiguous() if layer in turned else value
            writer.add(tensors)
        size = writer.close()
        if not stored:
            raise InputError(f"{opened.folder} has nothing that the method exl3 made; choose another format")
        entries = opened.config | read | {"dtype": "float16", "quantization_config": _config(stored)}
        writer.write("config.json", json.dumps(entries, indent=1))
    return Exported(
        to="exl3",
        output=str(output),
        bytes_before=opened.bytes,
        bytes_after=size,
        kept=(f"{len(stored)} matrices, value for value",),
        changed=(
            *((f"{len(plain)} matrices became float16, {plain[0]} first",) if plain else ()),
            "what was not compressed became float16",
        ),
    )


def converted(w: Tiles) -> dict[str, Tensor]:
    """Return the tensors of a linear, by the ends of their names."""
    mark = torch.tensor(MULTIPLIER - (1 << 32), dtype=torch.int32)  # its bits, as those of a signed number
    return {"trellis": packed_words(w.codes, w.bits), "suh": w.inputs, "svh": w.outputs, "mul1": mark}


def packed_words(codes: Tensor, bits: int) -> Tensor:
    """Return codes, uint8 `[..., 256]`, as int16 words `[..., 16 * bits]`."""
    places = torch.arange(bits - 1, -1, -1, device=codes.device)
    stream = (codes[..., None].int() >> places & 1).reshape(*codes.shape[:-1], STEPS * bits // WORD, WORD)
    words = (stream << torch.arange(WORD - 1, -1, -1, device=codes.device)).sum(-1)
    swapped = words.reshape(*words.shape[:-1], -1, 2).flip(-1).reshape(words.shape)
    return (swapped - ((swapped >> 15) << WORD)).to(torch.int16)


def _config(stored: list[Tiles]) -> dict[str, Any]:
    """Return config.json's `quantization_config`; ExLlamaV3 reads each linear's form off its tensors."""
    weights = sum(w.codes.numel() for w in stored)
    bits = sum(w.codes.numel() * w.bits for w in stored) / weights
    return {"quant_method": "exl3", "bits": round(bits, 2), "head_bits": 16, "codebook": "mul1"}
