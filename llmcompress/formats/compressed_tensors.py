"""To compressed-tensors, which transformers and vLLM read: integer grids and floats of few bits, value for value.

Grids (`pack-quantized`) become symmetric integers of the format, centred on a code: odd numbers of levels as they are;
our symmetric b bits, centred between two codes, as the odd integers of b + 1 bits at half the scale; asymmetric b bits
less their zero point as b + 1 (packed zero points of compressed-tensors 0.20 are not loaded by transformers 5.23).
FP8 (`float-quantized`), MXFP8, MXFP4 and NVFP4 have codes and scales as ours. Other matrices are refused, or stored in
bfloat16 where that is allowed, and listed.

Inputs that are rounded have an entry `input_activations`, and a calibrated scale beside the weight. Integers that
multiply integers are stored in a byte each (`int-quantized`), also those of 4 bits.

Experts have the names of the Hub, and all of a block one form, as vLLM puts them into one tensor. Routers stay dense.

vLLM multiplies NVFP4 matrices that read the same input as one, by the factor of one of them. So those of one module
that are as wide get the largest factor, and their scales follow, which powers of two leave exact.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcompress.errors import InputError, RecipeError
from llmcompress.formats.config_entries import ModelConfig
from llmcompress.formats.engine_files import EngineFiles, ExportReport, UnfitError, write_layers
from llmcompress.models.dense.experts import experts_of, holder
from llmcompress.models.dense.families import architecture
from llmcompress.models.dense.skeleton import folder_skeleton
from llmcompress.models.dense.stored_names import hub_paths
from llmcompress.models.files import file_names
from llmcompress.models.files.checkpoint import write_checkpoint
from llmcompress.models.files.compressed import CompressedCheckpoint
from llmcompress.reporting import report as reports
from llmcompress.weight.expression import float_steps
from llmcompress.weight.inputs import InputFormat, InputName
from llmcompress.weight.modules import LIKE
from llmcompress.weight.nodes import Grid, Minifloat, Weight
from llmcompress.weight.runtime_formats import compressed_tensors_obstacle, float_format, integer_bits

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

HEAD = "lm_head"  # which engines do not look for in the format
TENSOR_SCALE = "tensor_scale"  # in the payload of a layer
KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
HEADS_FILL_WIDTH = ("qwen2",)  # model types of which vLLM takes the width of a head to be width / heads
NOT_LOADED = {  # why vLLM does not load model types in this format
    "bloom": "it reshapes all that is stored of query_key_value, the shapes of packed matrices too",
    "falcon_h1": "it looks up the forms of matrices by names that falcon_h1 does not have",
    **dict.fromkeys(("mamba", "falcon_mamba"), "its Mamba multiplies dense matrices alone"),
}
INTEGERS = ("pack-quantized", "int-quantized")  # formats of grids


@dataclass(frozen=True)
class Scheme:
    """The form in which the format stores a matrix: the compressor's name, and the `weights` entry of a config group.

    `group_size`: None for one scale per row, or of all rows, as `strategy` says. `inputs`: the format of inputs and
    whether its scale is calibrated; None if they stay as they are.
    """

    format: str
    num_bits: int
    strategy: str
    group_size: int | None = None
    scale_dtype: str | None = None
    inputs: tuple[InputName, bool] | None = None

    def group(self, targets: list[str]) -> dict[str, Any]:
        """Return the config group of layers."""
        inputs = {} if self.inputs is None else {"input_activations": _input_entry(*self.inputs)}
        return {"targets": targets, "weights": self.to_json(), **inputs, "format": self.format}

    def to_json(self) -> dict[str, Any]:
        """Return the `weights` entry of a config group."""
        kind = "int" if self.format in INTEGERS else "float"
        own = {"group_size": self.group_size, "scale_dtype": self.scale_dtype}
        entries = {"num_bits": self.num_bits, "type": kind, "symmetric": True, "dynamic": False}
        return entries | {"strategy": self.strategy} | {key: value for key, value in own.items() if value is not None}


def kv_scales(folder: Path) -> dict[str, list[float]]:
    """Return the scales of keys and values that a checkpoint's report has, by path of attention."""
    return reports.read(folder).kv_scales if (folder / file_names.REPORT).is_file() else {}


