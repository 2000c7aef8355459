"""The producer of each linear's input in a block: a norm of the residual stream, or another linear."""

from __future__ import annotations

from dataclasses import dataclass

from llmcompress.errors import RecipeError
from llmcompress.models.dense.families import FAMILIES, Architecture, BlockLayout


@dataclass(frozen=True)
class Feed:
    """Linears that read the same tensor, and the module that produces it, all by module path.

    `is_norm`: True if that module is a norm of the residual stream, False if it is a linear.
    """

    names: tuple[str, ...]
    producer: str
    is_norm: bool


def feeds(arch: Architecture, block: BlockLayout) -> tuple[Feed, ...]:
    """Return the feeds of a block in the order of its groups. Raises RecipeError for a family without producers."""
    producers = () if arch.family is None else arch.family.producers
    if not producers:
        known = ", ".join(name for name, family in FAMILIES.items() if family.producers)
        raise RecipeError(
            f"fuse: nothing can be fused into model type {arch.model_type!r}, only into {known}; leave fuse: out, or "
            f"use the step rotate"
        )
    linears = {linear.name for group in block.groups for linear in group}
    paths = [f"{block.path}.{producer}" for producer in producers]
    return tuple(
        Feed(tuple(linear.name for linear in group), path, path not in linears)
        for group, path in zip(block.groups, paths, strict=True)
    )
