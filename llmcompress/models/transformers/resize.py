"""Linears of a model on meta brought to the sizes of a checkpoint, whose blocks may have widths of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmcompress.errors import InputError
from llmcompress.models.files.integrity import MENDING
from llmcompress.weight.modules import put

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def resize(model: PreTrainedModel, sizes: Mapping[str, Sequence[int]]) -> None:
    """Resize linears of a model on meta to these `[out, in]` by name.

    Raises InputError for a linear that the model lacks, and for sizes that do not fit each other.
    """
    edited = False
    for name, size in sizes.items():
        dense = _matrix(model, name)
        stored = dense.get_parameter("weight").shape
        if list(reversed(stored) if isinstance(dense, Conv1D) else stored) == list(size):
            continue
        if not isinstance(dense, nn.Linear):
            raise InputError(f"config.json gives {name} the size {list(size)}, which it does not have; {MENDING}")
        put(model, name, nn.Linear(size[1], size[0], dense.bias is not None, device="meta", dtype=dense.weight.dtype))
        edited = True
    if not edited:
        return
    attention: Any
    for attention in model.modules():
        if hasattr(attention, "num_key_value_groups") and hasattr(attention, "k_proj"):
            attention.num_key_value_groups = attention.q_proj.out_features // attention.k_proj.out_features
    for name, part in model.named_modules():
        sides = [getattr(part, side, None) for side in ("gate_proj", "up_proj")]
        if len({side.out_features for side in sides if isinstance(side, nn.Linear)}) > 1:  # torch broadcasts a 1
            raise InputError(
                f"config.json gives gate_proj and up_proj of {name} sizes that do not fit each other; {MENDING}"
            )
    _check_flow(model)


def _matrix(model: nn.Module, name: str) -> nn.Module:
    try:
        dense = model.get_submodule(name)
        dense.get_parameter("weight")
    except AttributeError as error:
        kind = type(model).__name__
        raise InputError(f"config.json lists {name}, which is no matrix of a {kind}; {MENDING}") from error
    return dense


def _check_flow(model: PreTrainedModel) -> None:
    """Run a model on meta on two tokens. Raises InputError if a layer refuses the output of the one before."""
    try:
        with torch.no_grad(), torch.device("meta"):
            mask = torch.zeros(1, 1, 2, 2)  # otherwise models read values to make one
            model(input_ids=torch.zeros(1, 2, dtype=torch.long), attention_mask=mask, use_cache=False)
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"config.json gives layers sizes that do not fit each other ({reason}); {MENDING}") from error
