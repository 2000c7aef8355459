"""Several sizes of one student that train together: low-rank terms with all components, and with the first few.

The sequences of a step go to the sizes in turn. So a size has its share of the tokens, a step takes no longer, and its
gradient is the sum of those of the separate models: numbers that sizes share learn from all of them, later components
from the larger sizes alone. The sizes of a supernet are trained like this in BigNAS (arXiv 2003.11142), and the first
dimensions of an embedding in Matryoshka representations (arXiv 2205.13147). Differs from both: a sequence is read at
one size, not at several, and every size learns from the dense teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.errors import RecipeError
from llmcompress.weight.algebra import split_components, truncate_low_rank
from llmcompress.weight.expression import decoded
from llmcompress.weight.modules import CompressedLinear, Multiplying, compressed_linears, multiplying, ties_of
from llmcompress.weight.trainable.relax import RelaxedWeight

Size = int | None  # components of low-rank terms, None for all


def deal(rows: Tensor, nested: Sequence[int], step: int) -> list[tuple[Size, Tensor]]:
    """Return each size with those of the `rows` of a step's batch that it reads; the whole model comes first."""
    sizes: tuple[Size, ...] = (None, *nested)
    return [(size, rows[(rows + step) % len(sizes) == place]) for place, size in enumerate(sizes)]


def check_nested(model: nn.Module, nested: Sequence[int]) -> None:
    """Raise RecipeError unless each of the sizes takes components from a student, and leaves something of each matrix.

    Raises it too for matrices in common, whose terms are not taken apart.
    """
    if nested and ties_of(model):
        raise RecipeError("nested: the student has matrices in common, whose terms are not taken apart; leave it out")
    weights = [layer.expression() for layer in compressed_linears(model).values()] if nested else []
    for rank in nested:
        smaller = [whole for whole in weights if truncate_low_rank(whole, rank) is not whole]
        if not smaller:
            raise RecipeError(
                f"nested: no low-rank term of the student has more than {rank} components; name fewer, or add terms by "
                f"adapt"
            )


def split_terms(linears: Mapping[str, Multiplying], nested: Sequence[int]) -> dict[str, Multiplying]:
    """Return compressed matrices whose low-rank terms are taken apart where the sizes end."""
    apart = dict(linears)
    for name, layer in linears.items() if nested else ():
        if isinstance(layer, CompressedLinear):
            apart[name] = CompressedLinear.of(
                split_components(layer.expression(), nested), layer.bias, layer.layout.inputs
            )
    return apart


@contextmanager
def at_size(model: nn.Module, size: Size) -> Iterator[None]:
    """Let the compressed linears of a student, trained or decoded, multiply at a size while the context lasts."""
    if size is None:
        yield
        return
    trained = [module for module in model.modules() if isinstance(module, RelaxedWeight)]
    held = {layer: layer.ready for layer in multiplying(model).values() if layer.ready is not None and _has_term(layer)}
    dtype = next((value.dtype for value in model.parameters() if value.is_floating_point()), torch.float32)
    try:
        for module in trained:
            module.rank = size
        for layer in held:
            layer.ready = decoded(truncate_low_rank(layer.expression(), size), dtype)
        yield
    finally:
        for module in trained:
            module.rank = None
        for layer, ready in held.items():
            layer.ready = ready


def _has_term(layer: Multiplying) -> bool:
    """True if a matrix has a low-rank term; tells it from the layout alone, as values may be in other processes."""
    return any(node["node"] == "low_rank" for node in _nodes(layer.layout.header))


def _nodes(header: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield header
    for part in (*header.values(), *header.get("parts", ())):
        if isinstance(part, Mapping) and "node" in part:
            yield from _nodes(part)