@dataclass(frozen=True)
class StoredExperts:
    """The experts of a checkpoint. `paths`: on the Hub, by module path; nothing for a model without experts.
    `members`: the matrices of each block's experts, by the path of these. `beside`: other modules next to them."""

    paths: dict[str, str]
    members: dict[str, list[str]]
    beside: list[str]

    @staticmethod
    def of(opened: CompressedCheckpoint) -> StoredExperts:
        """Read names alone. Raises InputError for a family that stores the experts of a block as one tensor."""
        experts = experts_of(opened.skeleton)
        if not experts:
            return StoredExperts({}, {}, [])
        plain = folder_skeleton(opened.folder, unfused=False, trust_remote_code=opened.trust_remote_code)
        own = [name.removesuffix(".weight") for name in opened.files if name.endswith(".weight")]
        members = {path: [name for name in own if holder(name, experts) == path] for path in experts}
        blocks = tuple(f"{path.rpartition('.')[0]}." for path in experts)
        beside = [name for name in own if name.startswith(blocks) and holder(name, experts) is None]
        return StoredExperts(hub_paths(plain, experts, own), members, beside)

    def targets(self, files: EngineFiles[Scheme]) -> tuple[dict[str, Scheme], list[str]]:
        """Return the schemes by path or pattern as the config has them, and what readers are to leave as it is.

        Raises InputError for experts of a block in several forms.
        """
        inside = {name for names in self.members.values() for name in names}
        schemes = {name: scheme for name, scheme in files.packed.items() if name not in inside}
        plain = [name for name in dict.fromkeys((*files.plain, *self.beside)) if name not in {*schemes, *inside}]
        stored = {_target(self.paths.get(name, name)): scheme for name, scheme in schemes.items()}
        ignored = [self.paths.get(name, name) for name in plain]
        for path, names in self.members.items():
            pattern = f"re:{re.escape(self.paths[names[0]].rsplit('.', 2)[0])}[.].*"
            forms = {files.packed.get(name) for name in names}
            if len(forms) > 1:
                raise InputError(
                    f"{path} holds its experts in several forms, and vLLM reads one; give them the same steps"
                )
            if (form := forms.pop()) is None:
                ignored.append(pattern)
            else:
                stored[pattern] = form
        return stored, ignored


def _target(path: str) -> str:
    """Return a module path, or a pattern for a matrix of what files call `mamba` and vLLM looks up as `mixer`."""
    before, inside, leaf = path.partition(".mamba.")
    return f"re:{re.escape(before)}[.](mamba|mixer)[.]{re.escape(leaf)}$" if inside else path


def to_compressed_tensors(opened: CompressedCheckpoint, output: Path, allow_dense: bool = False) -> ExportReport:
    """Write grids and floats as they are; other expressions raise InputError, or become bfloat16 with `allow_dense`."""
    pack = partial(_pack_layer, opened, _linear_names(opened), shared_factors(opened))
    experts, scales = StoredExperts.of(opened), kv_scales(opened.folder)
    with write_checkpoint(output, opened.dense_bytes if allow_dense else opened.bytes) as writer:
        files = write_layers(opened, writer, "compressed-tensors", pack, torch.bfloat16, allow_dense, experts.paths)
        if scales:
            pairs = ((at, *pair) for at, own in scales.items() for pair in zip("kv", own, strict=True))
            writer.add({f"{at}.{letter}_scale": torch.tensor([scale]) for at, letter, scale in pairs})
        size = writer.close()
        config = _quantization_config(*experts.targets(files)) | ({"kv_cache_scheme": KV_CACHE} if scales else {})
        entry = {"quantization_config": config}
        writer.write("config.json", json.dumps(opened.config | entry, indent=1))
    schemes = files.packed.values()
    kinds = Counter("grids" if scheme.format in INTEGERS else "matrices of floats" for scheme in schemes)
    kept = tuple(f"{count} {kind}, value for value" for kind, count in (kinds or Counter(grids=0)).items())
    notes = (*files.changes(), *_obstacles_to_vllm(opened, files))
    return ExportReport("compressed-tensors", str(output), opened.bytes, size, kept, notes)


