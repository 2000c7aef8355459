"""Activation checkpointing: the backward pass recomputes the activations of decoder blocks instead of keeping them.

transformers does so for blocks in train mode. So only the blocks are put into it. The modules inside them stay in
evaluation mode, without dropout, and a block's own dropout is set to 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmcompress.errors import RecipeError
from llmcompress.models.dense.blocks import body
from llmcompress.models.dense.families import block_stack

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def recomputed(model: PreTrainedModel, checked: bool = True) -> Iterator[None]:
    """Recompute the activations of every decoder block of `model` within the context; results stay the same.

    Raises RecipeError for a model that cannot do it, or whose blocks still apply dropout. The latter is `checked` by
    running it, unless its weights are those of another process.
    """
    kind = type(model).__name__
    before = _few(model) if checked else None
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise RecipeError(f"a {kind} cannot recompute activations; set checkpointing: false") from error
    blocks = list(model.get_submodule(block_stack(model.config, model)).children())
    for block in blocks:
        for name, value in vars(block).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(block, name, 0.0)
        block.training = True
    try:
        if before is not None and not torch.allclose(before, _few(model)):
            raise RecipeError(f"blocks of a {kind} apply dropout in training; set checkpointing: false")
        yield
    finally:
        for block in blocks:
            block.training = False


@torch.no_grad()
def _few(model: PreTrainedModel) -> Tensor:
    """Return the hidden states of two tokens."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    found: Tensor = body(model)(input_ids=ids, use_cache=False)[0]
    return found
