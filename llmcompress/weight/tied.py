"""Matrices that several linears of a model have in common, and putting them into a model.

Such a matrix is a child of the model, at a path of its own, so that it is stored and moved once. A linear knows it by
an attribute that is no child (`base_of`); whoever replaces one of the two ties them again (`tie`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from llmcompress.weight.expression import describe
from llmcompress.weight.nodes import Weight, Zero

BASE = "base"  # the attribute of a linear


def describe_beside_base(own: Weight) -> str:
    """Return in words what a linear stores beside a matrix that another one is counted with."""
    return "tied" if isinstance(own, Zero) else f"tied + {describe(own)}"


def base_of(linear: nn.Module) -> Any:
    """The matrix that a linear has in common with others, as a module; None for a linear without one."""
    return linear.__dict__.get(BASE)


def ties_of(model: nn.Module) -> dict[str, str]:
    """The names of linears that have a matrix in common with others, each with the name of that matrix."""
    names = {module: name for name, module in model.named_modules()}
    return {name: names[base_of(module)] for name, module in model.named_modules() if base_of(module) is not None}


def tie(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Let linears have matrices in common, by their names, as `ties_of` returns them; for use after any of them was
    replaced. Raises AttributeError for a name that the model does not have."""
    for name, base in ties.items():
        model.get_submodule(name).__dict__[BASE] = model.get_submodule(base)


def untie(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Take the matrices that linears had in common off a model, whose linears have become dense."""
    for name, base in ties.items():
        model.get_submodule(name).__dict__.pop(BASE)
        parent, _, leaf = base.rpartition(".")
        if hasattr(model.get_submodule(parent), leaf):
            delattr(model.get_submodule(parent), leaf)


def add_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at a path that may be new, with plain modules on the way."""
    parent, _, leaf = name.rpartition(".")
    here = model
    for part in parent.split(".") if parent else ():
        if not hasattr(here, part):
            here.add_module(part, nn.Module())
        here = here.get_submodule(part)
    here.add_module(leaf, module)
