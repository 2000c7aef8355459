"""Experts that few calibration tokens reach: their moments are filled up with those of all tokens.

An expert that is given few tokens, or none, would be fitted to noise. All tokens together get the weight that it lacks
to a quarter of what an expert of the block gets on average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcompress.calibration.blocks import BlockForward, RowBatch, for_products
from llmcompress.models.dense.experts import DOWN, GATE, UP, Expert, Experts, experts_of, holder

LEAST = 0.25  # of the average

Add = Callable[[str, Tensor], None]  # of a linear's name and what it reads, `[tokens, in]`


def lacking(run: BlockForward, counts: Mapping[str, int]) -> dict[str, float]:
    """Return how many tokens starved experts lack; `counts`: those that each linear of an expert was given, by name."""
    experts = experts_of(run.module)
    given: dict[tuple[str, str], int] = {}  # to all experts of a module, by its path and the linear's leaf
    for name, count in counts.items():
        given[_kind(name)] = given.get(_kind(name), 0) + count
    found = {}
    for name, count in counts.items():
        path, _ = kind = _kind(name)
        least = LEAST * given[kind] / experts[path.removeprefix(f"{run.path}.")].num_experts
        if count < least:
            found[name] = least - count
    return found


@torch.no_grad()
def read_all(run: BlockForward, names: Mapping[str, float], batches: list[RowBatch], hidden: Tensor, add: Add) -> None:
    """Call `add` with what linears of experts would read if all calibration tokens were routed to them."""
    experts = {path: found for path, found in experts_of(run.module).items() if f"{run.path}.{path}" in _paths(names)}
    handles = [
        found.register_forward_pre_hook(_AllTokens(f"{run.path}.{path}", names, add, run.dtype))
        for path, found in experts.items()
    ]
    try:
        with for_products(run):
            for batch in batches:
                if not batch.held_out:
                    run(hidden[batch.rows], batch.rows)
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _AllTokens:
    """A hook before the experts at `path`."""

    path: str
    names: Mapping[str, float]
    add: Add
    dtype: torch.dtype

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        tokens = args[0]
        if isinstance(module, Experts) and module.form.sorted:
            tokens = tokens.view(module.num_experts, -1, tokens.shape[-1]).sum(0)
        for number, expert in module.named_children():
            for leaf in (GATE, UP, DOWN):
                name = f"{self.path}.{number}.{leaf}"
                if name in self.names and isinstance(expert, Expert):
                    x = expert.inner(tokens) if leaf == DOWN else tokens
                    with torch.autocast(x.device.type, enabled=False):
                        self.add(name, x.to(self.dtype))


def _kind(name: str) -> tuple[str, str]:
    path, _, leaf = name.rsplit(".", 2)
    return path, leaf


def _paths(names: Mapping[str, float]) -> set[str]:
    return {_kind(name)[0] for name in names}


def routed(run: BlockForward, names: tuple[str, ...]) -> frozenset[str]:
    """Return those of the linears of a block that are in experts."""
    experts = {f"{run.path}.{path}": found for path, found in experts_of(run.module).items()}
    return frozenset(name for name in names if holder(name, experts))
