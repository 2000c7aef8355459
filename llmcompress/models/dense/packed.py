"""Dense models that another library stored in few bits: headers that say how each matrix becomes numbers again.

One matrix is unpacked at a time, when it is read, by the library's own formula, and rounded once to the dtype of the
config. Shapes are checked before, since a file may claim anything and some of these libraries read where it says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmcompress.errors import InputError, list_names
from llmcompress.models.dense.config import MODEL, packing_entry
from llmcompress.models.dense.engine_packings import exl3_packings, mlx_packings
from llmcompress.models.dense.headers import DTYPES, FLOATS, Folder, Header, Packing, Packings, Stored, read_tensor
from llmcompress.models.files.reading import error_text
from llmcompress.weight.inputs import InputFormat, InputName

FP8 = {"F8_E4M3", "F8_E5M2"}
EXPONENTS = {"U8", "F8_E8M0"}  # dtypes of scales that are powers of two
FP8_BLOCK = (128, 128)
BLOCK_SIZES = {2**power for power in range(5, 13)}  # that bitsandbytes knows
STATE = "weight.quant_state.bitsandbytes__"  # the name of the JSON about a matrix in 4 bits, before nf4 or fp4
MOST_STATE = 10_000  # bytes of it
INPUT_FORMATS: dict[tuple[int, str, int | None, bool], InputName] = {  # by bits, type, columns of a group, symmetric
    (8, "float", None, True): "fp8",
    (8, "int", None, True): "int8",
    (4, "float", 16, True): "nvfp4",
    (8, "float", 32, True): "mxfp8",
}
OF_INPUTS = ("activation_scale", "input_scale", "input_zero_point", "input_global_scale", "output_scale")


def describe_few_bits(forms: str) -> str:
    """Return the sentence on a model whose weights come from these forms."""
    return f"weights come from {forms}: what rounds to as many bits looks better on them"


def packing_method(entries: Mapping[str, Any]) -> str | None:
    """Return the library's name of a packing in a config.json, None for one that is not read here."""
    settings = packing_entry(entries)
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return method if isinstance(method, str) and method in READERS else None


def rounds_inputs(entries: Mapping[str, Any]) -> bool:
    """True if linears of compressed-tensors or LLM.int8() round what they read too, which no number of theirs tells."""
    settings = packing_entry(entries)
    groups = settings.get("config_groups")
    if settings.get("load_in_8bit"):
        return True
    schemes = groups.values() if isinstance(groups, dict) else ()
    return any(isinstance(scheme, dict) and scheme.get("input_activations") for scheme in schemes)


def unpack_headers(stored: Stored, entries: Mapping[str, Any], place: Path) -> tuple[dict[str, Header], str]:
    """Return headers in which matrices of few bits are numbers of the config's dtype, and the forms they come from.

    entries: of config.json. Both are as stored where it names no packing that is read here. Raises InputError for
    tensors that do not belong together, or whose library is not installed.
    """
    method = packing_method(entries)
    if method is None:
        return dict(stored), ""
    package, read = READERS[method]
    if package and find_spec(package.replace("-", "_")) is None:
        raise InputError(f"{place} is stored by {package}, which is not installed; run `pip install {package}`")
    packings = read(Folder(place, stored, packing_entry(entries)))
    used = {part.key for packing in packings.values() for part in packing.parts.values()}
    owners = {name.rpartition(".")[0] for name in packings}
    used |= {key for key in stored if key.endswith(OF_INPUTS) and key.rpartition(".")[0] in owners}
    if packing_entry(entries).get("kv_cache_scheme"):  # for a cache of few bits, which nothing here has
        used |= {key for key in stored if key.endswith((".k_scale", ".v_scale"))}
    headers = {key: header for key, header in stored.items() if key not in used}
    dtype = _dtype(entries)
    for name, packing in packings.items():
        first = next(iter(packing.parts.values()))
        headers[name] = replace(first, shape=packing.shape, dtype=dtype, key=name, packing=packing)
    return headers, ", ".join(dict.fromkeys(map(str, packings.values())))


def _dtype(entries: Mapping[str, Any]) -> str:
    """Return safetensors' name of the dtype that a config asks for; bfloat16 without one."""
    inner = entries.get("text_config")
    both = (entries, inner if isinstance(inner, dict) else {})
    asked = next((each[key] for each in both for key in ("dtype", "torch_dtype") if each.get(key)), None)
    return next((name for name, dtype in DTYPES.items() if str(dtype) == f"torch.{asked}"), "BF16")


