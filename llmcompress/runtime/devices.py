"""Devices to compute on, by name, if they are there."""

from __future__ import annotations

from typing import Any

import torch

from llmcompress.errors import RecipeError


def device_of(name: str) -> torch.device:
    """The CPU, or an accelerator that torch finds: `cuda`, `cuda:1`.

    Raises RecipeError for a name of no device, for a missing device, and for one that cannot do what is needed.
    """
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"{name!r} is no device; use cpu, cuda or cuda:1") from error
    module: Any = getattr(torch, found.type, None)
    if not hasattr(module, "device_count"):
        raise RecipeError(f"nothing can be computed on device {name}; use cpu, cuda or cuda:1")
    if found.type == "mps":
        raise RecipeError(f"device {name} has no float64, in which sums are taken here; use cpu")
    count = module.device_count() if module.is_available() else 0
    if count == 0:
        raise RecipeError(
            f"device {name} is not there: torch {torch.__version__} finds no {found.type} device; use cpu, or install "
            f"a torch and a driver for it"
        )
    if found.index is not None and found.index >= count:
        raise RecipeError(f"device {name} is not there: torch finds {count}, from {found.type}:0 on; use one of them")
    return found


def is_at(place: torch.device, wanted: torch.device) -> bool:
    """True if `place` is the device asked for; a name without a number means the first, or asks for any."""
    return place.type == wanted.type and wanted.index in (None, place.index or 0)


def kind_of(name: str, processes: int) -> torch.device:
    """Return `device_of` for several `processes`, each with a device of that kind of its own.

    Raises RecipeError for the name of a single device, too.
    """
    found = device_of(name)
    if processes > 1 and found.index is not None:
        raise RecipeError(f"device {name} is one, and there are {processes} processes; use {found.type}, one for each")
    return found


def check_each(found: int, processes: int, name: str) -> None:
    """Raises RecipeError where a launcher started `processes` and Accelerate has devices for other `found` ones."""
    if found != processes:
        raise RecipeError(f"{processes} processes cannot each have a device like {name!r}; use cpu, or a GPU for each")
