"""Devices to compute on, by name."""

from __future__ import annotations

from typing import Any

import torch

from llmcompress.errors import RecipeError


def device_of(name: str) -> torch.device:
    """Return the CPU, or an accelerator that torch finds: `cuda`, `cuda:1`.

    Raises RecipeError for an unknown name, a missing device, and one without float64.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"{name!r} is no device; use cpu, cuda or cuda:1") from error
    module: Any = getattr(torch, device.type, None)
    if not hasattr(module, "device_count"):
        raise RecipeError(f"nothing can be computed on device {name}; use cpu, cuda or cuda:1")
    if device.type == "mps":
        raise RecipeError(f"device {name} has no float64, in which sums are taken here; use cpu")
    count = module.device_count() if module.is_available() else 0
    if count == 0:
        raise RecipeError(
            f"device {name} is not there: torch {torch.__version__} finds no {device.type} device; use cpu, or install "
            f"a torch and a driver for it"
        )
    if device.index is not None and device.index >= count:
        raise RecipeError(f"device {name} is not there: torch finds {count}, from {device.type}:0 on; use one of them")
    return device


def is_at(place: torch.device, wanted: torch.device) -> bool:
    """True if `place` is the wanted device; a device without a number is the first one, or any where it is wanted."""
    return place.type == wanted.type and wanted.index in (None, place.index or 0)


def kind_of(name: str, processes: int) -> torch.device:
    """Return `device_of` for several `processes`, each with its own device of that kind.

    Raises RecipeError for the name of a single device, too.
    """
    device = device_of(name)
    if processes > 1 and device.index is not None:
        raise RecipeError(f"device {name} is one, and there are {processes} processes; use {device.type}, one for each")
    return device


def check_each(devices: int, processes: int, name: str) -> None:
    """Raise RecipeError unless Accelerate has as many `devices` as a launcher started `processes`."""
    if devices != processes:
        raise RecipeError(f"{processes} processes cannot each have a device like {name!r}; use cpu, or a GPU for each")
