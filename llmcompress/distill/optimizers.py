"""The optimizer of a distillation: AdamW, or its form with 8-bit moments (block-wise quantized, arXiv 2110.02861).

The latter keeps 2 bytes of moments for each number that trains instead of 8, except for tensors below 4096 numbers;
paged, they move to the machine's memory when the GPU's is full. Their state goes into a run's state like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.distill.packages import check_bitsandbytes
from llmcompress.errors import RecipeError
from llmcompress.recipe.distillation import Distillation

BETAS = (0.9, 0.95)
TABLES = {"qmap1", "qmap2"}  # what 8-bit codes mean: constants that all parameters share


def check_optimizer(recipe: Distillation, device: torch.device) -> None:
    """Raises RecipeError where the recipe's optimizer lacks its package or cannot run on `device`."""
    if recipe.optimizer == "adamw":
        return
    check_bitsandbytes(f"optimizer: {recipe.optimizer}")
    if recipe.optimizer == "paged_adamw_8bit" and device.type != "cuda":
        raise RecipeError(
            f"optimizer: paged_adamw_8bit moves memory between a GPU and the machine, and this is {device.type}; use "
            f"adamw_8bit"
        )


def optimizer_of(recipe: Distillation, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
    """The recipe's optimizer of these parameter groups; rates are set at every step."""
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)
    import bitsandbytes

    kinds = {"adamw_8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit}
    made: torch.optim.Optimizer = kinds[recipe.optimizer](groups, betas=BETAS, weight_decay=0.0)
    return made


def moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What the optimizer remembers of a parameter, by name; counts of steps become tensors."""
    known = optimizer.state[parameter].items()
    return {key: torch.as_tensor(value) for key, value in known if key not in TABLES}


def put_moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, saved: Mapping[str, Tensor]) -> None:
    """The inverse of `moments`."""
    if not isinstance(optimizer, torch.optim.AdamW):  # a paged state has a memory of its own, which stays
        _prepare(optimizer, parameter)
    state = optimizer.state[parameter]
    for key, value in saved.items():
        if isinstance(there := state.get(key), Tensor):
            there.copy_(value)
        elif key in state:
            state[key] = int(value)
        else:
            state[key] = value.clone() if value.ndim == 0 else value.to(parameter.device)


def _prepare(optimizer: Any, parameter: nn.Parameter) -> None:
    """Has an 8-bit optimizer make a parameter's state, as it would at its first step."""
    for number, group in enumerate(optimizer.param_groups):
        for place, value in enumerate(group["params"]):
            if value is parameter:
                optimizer.init_state(group, value, number, place)
