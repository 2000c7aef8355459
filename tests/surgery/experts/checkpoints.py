"""Checkpoints of mixtures in transformers: loaded without a missing tensor, and their logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


def load_complete(folder: Path) -> Any:
    """Return the model in float32, and check that its files have exactly its tensors."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


def random_ids(count: int = 24) -> Tensor:
    """Return token ids `[2, count]`."""
    return torch.randint(3, 250, (2, count), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    """Return the logits on `ids`, by default random ones."""
    output: Tensor = model(input_ids=random_ids() if ids is None else ids).logits
    return output
