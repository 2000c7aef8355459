"""A whole model in memory: checked against the files beside its config, and against the machine, then loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from llmcompress.errors import InputError, MemoryLimitError, is_out_of_memory, list_names
from llmcompress.models.dense.config import (
    check_numbers,
    config_errors,
    load_config,
    model_code,
    read_entries,
    reason,
    valid_config,
)
from llmcompress.models.dense.families import block_stack
from llmcompress.models.dense.headers import Header, read_headers
from llmcompress.models.dense.locate import Place
from llmcompress.models.dense.skeleton import auto_class, outline
from llmcompress.models.files.integrity import weight_files
from llmcompress.runtime.devices import device_of
from llmcompress.runtime.memory import total_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils.quantization_config import QuantizationConfigMixin


def own_sizes(entries: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the `[out, in]` by linear that the entries of such a model's config.json tell; empty for any other model.

    Raises InputError for entries that are damaged.
    """
    packing = entries.get("quantization_config")
    if not isinstance(packing, dict) or packing.get("layers") or not packing.get("sizes"):
        return {}
    from llmcompress.models.transformers.hf_quantizer import NAME, LLMCompressConfig

    return LLMCompressConfig(**packing).sizes if packing.get("quant_method") == NAME else {}


def is_dense(entries: Mapping[str, Any]) -> bool:
    """True if the entries of a config.json tell of a model without a compressed matrix."""
    return not entries.get("quantization_config") or bool(own_sizes(entries))


def with_sizes(model: PreTrainedModel, sizes: Mapping[str, list[int]]) -> PreTrainedModel:
    """Return a model on meta with its linears resized. Raises InputError for sizes that do not fit each other."""
    if sizes:
        from llmcompress.models.transformers.hf_quantizer import resize

        resize(model, sizes)
    return model


ADAPTER = "adapter_config.json"


def load_model(
    place: Place,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    quantization: QuantizationConfigMixin | None = None,
) -> PreTrainedModel:
    """Return a model in eval mode: dense, or compressed by llmcompress or a tool that transformers knows.

    The host's memory holds one tensor at a time on its way to another device, and on the CPU none whose stored dtype is
    `dtype`: that one is a window into its file, which all processes share. `quantization` says how to quantize a dense
    model while it is loaded. Raises InputError if the model cannot be loaded, RecipeError if the device is missing.
    """
    there = device_of(device)
    is_dense = check_outline(place)[0] and quantization is None
    trusted = model_code(place.folder, place.trust_remote_code)
    how: dict[str, Any] = {} if quantization is None else {"quantization_config": quantization}
    if how or there.type != "cpu":
        how["device_map"] = device
    failures: tuple[type[Exception], ...] = (*config_errors(), SafetensorError)
    model: PreTrainedModel
    try:
        loader = auto_class(load_config(place.folder, trusted))
        model, found = loader.from_pretrained(
            place.folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=trusted,
            output_loading_info=True,
            **how,
        )
    except failures as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{place.name} cannot be loaded ({reason(error)}); download or write it again") from error
    if is_dense and found["missing_keys"]:  # transformers has drawn random numbers for them
        raise _lacking(place.folder, sorted(found["missing_keys"]))
    placed: nn.Module = model
    if quantization is None and model.device != there:  # what other tools quantized refuses to be moved
        placed.to(there)
    return model.eval()


def check_outline(found: Place) -> tuple[bool, PreTrainedModel | None]:
    """Check a config against the tensors beside it, before transformers builds a model.

    Returns True if it is dense, and the model on meta, None for weights in other files than safetensors.

    Raises InputError for sizes that they do not have, and for a model whose code is not trusted.
    """
    folder = found.folder
    if (folder / ADAPTER).is_file():
        raise InputError(
            f"{folder} has an {ADAPTER} beside its weights, so transformers would load the model that it names; "
            f"remove that file, or merge the adapter into the model"
        )
    place = folder / "config.json"
    entries = read_entries(place, folder)
    check_numbers(entries.get, str(place))
    packing = entries.get("quantization_config") or {}
    if not isinstance(packing, dict):
        raise InputError(f"{place} has a quantization_config that is no object; download or write it again")
    if not any(folder.glob("*.safetensors*")):
        return is_dense(entries), None
    stored = read_headers(folder)
    config = valid_config(folder, found.trust_remote_code)
    model = outline(config, folder, len(stored), _disk(stored), found.trust_remote_code)
    with_sizes(model, own_sizes(entries))
    weights = sum(parameter.numel() for parameter in model.parameters())
    if not packing and weights > 2 * sum(prod(header.shape) for header in stored.values()):
        raise InputError(f"{place} describes a model of {weights} weights, which the files beside it lack; correct it")
    return is_dense(entries), model


def _disk(stored: dict[str, Header]) -> int:
    """Return the bytes of the files that hold these tensors."""
    return sum(path.stat().st_size for path in {header.file for header in stored.values()})


def _lacking(folder: Path, missing: list[str]) -> InputError:
    return InputError(
        f"{folder} lacks weights that its config requires: {list_names(missing)}; download the model again or correct "
        f"config.json"
    )


def check_fits(
    device: str,
    doing: str,
    whole: Sequence[Place] = (),
    passing: Sequence[Place] = (),
    dtype: torch.dtype = torch.float32,
) -> None:
    """Raise MemoryLimitError if models in a `dtype`, `whole` ones and those `passing` block by block, do not fit into
    the machine's memory together.

    Of those that pass, a compressed one is in memory as it is stored, beside the block that is decoded. `doing` is the
    beginning of the sentence.
    """
    if device != "cpu":
        return
    there = total_memory()
    sizes = {place.name: _held(place, place in whole, dtype.itemsize) for place in (*whole, *passing)}
    if sum(sizes.values()) > there:
        held = " and ".join(f"{name} ({size / 1e9:.1f} GB)" for name, size in sizes.items())
        kind = str(dtype).removeprefix("torch.")
        raise MemoryLimitError(
            f"{doing} holds {held} in {kind}, and this machine has {there / 1e9:.1f} GB; take a larger "
            f"machine, or a device with --device"
        )


def _held(place: Place, whole: bool, each: int) -> int:
    """Return the bytes that a model takes; `each`: those of a weight."""
    is_dense, model = check_outline(place)
    if model is None:
        return 0
    if whole:
        return each * _weights(model)
    try:
        blocks = model.get_submodule(block_stack(model.config, model))
    except InputError:
        return each * _weights(model)  # it cannot pass block by block
    largest = max(map(_weights, blocks.children()))
    tables = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    stored = 0 if is_dense else sum(path.stat().st_size for path in weight_files(place.folder))
    return stored + each * max(largest, *map(_weights, tables))


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
