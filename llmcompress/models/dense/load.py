"""A whole model in memory: checked against the files beside its config, and against the machine, then loaded."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from llmcompress.errors import InputError, MemoryLimitError, is_out_of_memory
from llmcompress.models.dense.adapter import check_alone
from llmcompress.models.dense.config import (
    MODEL,
    check_entries,
    config_errors,
    load_config,
    model_code,
    packing_entry,
    read_entries,
    valid_config,
)
from llmcompress.models.dense.experts import experts_of
from llmcompress.models.dense.families import block_stack
from llmcompress.models.dense.headers import has_weights, model_files, read_headers
from llmcompress.models.dense.locate import Place
from llmcompress.models.dense.model import DenseModel, missing_weights, open_source
from llmcompress.models.dense.packed import OF_ENGINES, packing_method, rounds_inputs
from llmcompress.models.dense.sizes import is_dense, own_sizes, sized_outline
from llmcompress.models.dense.skeleton import auto_class, folder_skeleton
from llmcompress.models.files.reading import error_text
from llmcompress.runtime.devices import device_of
from llmcompress.runtime.memory import total_memory
from llmcompress.runtime.precision import ONE_BUILDER

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils.quantization_config import QuantizationConfigMixin


def load_model(
    place: Place,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    quantization: QuantizationConfigMixin | None = None,
    numbers: bool = False,
) -> PreTrainedModel:
    """Return a model in eval mode: dense, or compressed by llmcompress or a tool that transformers knows.

    The host's memory holds one tensor at a time on its way to another device. On the CPU a tensor whose stored dtype is
    `dtype` is a window into its file, which all processes share. `quantization`: to quantize a dense model while it is
    loaded. `numbers`: True to read FP8, bitsandbytes and compressed-tensors as numbers, and leave out that they round
    inputs. Raises InputError for a model that cannot be loaded, RecipeError for a missing device.
    """
    target = device_of(device)
    if place.adapter is not None or _is_wrapped(place.folder):
        if quantization is not None:
            raise InputError(f"{place.name} cannot be quantized while it is loaded; save it as a plain model first")
        return open_source(place).load(device, dtype)
    if quantization is None and has_weights(place.folder) and _is_numbers(place.folder, numbers):
        return open_source(place).load(device, dtype)
    if quantization is None and has_weights(place.folder) and _rounds_here(place):
        return _load_rounding(place, device, dtype)
    check_outline(place)
    trusted = model_code(place.folder, place.trust_remote_code)
    options: dict[str, Any] = {} if quantization is None else {"quantization_config": quantization}
    if options or target.type != "cpu":
        options["device_map"] = device
    failures: tuple[type[Exception], ...] = (*config_errors(), SafetensorError)
    model: PreTrainedModel
    try:
        with ONE_BUILDER:
            model, info = auto_class(load_config(place.folder, trusted)).from_pretrained(
                place.folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=trusted,
                output_loading_info=True,
                **options,
            )
    except failures as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{place.name} cannot be loaded ({error_text(error)}); download or write it again") from error
    if quantization is None and info["missing_keys"] and is_dense(read_entries(place.folder / MODEL, place.folder)):
        # transformers has drawn random numbers for them
        raise missing_weights(place.folder, sorted(info["missing_keys"]))
    if hasattr(model, "ct_decompress_hook"):  # which would wait for a forward of the whole model
        _decompress(model, dtype)
    module: nn.Module = model
    if quantization is None and model.device != target:  # what other tools quantized refuses to be moved
        module.to(target)
    return model.eval()


def _is_wrapped(folder: Path) -> bool:
    """True for a dense model with names that transformers would not know. Raises what `read_headers` raises."""
    return has_weights(folder) and any(header.wrapped for header in read_headers(folder).values())


def _is_numbers(folder: Path, alone: bool) -> bool:
    """True for what is read as numbers where transformers would unpack it late, or for a GPU alone if they suffice."""
    entries = read_entries(folder / MODEL, folder)
    method = packing_method(entries)
    if method in OF_ENGINES:
        return True
    if alone and method in ("fp8", "bitsandbytes", "compressed-tensors"):
        return True
    return method == "compressed-tensors" and not rounds_inputs(entries)


def _rounds_here(place: Place) -> bool:
    """True for what compressed-tensors stores with rounded inputs and transformers does not load: experts, and a cache
    of few bits, which stays as it is here."""
    entries = read_entries(place.folder / MODEL, place.folder)
    if packing_method(entries) != "compressed-tensors" or not rounds_inputs(entries):
        return False
    if packing_entry(entries).get("kv_cache_scheme"):
        return True
    return bool(experts_of(folder_skeleton(place.folder, trust_remote_code=place.trust_remote_code)))


def _load_rounding(place: Place, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model whose linears round what they read. Raises InputError for an unknown format of inputs."""
    source = open_source(place)
    model = source.load(device, dtype)
    for name, header in source.tensors.items():
        inputs = None if header.packing is None else header.packing.inputs
        if inputs is None:
            continue
        if inputs == "unknown":
            raise InputError(
                f"{place.name} rounds the inputs of {name} in a way that is not known; measure another model"
            )
        inputs.round_before(model.get_submodule(name.removesuffix(".weight")))
    return model


