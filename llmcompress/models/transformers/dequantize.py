"""A compressed model made dense in memory: `model.dequantize()` of transformers."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmcompress.models.dense.experts import Experts, experts_of, fused, unfuse
from llmcompress.weight import expression
from llmcompress.weight.modules import (
    CompressedEmbedding,
    CompressedLinear,
    CompressedModule,
    TiedMatrix,
    compressed_modules,
    put,
)
from llmcompress.weight.tied import ties_of, untie

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def dequantized(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """Replace every compressed module by the dense one that it stands for, and return the model, all in `dtype`.

    Experts become the parameters again that transformers has for them.

    `dtype`: that of the model's dense tensors if it is None. Memory peaks at the dense model and the compressed rest.
    """
    dtype = model.dtype if dtype is None else dtype
    plain, unfused = skeleton(type(model), model.config), skeleton(type(model), model.config)
    unfuse(unfused)
    ties = ties_of(model)
    for name, module in compressed_modules(model).items():
        if not isinstance(module, TiedMatrix):
            put(model, name, dense_module(module, unfused.get_submodule(name), dtype))
    untie(model, ties)
    for name, experts in experts_of(model).items():
        put(model, name, _fused(experts, plain.get_submodule(name)))
    placed: nn.Module = model
    placed.to(dtype)  # transformers' own refuses what it takes for a quantized model
    model.tie_weights()
    return model


def skeleton(kind: type[PreTrainedModel], config: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return the dense model of a class, on meta, for the config of a compressed one; `dtype`: instead of its own."""
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        found: PreTrainedModel = kind._from_config(config, **({} if dtype is None else {"dtype": dtype}))
    return found


def _fused(experts: Experts, plain: nn.Module) -> nn.Module:
    """Return `plain`, a module of transformers on meta, with the weights of `experts`."""
    for leaf, value in fused(experts, experts.state_dict().__getitem__).items():
        setattr(plain, leaf, nn.Parameter(value))
    return plain.train(experts.training)


def dense_module(module: CompressedModule, plain: Any, dtype: torch.dtype) -> nn.Module:
    """Return `plain`, a module on meta, with the decoded weight; another size if the model was edited."""
    whole = module.whole() if isinstance(module, CompressedLinear) else module.expression()
    weight = expression.dense(whole).to(dtype)
    bias: Tensor | None = getattr(module, "bias", None)
    if isinstance(plain, nn.Linear):
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    elif not isinstance(plain, nn.Embedding):  # GPT-2's transposed linear
        weight = weight.T.contiguous()
    if isinstance(module, CompressedEmbedding):
        plain.to_empty(device=weight.device)
        for scale in plain.buffers():
            scale.fill_(module.scale)
    plain.weight = nn.Parameter(weight)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(dtype))
    found: nn.Module = plain
    return found
