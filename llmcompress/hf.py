"""The transformers plug-in: `AutoModelForCausalLM.from_pretrained` loads what we write, once llmcompress is imported.

A checkpoint's config lists every compressed linear with the layout of its payload; before the weights are read, those
modules are replaced on the meta device by `CompressedLinear`s, so the dense model never exists in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmcompress.checkpoint import FORMAT_VERSION, check_config
from llmcompress.errors import InputError
from llmcompress.modules import (
    NAMES,
    CompressedEmbedding,
    CompressedLinear,
    Layout,
    compressed_modules,
    put,
)
from llmcompress.validation import MENDING, Expected, check, digests

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STORED = NAMES | {torch.bool: "BOOL", torch.int32: "I32", torch.int64: "I64"}  # buffers that models keep
NAME = "llmcompress"


class LLMCompressConfig(QuantizationConfigMixin):
    """`quantization_config` of a checkpoint: `layers` gives each compressed module's number in the list `layouts`.

    Every layout is listed once: transformers copies its configs dozens of times while it loads.
    """

    def __init__(
        self,
        layers: dict[str, int] | None = None,
        layouts: list[dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        **more: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise InputError(
                f"this checkpoint has format version {format_version}, this llmcompress reads {FORMAT_VERSION}; "
                f"install the version of llmcompress that wrote it"
            )
        self.quant_method = NAME  # type: ignore[assignment]  # an enum of the built-in methods; a string works
        self.format_version = format_version
        self.layers = dict(layers or {})
        self.layouts = list(layouts or [])
        self.versions = more.get("versions", {})

    def table(self) -> dict[str, Layout]:
        """The layout of every compressed module by name. Raises InputError for an entry that cannot be read."""
        known: dict[int, Layout] = {}
        for name, number in self.layers.items():
            try:
                if number not in known:
                    known[number] = Layout.from_json(self.layouts[number])
            except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
                raise InputError(
                    f"config.json describes {name} in a way that cannot be read ({error}); {MENDING}"
                ) from error
        return {name: known[number] for name, number in self.layers.items()}


def table_entry(table: Mapping[str, Layout]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint with these layouts by module name."""
    numbers: dict[str, int] = {}
    layouts: list[dict[str, Any]] = []
    layers = {}
    for name, layout in table.items():
        entry = layout.to_json()
        key = json.dumps(entry)
        if key not in numbers:
            numbers[key] = len(layouts)
            layouts.append(entry)
        layers[name] = numbers[key]
    return {"quant_method": NAME, "format_version": FORMAT_VERSION, "layouts": layouts, "layers": layers}


class LLMCompressQuantizer(HfQuantizer):
    """Puts compressed linears into a model that transformers is about to load."""

    quantization_config: LLMCompressConfig
    requires_calibration = True  # refuses from_pretrained(dense, quantization_config=...): compress first

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, layout in self.quantization_config.table().items():
            put(model, name, _empty(model, name, layout))
        tie_head(model)
        if files := [Path(name) for name in kwargs.get("checkpoint_files") or ()]:  # none where tensors were passed
            check(files, expected(model), model.all_tied_weights_keys)
            check_config(files[0].parent)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for layer in compressed_modules(model).values():
            layer.requires_grad_(False)  # transformers asks for gradients of every float it loads
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """`save_pretrained` writes the payload as it is."""
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """For `save_pretrained`: the model's own tensors, and their digests for the header."""
        tensors = model.state_dict()
        if any(tensor.is_meta for tensor in tensors.values()):
            tensors = get_state_dict_offloaded_model(model)
        return None, digests(tensors)

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top."""
        return True


def expected(model: nn.Module) -> dict[str, Expected]:
    """What a prepared model needs from its checkpoint, by name: payload types are exact, dense floats may be any."""
    payload = {f"{name}.{key}" for name, layer in compressed_modules(model).items() for key in layer.layout.tensors}
    return {
        name: Expected(
            tuple(value.shape), None if value.is_floating_point() and name not in payload else STORED[value.dtype]
        )
        for name, value in model.state_dict().items()
    }


def tie_head(model: PreTrainedModel) -> None:
    """Where the output head is tied to an embedding that is compressed now, gives it the same payload."""
    modules = compressed_modules(model)
    for alias, origin in list(model.all_tied_weights_keys.items()):
        head, table = alias.rpartition(".")[0], modules.get(origin.rpartition(".")[0])
        if isinstance(table, CompressedEmbedding):
            put(model, head, CompressedLinear(table.layout, device=torch.device("meta")))
            same = {f"{head}.{key}": f"{origin.rpartition('.')[0]}.{key}" for key in table.layout.tensors}
            model.all_tied_weights_keys = model.all_tied_weights_keys | same
            model._tied_weights_keys = dict(model._tied_weights_keys or {}) | same  # saving goes by these


def _empty(model: nn.Module, name: str, layout: Layout) -> CompressedLinear | CompressedEmbedding:
    """A compressed module for the place `name`, on meta. Raises InputError where that place does not fit."""
    try:
        dense = model.get_submodule(name)
    except AttributeError as error:
        raise InputError(
            f"config.json lists {name}, which a {type(model).__name__} does not have; {MENDING}"
        ) from error
    weight = getattr(dense, "weight", None)
    if not isinstance(weight, nn.Parameter) or sorted(weight.shape) != sorted(layout.size):
        raise InputError(f"config.json gives {name} the size {list(layout.size)}, which it does not have; {MENDING}")
    if isinstance(dense, nn.Embedding):
        return CompressedEmbedding(layout, torch.get_default_dtype(), device=torch.device("meta"))
    return CompressedLinear(layout, getattr(dense, "bias", None), device=torch.device("meta"))


AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(NAME, LLMCompressConfig)
AUTO_QUANTIZER_MAPPING.setdefault(NAME, LLMCompressQuantizer)