def _decompress(model: Any, dtype: torch.dtype) -> None:
    """Let compressed-tensors unpack a model now, into a `dtype`."""
    model.hf_quantizer.compressor.decompress_model(model)
    for parameter in model.parameters():
        if parameter.is_floating_point():  # what was NVFP4 is bfloat16
            parameter.data = parameter.data.to(dtype)


def check_outline(place: Place) -> PreTrainedModel | None:
    """Check a config against the tensors beside it, before transformers builds a model.

    Returns the model on meta, None for weights in other files than safetensors. Raises InputError for sizes beyond the
    tensors', and for a model whose code is not trusted.
    """
    folder = place.folder
    check_alone(folder)
    entries = read_entries(folder / MODEL, folder)
    check_entries(entries, str(folder / MODEL))
    packing = packing_entry(entries) or {}
    if not isinstance(packing, dict):
        raise InputError(f"{folder / MODEL} has a quantization_config that is no object; download or write it again")
    if not has_weights(folder):
        return None
    stored = read_headers(folder)
    model = sized_outline(valid_config(folder, place.trust_remote_code), place, stored, own_sizes(entries))
    weights = _weights(model)
    if not packing and weights > 2 * sum(prod(header.shape) for header in stored.values()):
        raise InputError(
            f"{folder / MODEL} describes a model of {weights} weights, which the files beside it lack; correct it"
        )
    return model


def passes_by_block(folder: Path) -> bool:
    """True for a dense model, and for one in few bits that computes the same with numbers in their place.

    Its blocks are read one at a time. Raises InputError for a config.json that cannot be read.
    """
    entries = read_entries(folder / MODEL, folder)
    return is_dense(entries) or (packing_method(entries) is not None and not rounds_inputs(entries))


def check_fits(
    device: str,
    doing: str,
    whole: Sequence[Place] = (),
    passing: Sequence[Place] = (),
    dtype: torch.dtype = torch.float32,
    way_out: str = "take a larger machine, or a device with --device",
    processes: int = 1,
) -> None:
    """Raise MemoryLimitError unless models in a `dtype` fit into the machine's memory together.

    `whole` ones are held whole, `passing` ones block by block: a compressed one as it is stored, beside the decoded
    block. `doing`, `way_out`: the beginning and the end of the message. `processes`: of this machine that hold them.
    """
    if str(device).partition(":")[0] != "cpu":
        return
    memory = total_memory()
    sizes = {place.name: _bytes_held(place, place in whole, dtype.itemsize) for place in (*whole, *passing)}
    if processes * sum(sizes.values()) > memory:
        models = " and ".join(f"{name} ({size / 1e9:.1f} GB)" for name, size in sizes.items())
        kind = str(dtype).removeprefix("torch.")
        each = f" in each of {processes} processes" if processes > 1 else ""
        raise MemoryLimitError(
            f"{doing} holds {models} in {kind}{each}, and this machine has {memory / 1e9:.1f} GB; {way_out}"
        )


def load_writer(source: DenseModel) -> PreTrainedModel:
    """Return a dense model on the CPU, to write calibration text. Raises MemoryLimitError if it does not fit there."""
    way_out = "give another text than dataset: self, or take a larger machine"
    check_fits("cpu", "writing calibration text", [source.place], way_out=way_out)
    return source.load()


def _bytes_held(place: Place, whole: bool, each: int) -> int:
    """Return the bytes of a model in memory; `each`: of a weight."""
    model = check_outline(place)
    if model is None:
        return 0
    if whole or _is_unpacked(place):
        return each * _weights(model)
    try:
        blocks = model.get_submodule(block_stack(model.config, model))
    except InputError:
        return each * _weights(model)  # it cannot pass block by block
    largest = max(map(_weights, blocks.children()))
    tables = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    stored = 0 if passes_by_block(place.folder) else sum(path.stat().st_size for path in model_files(place.folder))
    return stored + each * max(largest, *map(_weights, tables))


def _is_unpacked(place: Place) -> bool:
    """True for a model in few bits that `load_model` holds as numbers, all at once."""
    if passes_by_block(place.folder):
        return False
    method = packing_method(read_entries(place.folder / MODEL, place.folder))
    return place.adapter is not None or method == "compressed-tensors"


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
