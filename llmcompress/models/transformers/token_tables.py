"""Token tables and heads of a loaded model that are made dense to be given another number of rows."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from accelerate.hooks import add_hook_to_module
from torch import nn

from llmcompress.errors import InputError, list_names
from llmcompress.models.transformers.dequantize import dense_module, skeleton
from llmcompress.weight.modules import CompressedEmbedding, CompressedModule, put

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def ready_to_resize(model: PreTrainedModel, tokens: int | None, multiple: int | None) -> bool:
    """Make a compressed table and head dense if they are to have another number of rows; False if there is nothing to
    do. New rows are drawn and trained, which codes cannot be.

    `tokens`, `multiple`: as for `model.resize_token_embeddings`. Raises InputError for weights that are not in memory,
    and for those that have an adapter.
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
    if any(module.get_parameter("weight").is_meta for module in packed.values()):
        raise InputError("a compressed token table cannot be resized while it is offloaded; load the model in memory")
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