def model_obstacle(config: PreTrainedConfig) -> str | None:
    """Return why vLLM does not load a model; None if it does."""
    if config.model_type in NOT_LOADED:
        return NOT_LOADED[config.model_type]
    obstacle = next(ModelConfig(config).head_obstacles(), None) if config.model_type in HEADS_FILL_WIDTH else None
    return obstacle and f"it takes heads of {config.model_type} to fill the width, and there are {obstacle}"


def _obstacles_to_vllm(opened: CompressedCheckpoint, files: EngineFiles[Scheme]) -> Iterator[str]:
    """Yield a sentence on the model, and one if linears that vLLM multiplies as one matrix are of several forms."""
    if (why := model_obstacle(opened.skeleton.config)) is not None:
        yield f"vLLM will not load this: {why}"
    blocks = architecture(opened.skeleton.config, opened.skeleton).blocks
    siblings = (names for block in blocks for names in block.siblings())
    unlike = [names for names in siblings if len({files.packed.get(name) for name in names}) > 1]
    if unlike:
        yield (
            f"vLLM will not load this: it multiplies {', '.join(unlike[0])} as one matrix, and they have several "
            f"forms, as {len(unlike)} such groups do"
        )


def _linear_names(opened: CompressedCheckpoint) -> set[str]:
    """Return the names under which the format knows compressed modules: linears, not token tables or the head."""
    tables = {name.removesuffix(f".{LIKE}") for name in opened.files if name.endswith(f".{LIKE}")}
    return set(opened.layouts) - tables - {HEAD}


def shared_factors(opened: CompressedCheckpoint) -> dict[str, Tensor]:
    """Return the factor, float32 `[1]`, of each layer that has one: the largest in its module and of its width."""
    beside: dict[tuple[str, int], dict[str, Tensor]] = {}
    for layer, layout in opened.layouts.items():
        if layout.header.get(TENSOR_SCALE):
            factor = layout.views(opened.read(f"{layer}.weight"))[TENSOR_SCALE]
            beside.setdefault((layer.rpartition(".")[0], layout.size[1]), {})[layer] = factor
    return {layer: max(factors.values(), key=float) for factors in beside.values() for layer in factors}


def _pack_layer(
    opened: CompressedCheckpoint, linears: set[str], factors: Mapping[str, Tensor], layer: str, w: Weight
) -> tuple[Scheme, dict[str, Tensor]]:
    if layer not in linears:
        raise UnfitError("it is no plain linear layer")
    return pack_matrix(w, factors.get(layer), opened.layouts[layer].inputs)


