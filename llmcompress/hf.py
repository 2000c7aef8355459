"""The transformers plug-in: `AutoModelForCausalLM.from_pretrained` loads what we write, once llmcompress is imported.

A checkpoint's config lists every compressed linear with the layout of its payload; before the weights are read, those
modules are replaced on the meta device by `CompressedLinear`s, so the dense model never exists in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmcompress.checkpoint import FORMAT_VERSION
from llmcompress.errors import InputError
from llmcompress.modules import CompressedLinear, Layout, compressed_linears, put

NAME = "llmcompress"


class LLMCompressConfig(QuantizationConfigMixin):
    """`quantization_config` of a checkpoint: the layout of every compressed linear by module path."""

    def __init__(self, layers: dict[str, Any] | None = None, format_version: int = FORMAT_VERSION, **more: Any) -> None:
        if format_version != FORMAT_VERSION:
            raise InputError(
                f"this checkpoint has format version {format_version}, this llmcompress reads {FORMAT_VERSION}; "
                f"install the version of llmcompress that wrote it"
            )
        self.quant_method = NAME  # type: ignore[assignment]  # an enum of the built-in methods; a string works
        self.format_version = format_version
        self.layers = dict(layers or {})
        self.versions = more.get("versions", {})

    def layouts(self) -> dict[str, Layout]:
        """The layout of every compressed linear. Raises InputError for an entry that cannot be read."""
        found = {}
        for name, entry in self.layers.items():
            try:
                found[name] = Layout.from_json(entry)
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise InputError(f"config.json describes {name} in a way that cannot be read ({error})") from error
        return found


class LLMCompressQuantizer(HfQuantizer):
    """Puts compressed linears into a model that transformers is about to load."""

    quantization_config: LLMCompressConfig
    requires_calibration = True  # refuses from_pretrained(dense, quantization_config=...): compress first

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, layout in self.quantization_config.layouts().items():
            put(model, name, _empty(model, name, layout))
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for layer in compressed_linears(model).values():
            layer.requires_grad_(False)  # transformers asks for gradients of every float it loads
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """`save_pretrained` writes the payload as it is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top."""
        return True


def _empty(model: nn.Module, name: str, layout: Layout) -> CompressedLinear:
    """A compressed linear for the place `name`, on meta. Raises InputError where that place does not fit."""
    try:
        dense = model.get_submodule(name)
    except AttributeError as error:
        raise InputError(f"config.json lists {name}, which a {type(model).__name__} does not have") from error
    weight = getattr(dense, "weight", None)
    if not isinstance(weight, nn.Parameter) or sorted(weight.shape) != sorted(layout.size):
        raise InputError(f"config.json lists {name} as a linear of size {list(layout.size)}, which it is not")
    bias = getattr(dense, "bias", None)
    return CompressedLinear(layout, bias, device=torch.device("meta"))


AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(NAME, LLMCompressConfig)
AUTO_QUANTIZER_MAPPING.setdefault(NAME, LLMCompressQuantizer)
