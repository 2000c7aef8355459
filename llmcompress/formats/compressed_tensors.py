"""To compressed-tensors, which transformers and vLLM read: integer grids and floats of few bits, value for value.

Grids (`pack-quantized`) become symmetric integers of the format, centred on a code: odd numbers of levels as they are;
our symmetric b bits, centred between two codes, as the odd integers of b + 1 bits at half the scale; asymmetric b bits
less their zero point as b + 1 (packed zero points of compressed-tensors 0.20 are not loaded by transformers 5.23).
FP8 (`float-quantized`), MXFP4 and NVFP4 have codes and scales as ours; inputs stay as they are. What is neither is
refused, or stored in bfloat16 where that is allowed, and listed.

vLLM multiplies NVFP4 matrices that read the same input as one, by the factor of one of them. So those of one module
that are as wide get the largest factor, and their scales follow, which powers of two leave exact.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress.errors import InputError, RecipeError
from llmcompress.formats.exported import ALLOW_DENSE, Exported
from llmcompress.models.dense.companions import copy_companions
from llmcompress.models.dense.skeleton import transposed_linears
from llmcompress.models.files.checkpoint import write_checkpoint
from llmcompress.models.files.compressed import CompressedCheckpoint
from llmcompress.weight.expression import dense, float_steps
from llmcompress.weight.modules import LIKE
from llmcompress.weight.nodes import Grid, Minifloat, Weight
from llmcompress.weight.runtime_formats import compressed_tensors_obstacle, float_format, integer_bits

HEAD = "lm_head"  # which engines do not look for in the format
TENSOR_SCALE = "tensor_scale"  # in the payload of a layer


@dataclass(frozen=True)
class Scheme:
    """The form in which the format stores a matrix: the compressor's name, and the `weights` entry of a config group.

    `group_size`: None for one scale per row, or of all rows, as `strategy` says.
    """

    format: str
    num_bits: int
    strategy: str
    group_size: int | None = None
    scale_dtype: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The `weights` entry of a config group."""
        kind = "int" if self.format == "pack-quantized" else "float"
        own = {"group_size": self.group_size, "scale_dtype": self.scale_dtype}
        entries = {"num_bits": self.num_bits, "type": kind, "symmetric": True, "dynamic": False}
        return entries | {"strategy": self.strategy} | {key: value for key, value in own.items() if value is not None}


def to_compressed_tensors(opened: CompressedCheckpoint, output: Path, allow_dense: bool = False) -> Exported:
    """Write grids and floats as they are; other expressions raise InputError, or become bfloat16 with `allow_dense`."""
    turned = transposed_linears(opened.folder, opened.trust_remote_code)
    linears, factors = _linears(opened), shared_factors(opened)
    schemes: dict[str, Scheme] = {}
    plain: list[str] = []
    with write_checkpoint(output, opened.dense_bytes) as writer:
        copy_companions(opened.folder, writer.folder, opened.trust_remote_code)
        for layers, others in opened.parts():
            tensors = opened.read_plain(others)
            for layer in layers:
                weight = opened.expression(layer)
                why = obstacle(weight, factors.get(layer))
                why = why if layer in linears and layer not in turned else "it is no plain linear layer"
                if why is None:
                    schemes[layer], stored = converted(weight, factors.get(layer))
                    tensors |= {f"{layer}.{key}": value for key, value in stored.items()}
                    continue
                if not allow_dense:
                    raise InputError(f"{layer} does not fit compressed-tensors ({why}); {ALLOW_DENSE}")
                plain.append(layer)
                value = dense(weight).to(torch.bfloat16)
                tensors[f"{layer}.weight"] = value.T.contiguous() if layer in turned else value
            writer.add(tensors)
        size = writer.close()
        entry = {"quantization_config": _config(schemes, plain)}
        writer.write("config.json", json.dumps(opened.config | entry, indent=1))
    kinds = Counter("grids" if one.format == "pack-quantized" else "matrices of floats" for one in schemes.values())
    return Exported(
        to="compressed-tensors",
        output=str(output),
        bytes_before=opened.bytes,
        bytes_after=size,
        kept=tuple(f"{count} {kind}, value for value" for kind, count in (kinds or Counter(grids=0)).items()),
        changed=(f"{len(plain)} matrices became bfloat16, {plain[0]} first",) if plain else (),
    )


