"""Common matrices of tied blocks (Relaxed Recursive Transformers, arXiv 2410.20672).

A linear of a tied block is a common matrix plus a term of its own. The common matrix is compressed with the first of
its blocks, for the inputs of that block, and stored once, beside the blocks, by a name of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmcompress.errors import RecipeError
from llmcompress.methods.layer import StepConfig, sketch
from llmcompress.methods.solvers.low_rank import LowRankConfig
from llmcompress.models.dense.families import Architecture
from llmcompress.recipe.sections import Tie
from llmcompress.weight.algebra import add_to_base
from llmcompress.weight.expression import describe
from llmcompress.weight.modules import describe_beside_base
from llmcompress.weight.nodes import Weight, Zero


@dataclass(frozen=True)
class CommonMatrix:
    """A matrix that `linears` share, in depth order. `start`: linears whose mean it is before `steps` compress it;
    `term`: the term that each linear adds; None for none."""

    name: str  # module path
    shape: tuple[int, int]  # (out, in)
    linears: tuple[str, ...]
    start: tuple[str, ...]
    steps: tuple[StepConfig, ...]
    term: LowRankConfig | None

    def is_first(self, linear: str) -> bool:
        """True for the linear that the common matrix is compressed and counted with."""
        return linear == self.linears[0]

    def sketch(self, linear: str) -> Weight:
        """Return the expression that a linear stores, without values; the common matrix is in that of the first."""
        own = Zero(self.shape) if self.term is None else self.term.term_sketch(Zero(self.shape))
        return add_to_base(sketch(linear, self.shape, self.steps), own) if self.is_first(linear) else own

    def description(self, linear: str, stored: Weight) -> str:
        """Return in words what a linear stores, as in `sketch`."""
        return describe(stored) if self.is_first(linear) else describe_beside_base(stored)

    def steps_of(self, linear: str) -> tuple[StepConfig, ...]:
        """Return the steps of a linear; the first one has those of the common matrix too."""
        own = () if self.term is None else (self.term,)
        return (*self.steps, *own) if self.is_first(linear) else own


def groups_of(tie: Tie, count: int) -> tuple[tuple[int, ...], ...]:
    """Return groups of block numbers that share their matrices, for a model of `count` blocks.

    Raises RecipeError for fewer blocks than groups.
    """
    if tie.blocks > count:
        raise RecipeError(f"tie: blocks: the model has {count} blocks, so not {tie.blocks} of them; lower it")
    of = {n: n % tie.blocks if tie.pattern == "loop" else n * tie.blocks // count for n in range(count)}
    return tuple(tuple(n for n in of if of[n] == group) for group in range(tie.blocks))


def common_matrices(
    tie: Tie, arch: Architecture, steps: Mapping[str, tuple[StepConfig, ...]], dense: Sequence[str]
) -> dict[str, CommonMatrix]:
    """Return the common matrix of each linear that has one; linears named `dense` stay as they are.

    `steps`: of every linear, by the rules. Raises RecipeError for blocks that differ in shapes or steps.
    """
    ties: dict[str, CommonMatrix] = {}
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
                linear = inside[other].get(leaf)
                if linear is None or linear.shape != first.shape:
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
            ties |= dict.fromkeys(linears, CommonMatrix(name, first.shape, linears, begins, steps[first.name], term))
    return ties