def _input_entry(name: InputName, is_calibrated: bool) -> dict[str, Any]:
    """Return the `input_activations` entry of a config group."""
    bits, kind = (4 if name == "nvfp4" else 8), ("int" if name == "int8" else "float")
    own: dict[str, Any] = {"strategy": "tensor" if is_calibrated else "token", "dynamic": not is_calibrated}
    if name == "nvfp4":
        own = {"strategy": "tensor_group", "dynamic": "local", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
    elif name == "mxfp8":
        own = {"strategy": "group", "dynamic": True, "group_size": 32, "scale_dtype": "torch.uint8"}
    return {"num_bits": bits, "type": kind, "symmetric": True} | own


def pack_matrix(
    w: Weight, factor: Tensor | None = None, inputs: InputFormat | None = None
) -> tuple[Scheme, dict[str, Tensor]]:
    """Return the scheme and the tensors of a grid, or of floats with this factor, that multiplies such inputs.

    Raises UnfitError where the format cannot hold it exactly.
    """
    why = compressed_tensors_obstacle(w)
    if why is not None:
        raise UnfitError(why)
    if inputs is not None:
        if isinstance(w, Grid) and inputs.format == "int8":
            scheme, tensors = _pack_bytes(w)
        else:
            scheme, tensors = pack_matrix(w, factor)
        name = "input_global_scale" if inputs.format == "nvfp4" else "input_scale"
        stored = {} if inputs.scale is None else {name: torch.tensor([inputs.scale])}
        return replace(scheme, inputs=(inputs.format, inputs.scale is not None)), tensors | stored
    match w:
        case Grid():
            return _pack_integers(w)
        case Minifloat(codes, scale, tensor_scale):
            kind, pairs = float_format(w), codes[:, ::2] | codes[:, 1::2] << 4
            if kind == "fp8":
                strategy = "channel" if len(scale) == len(codes) else "tensor"
                scale = scale if strategy == "channel" else scale[0]
                tensors = {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scale}
                return Scheme("float-quantized", 8, strategy), tensors
            if kind == "mxfp8":
                tensors = {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scale}
                return Scheme("mxfp8-quantized", 8, "group", 32, "torch.uint8"), tensors
            if kind == "mxfp4":
                scheme = Scheme("mxfp4-pack-quantized", 4, "group", 32, "torch.uint8")
                return scheme, {"weight_packed": pairs, "weight_scale": scale}
            factor = tensor_scale if factor is None else factor
            if factor is not None:
                tensors = {"weight_packed": pairs, "weight_scale": _scales_under(w, factor)}
                scheme = Scheme("nvfp4-pack-quantized", 4, "tensor_group", 16, "torch.float8_e4m3fn")
                return scheme, tensors | {"weight_global_scale": 1 / factor}
    raise TypeError(f"compressed-tensors does not hold this {type(w).__name__}")


def planned_tensors(w: Weight, inputs: InputName | None = None, is_calibrated: bool = False) -> dict[str, Tensor]:
    """Return tensors of the sizes of those of `pack_matrix`; `w` may be without values."""
    match w:
        case Grid(codes, scale):
            words = codes.new_empty(len(codes), -(-codes.shape[1] * integer_bits(w) // 32), dtype=torch.int32)
            packed = {"weight_packed": words, "weight_shape": codes.new_empty(2, dtype=torch.int64)}
            tensors = {"weight": codes} if inputs == "int8" else packed
        case Minifloat(codes, scale, factor):
            tensors = {"weight_packed": codes[:, ::2]} if w.form == "e2m1" else {"weight": codes}
            tensors |= {} if factor is None else {"weight_global_scale": factor}
        case _:
            raise TypeError(f"compressed-tensors does not hold this {type(w).__name__}")
    return tensors | {"weight_scale": scale} | ({"input_scale": torch.empty(1)} if is_calibrated else {})


def _scales_under(w: Minifloat, factor: Tensor) -> Tensor:
    """Return the scales of NVFP4, e4m3 `[out, groups]`, that are right under another factor.

    Raises UnfitError where they are rounded: factors of earlier versions are no powers of two.
    """
    wanted = float_steps(w) / factor
    stored = wanted.to(torch.float8_e4m3fn)
    if float(torch.frexp(factor).mantissa) != 0.5 or not torch.equal(stored.float(), wanted):
        raise UnfitError("its scales are not exact under the factor of the matrices beside it; compress it again")
    return stored


def _pack_integers(w: Grid) -> tuple[Scheme, dict[str, Tensor]]:
    try:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    except ImportError as error:
        raise RecipeError('this export needs compressed-tensors; run pip install "llmcompress[export]"') from error
    scheme, tensors = _pack_bytes(w)
    packed = {"weight_packed": pack_to_int32(tensors.pop("weight"), scheme.num_bits)}
    shape = {"weight_shape": torch.tensor(w.codes.shape)}
    return replace(scheme, format="pack-quantized"), packed | tensors | shape


def _pack_bytes(w: Grid) -> tuple[Scheme, dict[str, Tensor]]:
    """Return a grid as integers around 0, a byte each."""
    codes, scale = w.codes.to(torch.int16), w.scale
    if w.zero is not None:
        whole = codes - w.zero.to(torch.int16).repeat_interleave(w.group_size, 1)
    elif w.levels % 2:
        whole = codes - w.levels // 2
    else:
        whole, scale = 2 * codes - (w.levels - 1), (scale.float() / 2).to(scale.dtype)
    strategy, group_size = ("channel", None) if scale.shape[1] == 1 else ("group", w.group_size)
    tensors = {"weight": whole.to(torch.int8), "weight_scale": scale}
    return Scheme("int-quantized", integer_bits(w), strategy, group_size), tensors


def _quantization_config(schemes: Mapping[str, Scheme], plain: list[str]) -> dict[str, Any]:
    groups: dict[Scheme, list[str]] = {}
    for layer, scheme in schemes.items():
        groups.setdefault(scheme, []).append(layer)
    formats = {scheme.format for scheme in schemes.values()} or {"pack-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": scheme.group(layers) for number, (scheme, layers) in enumerate(groups.items())
        },
        "ignore": [HEAD, *(layer for layer in plain if layer != HEAD)],
    }