def shared_factors(opened: CompressedCheckpoint) -> dict[str, Tensor]:
    """Return the factor, float32 `[1]`, of each layer that has one: the largest of those beside it that are as wide."""
    beside: dict[tuple[str, int], dict[str, Tensor]] = {}
    for layer, layout in opened.layouts.items():
        if layout.header.get(TENSOR_SCALE):
            factor = layout.views(opened.read(f"{layer}.weight"))[TENSOR_SCALE]
            beside.setdefault((layer.rpartition(".")[0], layout.size[1]), {})[layer] = factor
    return {layer: max(found.values(), key=float) for found in beside.values() for layer in found}


def obstacle(w: Weight, factor: Tensor | None = None) -> str | None:
    """Return the reason why the format cannot hold `w` exactly, floats with this factor; None if it can."""
    why = compressed_tensors_obstacle(w)
    if why is None and isinstance(w, Minifloat) and factor is not None and scales_under(w, factor) is None:
        return "its scales are not exact under the factor of the matrices beside it; compress it again"
    return why


def scales_under(w: Minifloat, factor: Tensor) -> Tensor | None:
    """Return the scales of NVFP4, e4m3 `[out, groups]`, that are right under another factor; None if they are rounded.

    So they are where the factors are no powers of two, as of earlier versions.
    """
    wanted = float_steps(w) / factor
    stored = wanted.to(torch.float8_e4m3fn)
    exact = float(torch.frexp(factor).mantissa) == 0.5 and torch.equal(stored.float(), wanted)
    return stored if exact else None


def converted(w: Weight, factor: Tensor | None = None) -> tuple[Scheme, dict[str, Tensor]]:
    """Return the scheme and the tensors of a grid, or of floats with this factor, without an `obstacle`."""
    match w:
        case Grid():
            return _integers(w)
        case Minifloat(codes, scale, tensor_scale):
            kind, both = float_format(w), codes[:, ::2] | codes[:, 1::2] << 4
            if kind == "fp8":
                strategy = "channel" if len(scale) == len(codes) else "tensor"
                scale = scale if strategy == "channel" else scale[0]
                tensors = {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scale}
                return Scheme("float-quantized", 8, strategy), tensors
            if kind == "mxfp4":
                scheme = Scheme("mxfp4-pack-quantized", 4, "group", 32, "torch.uint8")
                return scheme, {"weight_packed": both, "weight_scale": scale}
            factor = tensor_scale if factor is None else factor
            if factor is not None and (scales := scales_under(w, factor)) is not None:
                tensors = {"weight_packed": both, "weight_scale": scales, "weight_global_scale": 1 / factor}
                return Scheme("nvfp4-pack-quantized", 4, "tensor_group", 16, "torch.float8_e4m3fn"), tensors
    raise TypeError(f"compressed-tensors does not hold this {type(w).__name__}")


def _integers(w: Grid) -> tuple[Scheme, dict[str, Tensor]]:
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
        "weight_packed": pack_to_int32(whole.to(torch.int8), integer_bits(w)),
        "weight_scale": scale,
        "weight_shape": torch.tensor(w.codes.shape),
    }
    strategy, group_size = ("channel", None) if scale.shape[1] == 1 else ("group", w.group_size)
    return Scheme("pack-quantized", integer_bits(w), strategy, group_size), tensors


def _linears(opened: CompressedCheckpoint) -> set[str]:
    """Return the names under which the format knows compressed modules: linears, not token tables or the head."""
    tables = {name.removesuffix(f".{LIKE}") for name in opened.files if name.endswith(f".{LIKE}")}
    return set(opened.layouts) - tables - {HEAD}


def _config(schemes: dict[str, Scheme], plain: list[str]) -> dict[str, Any]:
    groups: dict[Scheme, list[str]] = {}
    for layer, scheme in schemes.items():
        groups.setdefault(scheme, []).append(layer)
    formats = {scheme.format for scheme in schemes.values()} or {"pack-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {"targets": layers, "weights": scheme.to_json(), "format": scheme.format}
            for number, (scheme, layers) in enumerate(groups.items())
        },
        "ignore": [HEAD, *(layer for layer in plain if layer != HEAD)],
    }
