"""The optimizer of a distillation: AdamW, or its form with 8-bit moments (block-wise quantized, arXiv 2110.02861).

The latter has 2 bytes of moments for each number that trains instead of 8, except for tensors below 4096 numbers. The
paged form moves them to the machine's memory when the GPU's is full. Moments are part of a run's state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.recipe.distillation import Distillation

BETAS = (0.9, 0.95)
TABLES = {"qmap1", "qmap2"}  # the values of 8-bit codes: constants of the optimizer


def optimizer_of(recipe: Distillation, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return the recipe's optimizer for parameter groups. The caller sets their rates at every step."""
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)
    import bitsandbytes

    kinds = {"adamw_8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit}
    made: torch.optim.Optimizer = kinds[recipe.optimizer](groups, betas=BETAS, weight_decay=0.0)
    return made


def moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return the optimizer's state of a parameter, by name; counts of steps become tensors."""
    state = optimizer.state[parameter].items()
    return {key: torch.as_tensor(value) for key, value in state if key not in TABLES}


def put_moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, saved: Mapping[str, Tensor]) -> None:
    """Put saved `moments` of a parameter back into the optimizer."""
    if not isinstance(optimizer, torch.optim.AdamW):  # a paged state has a memory of its own, which stays
        _start_state(optimizer, parameter)
    state = optimizer.state[parameter]
    for key, value in saved.items():
        if isinstance(current := state.get(key), Tensor):
            current.copy_(value)
        elif key in state:
            state[key] = int(value)
        else:
            state[key] = value.clone() if value.ndim == 0 else value.to(parameter.device)


def _start_state(optimizer: Any, parameter: nn.Parameter) -> None:
    """Let an 8-bit optimizer make a parameter's state, as it would at its first step."""
    for number, group in enumerate(optimizer.param_groups):
        for position, value in enumerate(group["params"]):
            if value is parameter:
                optimizer.init_state(group, value, number, position)
