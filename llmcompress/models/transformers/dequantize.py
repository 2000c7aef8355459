"""A compressed model made dense in memory: `model.dequantize()` of transformers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import add_hook_to_module
from torch import Tensor, nn

from llmcompress.errors import InputError, list_names
from llmcompress.models.dense.experts import Experts, experts_of, fuse_experts, unfuse
from llmcompress.weight import expression
from llmcompress.weight.modules import (
    CompressedEmbedding,
    CompressedLinear,
    CompressedModule,
    TiedMatrix,
    compressed_modules,
    put,
    ties_of,
    untie,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def dequantize(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """Replace every compressed module by its dense one, and return the model, all in `dtype`.

    `dtype`: None for that of the model's dense tensors; `model.dequantize()` gives that of its config. Experts become
    transformers' parameters again. Memory peaks at the dense model and the compressed rest. Raises InputError for a
    model that is offloaded, and changes nothing of it.
    """
    check_in_memory(compressed_modules(model).values(), "be made dense")
    dtype = model.dtype if dtype is None else dtype
    plain, unfused = skeleton(type(model), model.config), skeleton(type(model), model.config)
    unfuse(unfused)
    ties = ties_of(model)
    for name, module in compressed_modules(model).items():
        if not isinstance(module, TiedMatrix):
            put(model, name, dense_module(module, unfused.get_submodule(name), dtype))
    untie(model, ties)
    for name, experts in experts_of(model).items():
        put(model, name, _fuse(experts, plain.get_submodule(name)))
    placed: nn.Module = model
    placed.to(dtype)  # transformers' own refuses what it takes for a quantized model
    model.tie_weights()
    vars(model).pop("_weight_conversions", None)  # from compressed files; it saves by the names of its class
    return model


def check_in_memory(modules: Iterable[nn.Module], doing: str) -> None:
    """Raise InputError for compressed modules that are offloaded; `doing`: what they cannot."""
    if any(module.get_parameter("weight").is_meta for module in modules):
        raise InputError(f"a compressed model cannot {doing} while it is offloaded; load it in memory")


def own_sizes(model: PreTrainedModel) -> dict[str, list[int]]:
    """Return the shapes of the linears of a dense model that have others than its config says."""
    plain, now = (
        {name: list(module.weight.shape) for name, module in each.named_modules() if isinstance(module, nn.Linear)}
        for each in (skeleton(type(model), model.config), model)
    )
    return {name: size for name, size in now.items() if plain.get(name, size) != size}


def skeleton(kind: type[PreTrainedModel], config: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return the dense model of a class, on meta, for the config of a compressed one; `dtype`: instead of its own."""
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        found: PreTrainedModel = kind._from_config(config, **({} if dtype is None else {"dtype": dtype}))
    return found


def _fuse(experts: Experts, plain: nn.Module) -> nn.Module:
    """Return `plain`, a module of transformers on meta, with the weights of `experts`."""
    for leaf, value in fuse_experts(experts, experts.state_dict().__getitem__).items():
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


def ready_to_resize(model: PreTrainedModel, tokens: int | None, multiple: int | None) -> bool:
    """Make a compressed table and head dense to have another number of rows; False if there is nothing to do.

    New rows are drawn and trained, which codes cannot be. `tokens`, `multiple`: as for `model.resize_token_embeddings`.
    Raises InputError for weights that are not in memory, or with an adapter.
    """
    if tokens is None and multiple is None:
        return False
    outer: list[Any] = [
        module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None
    ]
    both: list[Any] = [module.get_base_layer() if hasattr(module, "get_base_layer") else module for module in outer]
    if not any(isinstance(module, CompressedModule) for module in both):
        return True
    wanted = _rows(both[0]) if tokens is None else tokens
    if multiple is not None:
        wanted = -(-wanted // multiple) * multiple
    if {_rows(module) for module in both} == {wanted}:
        return False
    packed = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, CompressedModule) and module in both
    }
    check_in_memory(packed.values(), "have another number of tokens")
    if not set(packed.values()) <= set(outer):
        raise InputError(
            f"{list_names(packed)} cannot be resized with an adapter; do so before it is made, or after "
            f"llmcompress.fold"
        )
    plain = skeleton(type(model), model.config)
    dtype = model.dtype
    for name, module in packed.items():
        dense = dense_module(module, plain.get_submodule(name), dtype)
        if hasattr(module, "_hf_hook"):
            add_hook_to_module(dense, module._hf_hook)
        put(model, name, dense)
    model.tie_weights()
    warnings.warn(f"{list_names(packed)} are dense from now on, in {dtype}, to have {wanted} rows", stacklevel=3)
    return True


def _rows(module: nn.Module) -> int:
    if isinstance(module, CompressedEmbedding):
        return module.num_embeddings
    return module.layout.size[0] if isinstance(module, CompressedModule) else len(module.get_parameter("weight"))
