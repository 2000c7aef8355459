"""Blocks that have their matrices in common: which, how these begin, and what each block stores of its own.

A linear of a tied block is a common matrix plus a term of its own. The common one is compressed when the first of its
blocks is, for the inputs of that block; later ones find it there. It is stored once, beside the blocks, by a name of
its own (`Tied.name`). Relaxed Recursive Transformers (arXiv 2410.20672).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmcompress.errors import RecipeError
from llmcompress.methods.layer import StepConfig, sketch
from llmcompress.methods.solvers.low_rank import LowRankConfig
from llmcompress.models.dense.families import Architecture
from llmcompress.recipe.sections import Tie
from llmcompress.weight.expression import describe
from llmcompress.weight.nodes import Weight, Zero
from llmcompress.weight.sums import add_to_base
from llmcompress.weight.tied import describe_beside_base


@dataclass(frozen=True)
class Tied:
    """A matrix that linears have in common. `name`: its module path; `linears`: those that have it, in depth order;
    `start`: those whose mean it is before it is compressed, by `steps`; `term`: what each of the linears adds."""

    name: str
    shape: tuple[int, int]  # (out, in)
    linears: tuple[str, ...]
    start: tuple[str, ...]
    steps: tuple[StepConfig, ...]
    term: LowRankConfig | None

    def is_first(self, linear: str) -> bool:
        """True for the linear that the common matrix is compressed for, and counted with."""
        return linear == self.linears[0]

    def sketch(self, linear: str) -> Weight:
        """Return what a linear stores, the first one with the common matrix, without values, for `plan`."""
        own = Zero(self.shape) if self.term is None else self.term.term_sketch(Zero(self.shape))
        return add_to_base(sketch(linear, self.shape, self.steps), own) if self.is_first(linear) else own

    def described(self, linear: str, stored: Weight) -> str:
        """Return in words what a linear stores, as in `sketch`."""
        return describe(stored) if self.is_first(linear) else describe_beside_base(stored)

    def steps_of(self, linear: str) -> tuple[StepConfig, ...]:
        """Return the steps that a linear takes: the first one those of the common matrix too."""
        own = () if self.term is None else (self.term,)
        return (*self.steps, *own) if self.is_first(linear) else own


def groups_of(tie: Tie, count: int) -> tuple[tuple[int, ...], ...]:
    """Return the numbers of the blocks that have their matrices in common, of a model of `count` blocks.

    Raises RecipeError where there are fewer blocks than groups.
    """
    if tie.blocks > count:
        raise RecipeError(f"tie: blocks: the model has {count} blocks, so not {tie.blocks} of them; lower it")
    of = {n: n % tie.blocks if tie.pattern == "loop" else n * tie.blocks // count for n in range(count)}
    return tuple(tuple(n for n in of if of[n] == group) for group in range(tie.blocks))


def ties_of(
    tie: Tie, arch: Architecture, steps: Mapping[str, tuple[StepConfig, ...]], dense: Sequence[str]
) -> dict[str, Tied]:
    """Return the common matrix of each linear that has one; those named `dense` stay as they are.

    `steps`: those of the rules for every linear, of which the first block's count. Raises RecipeError for blocks that
    differ, in the steps of the rules too.
    """
    found: dict[str, Tied] = {}
    term = tie.term if isinstance(tie.term, LowRankConfig) else None
    parent = arch.stack.rpartition(".")[0]
    spread = [round(n * (len(arch.blocks) - 1) / max(tie.blocks - 1, 1)) for n in range(tie.blocks)]
    inside = [
        {linear.name.removeprefix(f"{block.path}."): linear for group in block.groups for linear in group}
        for block in arch.blocks
    ]
    for number, group in enumerate(groups_of(tie, len(arch.blocks))):
        start = {"average": group, "first": group[:1], "stepwise": (spread[number],)}[tie.start]
        for leaf, first in inside[group[0]].items():
            if first.name in dense:
                continue
            for other in (*group, *start):
                there = inside[other].get(leaf)
                if there is None or there.shape != first.shape:
                    raise RecipeError(
                        f"tie: {arch.blocks[other].path} has no {leaf} of the size {list(first.shape)} as "
                        f"{arch.blocks[group[0]].path}; choose a number of blocks that puts like ones together"
                    )
            linears = tuple(inside[n][leaf].name for n in group)
            unlike = [name for name in linears if steps[name] != steps[first.name] or name in dense]
            if unlike:
                raise RecipeError(
                    f"tie: {unlike[0]} and {first.name} are one matrix and have other steps; give them the same"
                )
            name = ".".join(filter(None, (parent, "tied", f"{number}_{leaf.replace('.', '_')}")))
            begins = tuple(inside[n][leaf].name for n in start)
            tied = Tied(name, first.shape, linears, begins, steps[first.name], term)
            found |= dict.fromkeys(linears, tied)
    return found