def _fp8(folder: Folder) -> Packings:
    """Matrices in FP8 with a scale for each block, `fp8` of transformers (DeepSeek-V3, arXiv 2412.19437)."""
    stored, block = folder.stored, folder.settings.get("weight_block_size") or FP8_BLOCK
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise InputError(f"{folder.place / MODEL} gives weight_block_size as {str(block)[:50]!r}; correct it")
    packings = {}
    for key, codes in stored.items():
        if codes.dtype not in FP8:
            continue
        scales = stored.get(f"{key}_scale_inv")
        if scales is None:
            raise InputError(f"{codes.file} holds {key} without {key}_scale_inv, its scales; download the model again")
        folder.require(scales.dtype in EXPONENTS | FLOATS.keys(), key, "FP8")
        *experts, rows, columns = codes.shape if len(codes.shape) in (2, 3) else (0, 0)
        blocks = (*experts, -(-rows // block[0]), -(-columns // block[1])) if columns else ()
        is_whole = not experts and prod(scales.shape) == 1  # one scale of the matrix
        folder.require(bool(blocks) and (scales.shape == blocks or is_whole), key, f"FP8 in blocks of {list(block)}")
        parts = {"weight": codes, "weight_scale_inv": scales}
        unpack = partial(_unpack_fp8, block=None if is_whole else block)
        form = "FP8 of one scale" if is_whole else "FP8 in blocks"
        rounds = bool(folder.settings.get("activation_scheme"))
        packings[key] = Packing(form, codes.shape, parts, unpack, "unknown" if rounds else None)
    return packings


def _unpack_fp8(parts: dict[str, Tensor], block: Sequence[int] | None) -> Tensor:
    """Return the numbers of codes `[out, in]` and scales `[blocks down, blocks across]`.

    transformers' formula knows whole blocks alone, so the last ones are filled up for it.
    """
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes, scales = parts["weight"], parts["weight_scale_inv"]
    if scales.element_size() > 1:
        scales = scales.float()
    *_, rows, columns = codes.shape
    if block is None:
        scales = scales.reshape(1, 1)
    else:
        codes = nn.functional.pad(codes.float(), (0, -columns % block[1], 0, -rows % block[0]))
    unpack: Any = Fp8Dequantize(None).convert
    numbers: Tensor = unpack({"weight": codes, "weight_scale_inv": scales})["weight"]
    return numbers[..., :rows, :columns]


def _mxfp4(folder: Folder) -> Packings:
    """Matrices of all experts `[experts, in, out]` in MXFP4, as gpt-oss was trained and released with."""
    packings = {}
    for key, codes in folder.stored.items():
        name, scales = key.removesuffix("_blocks"), folder.stored.get(f"{key.removesuffix('_blocks')}_scales")
        if name == key or scales is None:
            continue
        experts, out, blocks, width = codes.shape if len(codes.shape) == 4 else (0, 0, 0, 0)
        are_bytes = codes.dtype == "U8" and scales.dtype == "U8"
        folder.require(are_bytes and width == 16 and scales.shape == codes.shape[:-1], key, "MXFP4")
        parts = {"blocks": codes, "scales": scales}
        packings[name] = Packing("MXFP4", (experts, blocks * 32, out), parts, _unpack_mxfp4)
    return packings


def _unpack_mxfp4(parts: dict[str, Tensor]) -> Tensor:
    """Return the matrix `[in, out]` of codes `[out, in / 32, 16]` and scales `[out, in / 32]`, or those of experts."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    codes, scales = parts["blocks"], parts["scales"]
    numbers: Tensor = convert_moe_packed_tensors(codes.view(-1, *codes.shape[-3:]), scales.view(-1, *scales.shape[-2:]))
    return numbers if codes.dim() == 4 else numbers[0]


def _compressed_tensors(folder: Folder) -> Packings:
    """Matrices of any form that compressed-tensors stores, each by the scheme of its group in the config."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_targets

    try:
        config = QuantizationConfig.model_validate(dict(folder.settings))
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise InputError(
            f"{folder.place / MODEL} describes no model of compressed-tensors ({error_text(error)}); correct it"
        ) from error
    schemes = {target: group for group in config.config_groups.values() for target in group.targets}
    modules: dict[str, dict[str, Header]] = {}
    for key, header in folder.stored.items():
        module, _, name = key.rpartition(".")
        if name.startswith("weight"):
            modules.setdefault(module, {})[name] = header
    like, packings = nn.Linear(1, 1, device="meta"), dict[str, Packing]()
    for module, held in modules.items():
        if "weight_scale" not in held:
            continue
        scheme = next((schemes[target] for target in match_targets(module, like, schemes)), None)  # the closest match
        if scheme is None or scheme.weights is None:
            raise InputError(f"{folder.place / MODEL} has no group for {module}, which is packed; correct it")
        form = str(scheme.format or config.format)
        if form == CompressionFormat.mixed_precision:
            form = infer_module_format(nn.Linear, scheme).value
        try:
            compressor = BaseCompressor.get_value_from_registry(form)
            names = [name for name in compressor.compression_param_names(scheme) if name.startswith("weight")]
        except (KeyError, NotImplementedError) as error:
            raise InputError(
                f"{folder.place} is stored as {form[:50]!r}, which the installed compressed-tensors does not unpack; "
                f"start from the dense checkpoint"
            ) from error
        form += " of compressed-tensors"
        if held.keys() != set(names):
            raise InputError(
                f"{folder.place} stores {list_names(sorted(held))} of {module}, and {form} has {list_names(names)}; "
                f"download the model again"
            )
        parts = {name: held[name] for name in names}
        shape = _numbers_shape(folder, parts, scheme.weights, form)
        rounding = scheme.input_activations
        inputs = None if rounding is None else _input_format(folder.stored, module, rounding)
        unpack = partial(_unpack_compressed, scheme=scheme, compressor=compressor)
        packings[f"{module}.weight"] = Packing(form, shape, parts, unpack, inputs)
    return packings


def _input_format(stored: Stored, module: str, arguments: Any) -> InputFormat | Literal["unknown"]:
    """Return what the inputs of a linear are rounded to, as `Packing` has it."""
    kind = arguments.num_bits, arguments.type, arguments.group_size, arguments.symmetric
    name = INPUT_FORMATS.get(kind)
    scale = stored.get(f"{module}.input_global_scale" if name == "nvfp4" else f"{module}.input_scale")
    if name is None or (scale is None and arguments.dynamic is not True):
        return "unknown"
    return InputFormat(name, None if scale is None else float(read_tensor(scale)))


def _numbers_shape(folder: Folder, parts: Stored, weights: Any, form: str) -> tuple[int, int]:
    """Return the shape `[out, in]` of the numbers of a linear, whose `parts` have the codes first.

    weights: compressed-tensors' arguments. Raises InputError for codes and scales that do not fit each other.
    """
    codes, scales = next(iter(parts.values())), parts["weight_scale"].shape
    folder.require(len(codes.shape) == 2 and min(*codes.shape, weights.num_bits) > 0, codes.key, form)
    rows, columns = codes.shape
    if about := parts.get("weight_shape"):
        folder.require(about.shape == (2,) and about.dtype in ("I64", "I32"), codes.key, form)
        rows, columns = read_tensor(about).tolist()
        is_packed = codes.dtype == "I32" and codes.shape == (rows, -(-columns * weights.num_bits // 32))
        folder.require(is_packed and columns > 0, codes.key, form)
    elif "weight_packed" in parts:
        columns = codes.bytes // rows * 8 // weights.num_bits
    shapes: list[tuple[int, ...]] = [(rows, -(-columns // weights.group_size))] if weights.group_size else []
    if weights.strategy == "tensor":
        shapes = [(), (1,), (1, 1)]
    elif weights.strategy == "channel":
        shapes = [(rows,), (rows, 1)]
    elif weights.strategy == "block" and weights.block_structure:
        down, across = weights.block_structure
        shapes = [(-(-rows // down), -(-columns // across))]
    folder.require(scales in shapes, codes.key, form)
    return rows, columns


def _unpack_compressed(parts: dict[str, Tensor], scheme: Any, compressor: Any) -> Tensor:
    numbers: Tensor = compressor.decompress(parts, scheme)["weight"]
    return numbers


def _bitsandbytes(folder: Folder) -> Packings:
    """Matrices in NF4 or FP4 (QLoRA, arXiv 2305.14314), or in rows of int8 (LLM.int8(), arXiv 2208.07339)."""
    modules: dict[str, dict[str, Header]] = {}
    for key, header in folder.stored.items():
        for end in (".SCB", ".weight_format", ".weight"):
            module, is_part, part = key.partition(end)
            if is_part and (not part or part.startswith(".")):
                modules.setdefault(module, {})[(end + part).lstrip(".")] = header
                break
    packings = {}
    for module, held in modules.items():
        kinds = {name: name.rpartition("__")[2] for name in held if name.startswith(STATE)}
        if "weight" not in held or (not kinds and "SCB" not in held):
            continue
        codes = held["weight"]
        shape: tuple[int, ...] | None
        if kinds:
            parts = {name.removeprefix("weight."): header for name, header in held.items()}
            form, shape, unpack = f"{next(iter(kinds.values()))} of bitsandbytes", _shape_of_4bit(parts), _unpack_4bit
            folder.require({*kinds.values()} in ({"nf4"}, {"fp4"}) and shape is not None, codes.key, form)
        else:
            form, shape, parts, unpack = "int8 of bitsandbytes", codes.shape, held, _unpack_8bit
            fits = len(codes.shape) == 2 and codes.dtype == "I8" and held["SCB"].shape == codes.shape[:1]
            folder.require(fits and held["SCB"].dtype == "F32", codes.key, form)
        parts = {"weight": codes} | parts
        packings[f"{module}.weight"] = Packing(form, shape or (), parts, unpack, None if kinds else "unknown")
    return packings


def _shape_of_4bit(parts: Stored) -> tuple[int, int] | None:
    """Return the shape of the numbers of a matrix of bitsandbytes; None for parts that do not fit each other.

    Its library would read beyond such parts.
    """
    state = next((part for name, part in parts.items() if name.startswith("quant_state")), None)
    if state is None or state.dtype != "U8" or len(state.shape) != 1 or state.bytes > MOST_STATE:
        return None
    try:
        settings = json.loads(bytes(read_tensor(state).tolist()))
        rows, columns = settings["shape"]
        sizes = [settings["blocksize"]]
        if nested := "nested_absmax" in parts:
            sizes.append(settings["nested_blocksize"])
        is_float = settings["dtype"] in ("float32", "float16", "bfloat16")
        if not is_float or not all(type(size) is int and size in BLOCK_SIZES for size in sizes):
            return None
        if not all(type(size) is int and size > 0 for size in (rows, columns)):
            return None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    blocks = -(-rows * columns // sizes[0])
    expected = {"weight": ("U8", -(-rows * columns // 2)), "quant_map": ("F32", 16)}
    expected["absmax"] = ("U8", blocks) if nested else ("F32", blocks)
    if nested:
        expected |= {"nested_quant_map": ("F32", 256), "nested_absmax": ("F32", -(-blocks // sizes[1]))}
    found = {name: (part.dtype, prod(part.shape)) for name, part in parts.items() if part is not state}
    return (rows, columns) if found == expected else None


def _unpack_4bit(parts: dict[str, Tensor]) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    codes = parts.pop("weight")
    numbers: Tensor = dequantize_4bit(codes.view(-1, 1), QuantState.from_dict(parts, codes.device))
    return numbers


def _unpack_8bit(parts: dict[str, Tensor]) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    if parts.get("weight_format", torch.zeros(())).any():
        raise ValueError("its rows are in the order of a GPU")
    numbers: Tensor = int8_vectorwise_dequant(parts["weight"], parts["SCB"])
    return numbers


# By quant_method: the package that unpacks it, none where it is done here, and the reader
READERS: dict[str, tuple[str, Callable[[Folder], Packings]]] = {
    "fp8": ("transformers", _fp8),
    "mxfp4": ("transformers", _mxfp4),
    "compressed-tensors": ("compressed-tensors", _compressed_tensors),
    "bitsandbytes": ("bitsandbytes", _bitsandbytes),
    "mlx": ("", mlx_packings),
    "exl3": ("", exl3_packings),
}
OF_ENGINES = tuple(
    method for method, (package, _) in READERS.items() if not package
)  # which transformers does not load
