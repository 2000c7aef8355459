"""The interfaces of vLLM that the plug-in uses, as its documentation describes them, and no more.

Layers ask the config for their method, let it create their weights, and multiply by it. `load` and `finish` do what
vLLM's loader does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

LAYERS = "vllm.model_executor.layers"


class QuantizationConfig:
    """Base of all configs; a model tells it which of its layers are fused."""

    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class LinearMethodBase:
    """Base of all methods."""

    def create_weights(self, layer: nn.Module, *sizes: Any, **more: Any) -> None:
        raise NotImplementedError


class UnquantizedLinearMethod(LinearMethodBase):
    """An ordinary weight; its parts are loaded as they come."""

    def create_weights(self, layer: nn.Module, *sizes: Any, **more: Any) -> None:
        layer.register_parameter("weight", nn.Parameter(torch.empty(sum(sizes[1]), sizes[0], dtype=sizes[4])))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, layer.weight, bias)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        return nn.functional.embedding(input_, layer.weight)


class UnquantizedEmbeddingMethod(UnquantizedLinearMethod):
    """The same of a table."""


class LinearBase(nn.Module):
    """A linear of one or several parts; `ranks`: processes that share its inputs."""

    def __init__(self, width: int, parts: list[int], config: Any, prefix: str, ranks: int = 1) -> None:
        super().__init__()
        self.quant_method = config.get_quant_method(self, prefix)
        self.quant_method.create_weights(
            self, width // ranks, parts, width, sum(parts), torch.float32, weight_loader=None
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.quant_method.apply(self, x, None)
        return found


class VocabParallelEmbedding(nn.Module):
    """A table, whose rows are filled up to a multiple of 64."""

    def __init__(self, rows: int, width: int, config: Any, prefix: str) -> None:
        super().__init__()
        padded = -(-rows // 64) * 64
        self.quant_method = config.get_quant_method(self, prefix) or UnquantizedEmbeddingMethod()
        self.quant_method.create_weights(self, width, [padded], width, padded, torch.float32, weight_loader=None)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.quant_method.embedding(self, ids)
        return found


class ParallelLMHead(VocabParallelEmbedding):
    """A head, which may be tied to a table."""

    def tie_weights(self, table: VocabParallelEmbedding) -> Any:
        return self.quant_method.tie_weights(self, table)


def load(layer: nn.Module, name: str, value: Tensor, *shard: str | int) -> None:
    """Load a tensor of the checkpoint."""
    parameter: Any = layer.get_parameter(name)
    parameter.weight_loader(parameter, value, *shard)


def finish(layer: Any) -> None:
    """Tell a layer that all is loaded."""
    layer.quant_method.process_weights_after_loading(layer)


def install(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Make `import vllm` find this; returns the configs that are registered, by name."""
    registered: dict[str, Any] = {}

    def register_quantization_config(name: str) -> Callable[[Any], Any]:
        if name in registered:
            raise ValueError(f"{name} is there already")
        return lambda config: registered.setdefault(name, config)

    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.model_executor": {},
        LAYERS: {},
        f"{LAYERS}.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": LinearMethodBase,
            "UnquantizedLinearMethod": UnquantizedLinearMethod,
        },
        f"{LAYERS}.quantization": {
            "QUANTIZATION_METHODS": registered,
            "register_quantization_config": register_quantization_config,
        },
        f"{LAYERS}.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
        f"{LAYERS}.vocab_parallel_embedding": {
            "ParallelLMHead": ParallelLMHead,
            "UnquantizedEmbeddingMethod": UnquantizedEmbeddingMethod,
            "VocabParallelEmbedding": VocabParallelEmbedding,
        },
    }
    for name, entries in contents.items():
        module = ModuleType(name)
        vars(module).update(entries)
        patch.setitem(sys.modules, name, module)
    return registered
