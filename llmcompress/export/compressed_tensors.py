"""To compressed-tensors (`pack-quantized`), which transformers and vLLM read: integer grids, value for value.

All become symmetric integers of the format, centred on a code: ternary as it is in 2 bits; our symmetric b bits,
centred between two codes, as the odd integers of b + 1 bits at half the scale; asymmetric b bits less their zero point
as b + 1 (packed zero points of compressed-tensors 0.20 are not loaded by transformers 5.23). What is no plain grid is
refused, or stored in bfloat16 where that is allowed, and listed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress.errors import InputError, RecipeError
from llmcompress.export.exported import Exported
from llmcompress.models.checkpoint import writing
from llmcompress.models.companions import copy_companions
from llmcompress.models.compressed import Opened
from llmcompress.models.skeleton import transposed_linears
from llmcompress.weight.expression import dense, describe
from llmcompress.weight.modules import LIKE
from llmcompress.weight.nodes import Grid, Weight


@dataclass(frozen=True)
class Scheme:
    """The form in which the format stores a matrix. `group_size`: None for one scale per row."""

    num_bits: int
    group_size: int | None

    def to_json(self) -> dict[str, Any]:
        """The `weights` entry of a config group."""
        strategy = {"strategy": "channel"} if self.group_size is None else {"strategy": "group"}
        size = {} if self.group_size is None else {"group_size": self.group_size}
        return {"num_bits": self.num_bits, "type": "int", "symmetric": True, "dynamic": False} | strategy | size


def to_compressed_tensors(opened: Opened, output: Path, allow_dense: bool = False) -> Exported:
    """Write grids as they are; other expressions raise InputError, or become bfloat16 with `allow_dense`."""
    turned = transposed_linears(opened.folder, opened.trust_remote_code)
    linears = _linears(opened)
    schemes: dict[str, Scheme] = {}
    plain: list[str] = []
    with writing(output, opened.dense_bytes) as writer:
        copy_companions(opened.folder, writer.folder, opened.trust_remote_code)
        for layers, others in opened.parts():
            tensors = opened.read_plain(others)
            for layer in layers:
                weight = opened.expression(layer)
                why = obstacle(weight) if layer in linears and layer not in turned else "it is no plain linear layer"
                if why is None and isinstance(weight, Grid):
                    schemes[layer], stored = converted(weight)
                    tensors |= {f"{layer}.{key}": value for key, value in stored.items()}
                    continue
                if not allow_dense:
                    raise InputError(f"{layer} does not fit compressed-tensors ({why}); allow dense layers")
                plain.append(layer)
                value = dense(weight).to(torch.bfloat16)
                tensors[f"{layer}.weight"] = value.T.contiguous() if layer in turned else value
            writer.add(tensors)
        size = writer.close()
        entry = {"quantization_config": _config(schemes, plain)}
        writer.write("config.json", json.dumps(opened.config | entry, indent=1))
    return Exported(
        to="compressed-tensors",
        output=str(output),
        bytes_before=opened.bytes,
        bytes_after=size,
        kept=(f"{len(schemes)} grids, value for value",),
        changed=(f"{len(plain)} matrices became bfloat16, {plain[0]} first",) if plain else (),
    )


def obstacle(w: Weight) -> str | None:
    """Return the reason why the format cannot hold `w` exactly; None if it can."""
    if not isinstance(w, Grid):
        return f"{describe(w)} is no single grid"
    if w.codes.shape[1] % w.group_size:
        return f"groups of {w.group_size} do not divide the width {w.codes.shape[1]}"
    if _bits(w) > 8:
        return f"{describe(w)} would need {_bits(w)} bits"
    return None


def _bits(w: Grid) -> int:
    """Return the bits of the format's integers that hold the grid.

    They are odd integers, differences of codes, or, for odd levels, codes around 0.
    """
    return w.levels.bit_length() if w.zero is None else (w.levels - 1).bit_length() + 1


def converted(w: Grid) -> tuple[Scheme, dict[str, Tensor]]:
    """Return the scheme and the tensors of a grid without an `obstacle`."""
    try:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    except ImportError as error:
        raise RecipeError('this export needs compressed-tensors; run pip install "llmcompress[export]"') from error
    codes, scale = w.codes.to(torch.int16), w.scale
    if w.zero is not None:
        whole = codes - w.zero.to(torch.int16).repeat_interleave(w.group_size, 1)
    elif w.levels % 2:
        whole = codes - w.levels // 2
    else:
        whole, scale = 2 * codes - (w.levels - 1), (scale.float() / 2).to(scale.dtype)
    tensors = {
        "weight_packed": pack_to_int32(whole.to(torch.int8), _bits(w)),
        "weight_scale": scale,
        "weight_shape": torch.tensor(w.codes.shape),
    }
    return Scheme(_bits(w), None if scale.shape[1] == 1 else w.group_size), tensors


def _linears(opened: Opened) -> set[str]:
    """Return the names under which the format knows compressed modules: linears, not token tables."""
    tables = {name.removesuffix(f".{LIKE}") for name in opened.files if name.endswith(f".{LIKE}")}
    return set(opened.layouts) - tables


def _config(schemes: dict[str, Scheme], plain: list[str]) -> dict[str, Any]:
    groups: dict[Scheme, list[str]] = {}
    for layer, scheme in schemes.items():
        groups.setdefault(scheme, []).append(layer)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {"targets": layers, "weights": scheme.to_json()}
            for number, (scheme, layers) in enumerate(groups.items())
        },
        "ignore": ["lm_head", *plain],
    }
