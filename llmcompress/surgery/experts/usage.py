"""The use that routers make of experts on a text: tokens, weights, and the size of what each expert adds.

The dense model is walked, so statistics of a block are those of the whole model. Memory is that of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.calibration.blocks import TOKENS_PER_BATCH, BlockForward, RowBatch, drop, in_batches, load
from llmcompress.calibration.walk import Block, Progress, walk
from llmcompress.compression.damage import outputs_of, relative_damage
from llmcompress.data.calibration import CalibrationTokens
from llmcompress.errors import InputError, RecipeError
from llmcompress.models.dense.experts import Experts
from llmcompress.models.dense.model import DenseModel
from llmcompress.runtime.seeding import generator
from llmcompress.surgery.experts.mixture import ExpertMixture

BY = ("reap", "frequency", "random")  # scores


def check_by(by: str) -> None:
    """Raise RecipeError for a score of no such name."""
    if by not in BY:
        raise RecipeError(f"by is {by!r}; choose one of {', '.join(BY)}")


@dataclass(frozen=True, eq=False)
class Visit:
    """A block with experts while the walk stands at it. `path`: of its experts."""

    path: str
    block: Block
    run: BlockForward
    batches: list[RowBatch]

    @property
    def experts(self) -> Experts:
        """The experts."""
        found = self.block.module.get_submodule(self.path.removeprefix(f"{self.block.path}."))
        if not isinstance(found, Experts):
            raise InputError(f"{self.path} holds no experts; choose another model")
        return found

    @property
    def judged(self) -> list[RowBatch]:
        """Batches of the held-out text."""
        return [batch for batch in self.batches if batch.held_out]


@dataclass(frozen=True, eq=False)
class Usage:
    """The use of a block's experts on the calibration text, each a tensor `[experts]`.

    `counts`: tokens routed to it; `weights`: the sum of the router's weights for it; `outputs`: the sum of weight times
    norm of its output. Where inputs are scaled by these weights (Llama 4), each weight counts as 1.
    """

    tokens: int
    counts: Tensor
    weights: Tensor
    outputs: Tensor

    def scores(self, by: str, *seed: object) -> Tensor:
        """Return what an expert is worth, float64 `[experts]`; `seed`: of the random ones.

        `reap`: the mean over its tokens of weight times norm of its output (REAP, arXiv 2510.13999), 0 without tokens;
        `frequency`: the share of all tokens that are routed to it; `random`: the control.
        """
        if by == "random":
            return torch.rand(len(self.counts), dtype=torch.float64, generator=generator(*seed))
        if by == "frequency":
            return self.counts.double() / self.tokens
        return self.outputs / self.counts.clamp_min(1)


def visits(
    mixture: ExpertMixture, tokens: CalibrationTokens, device: torch.device, progress: Progress | None
) -> Iterator[Visit]:
    """Yield the model's blocks with experts in depth order, each loaded in float32, with its inputs."""
    sequences = tokens.sequences
    size = max(1, TOKENS_PER_BATCH // sequences.shape[1])
    batches = in_batches(len(sequences), tokens.held_out, size)
    how: dict[str, Any] = {"needs": {}, "batch_size": size, "device": device, "progress": progress}
    for block in walk(mixture.source, mixture.arch, sequences, held_out=tokens.held_out, **how):
        if block.index in mixture.layers and block.run is not None:
            yield Visit(mixture.layers[block.index], block, block.run, batches)


@torch.no_grad()
def usage(visit: Visit) -> Usage:
    """Return the use of a block's experts on the calibration text."""
    watch = _Watch.of(visit.experts)
    try:
        for batch in visit.batches:
            if not batch.held_out:
                visit.run(visit.block.hidden[batch.rows], batch.rows)
    finally:
        for handle in watch.handles:
            handle.remove()
    rows = sum(batch.size for batch in visit.batches if not batch.held_out)
    return Usage(rows * visit.block.hidden.shape[1], watch.counts, watch.weights, watch.outputs)


@dataclass(eq=False)
class _Watch:
    """Hooks on experts that add up what they are given and what they make of it."""

    counts: Tensor
    weights: Tensor
    outputs: Tensor
    index: Tensor | None = None
    given: Tensor | None = None
    handles: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, experts: Experts) -> _Watch:
        """Put hooks on experts."""
        count = experts.num_experts
        zeros = partial(torch.zeros, count, dtype=torch.float64)
        watch = cls(torch.zeros(count, dtype=torch.long), zeros(), zeros())
        watch.handles.append(experts.register_forward_pre_hook(watch.called, with_kwargs=True))
        for number, expert in enumerate(experts):
            watch.handles.append(expert.register_forward_hook(watch.answered(number)))
        return watch

    def called(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the experts of each token."""
        given = (*args, *kwargs.values())[1:]
        self.index, self.given = (given[0], given[1]) if len(given) == 2 else (None, None)

    def answered(self, number: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        """Return the hook on an expert, which is called on its tokens in their order."""

        def seen(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            norms = output.double().norm(dim=-1).cpu()
            weights = torch.ones_like(norms)
            if self.index is not None and self.given is not None:
                weights = self.given[self.index == number].double().cpu()
            self.counts[number] += len(norms)
            self.weights[number] += weights.sum()
            self.outputs[number] += (weights * norms).sum()

        return seen


def outputs(visit: Visit) -> list[Tensor]:
    """Return the block's outputs on each batch of held-out text, `[sequences, length, width]`."""
    return outputs_of(visit.run, visit.block.hidden, visit.judged)


def damage(visit: Visit, changed: nn.Module, before: list[Tensor]) -> float:
    """Return the `relative_damage` of another block in the place of this one, on held-out text; `before`: `outputs`."""
    return relative_damage(replace(visit.run, module=changed), visit.block.hidden, visit.judged, before)


def damage_of(visit: Visit, source: DenseModel, skeleton: nn.Module) -> float:
    """Return the `damage` of the block that a changed model has instead; `skeleton`: that model, on meta."""
    path = visit.run.path
    module = skeleton.get_submodule(path)
    before = outputs(visit)
    load(module, path, source, visit.block.hidden.device)
    try:
        return damage(visit, module, before)
    finally:
        drop(module)
