"""Losses on hidden states: the matching blocks of two models, and the distance between the inputs of these.

The input of a student's block is compared with the input of the teacher's block that it was made from. So if blocks
were dropped, the block before the gap learns to produce the former input of the block after it. For a student that was
not made from its teacher, the recipe names the pairs.

If widths differ and a loss requires equal ones, a linear from the student's width to the teacher's stands between,
float32 and without a bias. It starts as a random orthogonal map, trains along with the student, and is dropped after
the run. It is in a run's state; every phase starts with new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmcompress.errors import RecipeError, list_names
from llmcompress.losses.divergence import wide
from llmcompress.losses.loss import Features, SumAndCount, measure_features, reads_states
from llmcompress.models.dense.blocks import body, depth, matched_blocks, states_between
from llmcompress.recipe.distillation import Layers, Term
from llmcompress.runtime.seeding import generator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

States = Mapping[int, Tensor]  # inputs by block, [sequences, length, width]
Pair = tuple[int, int]  # the student's block, the teacher's


@dataclass(frozen=True)
class StateMatching:
    """The losses of a recipe that read hidden states.

    `models`: student and teacher; `pairs`: by the number of a loss in the recipe, the blocks whose inputs it compares;
    `projections`: linears for pairs of unequal widths, by `projection_name`.
    """

    models: tuple[PreTrainedModel, PreTrainedModel]
    pairs: dict[int, tuple[Pair, ...]]
    losses: tuple[Term, ...]
    projections: nn.ModuleDict = field(default_factory=nn.ModuleDict)

    @staticmethod
    def of(student: PreTrainedModel, teacher: PreTrainedModel, losses: Sequence[Term], seed: int = 0) -> StateMatching:
        """Match the blocks, and let both models read two tokens. `seed`: for the initial projections.

        Raises RecipeError if the blocks do not match, InputError if a loss cannot compare them.
        """
        reading = [number for number, term in enumerate(losses) if reads_states(term.of)]
        pairs = {number: _pairs(student, teacher, losses[number].layers) for number in reading}
        matching = StateMatching((student, teacher), pairs, tuple(losses))
        with torch.no_grad(), matching.record_states() as states:
            for model in matching.models if reading else ():
                body(model)(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
            matching.projections.update(dict(_projections(matching, states, seed).items()))
            for number in reading:
                matching.measure(number, states, None)
        return matching

    @contextmanager
    def record_states(self) -> Iterator[tuple[States, States]]:
        """Record within the context the states that the losses read: the student's and the teacher's."""
        if not self.pairs:
            yield {}, {}
            return
        with ExitStack() as stack:
            chosen = ({pair[side] for pairs in self.pairs.values() for pair in pairs} for side in (0, 1))
            student, teacher = (stack.enter_context(states_between(*each)) for each in zip(self.models, chosen))
            yield student, teacher

    def measure(self, number: int, states: tuple[States, States], keep: Tensor | None) -> SumAndCount:
        """Measure loss `number`, the mean over its layers, at the positions `keep`, bool `[sequences, length]`."""
        with torch.autocast(next(iter(states[0].values())).device.type, enabled=False):
            layers = [self._measure_pair(number, pair, states, keep) for pair in self.pairs[number]]
        sums, counts = zip(*layers)
        return torch.stack(sums).mean(), torch.stack(counts).mean()

    def _measure_pair(self, number: int, pair: Pair, states: tuple[States, States], keep: Tensor | None) -> SumAndCount:
        loss, name = self.losses[number].of, projection_name(pair)
        student, teacher = (side[block] for side, block in zip(states, pair, strict=True))
        if loss.needs_one_width and name in self.projections:
            student = self.projections[name](wide(student))
        return measure_features(Features(student, teacher.detach(), keep), loss)


def last_block_read(student: PreTrainedModel, teacher: PreTrainedModel, losses: Sequence[Term]) -> int | None:
    """Return the last of the teacher's blocks whose input a loss compares; None if no loss reads hidden states.

    Raises RecipeError if the blocks do not match.
    """
    layers = [term.layers for term in losses if reads_states(term.of)]
    return max((block for each in layers for _, block in _pairs(student, teacher, each)), default=None)


def projection_name(pair: Pair) -> str:
    """Return the name of a projection in a run's state."""
    return f"projection_{pair[0]}_to_{pair[1]}"


def started_linear(inputs: int, outputs: int, like: Tensor, start: Callable[[Tensor], object]) -> nn.Linear:
    """Return a linear without a bias, whose weight `start` fills, on the device of `like` and in float32, or float64 if
    `like` is."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False, dtype=dtype)
    start(linear.weight)
    return linear.to(like.device)


def _projections(matching: StateMatching, states: tuple[States, States], seed: int) -> nn.ModuleDict:
    """Return linears for the pairs of unequal widths that a loss compares at one width."""
    numbers = [number for number in matching.pairs if matching.losses[number].of.needs_one_width]
    like, linears = next(matching.models[0].parameters()), nn.ModuleDict()
    for pair in sorted({pair for number in numbers for pair in matching.pairs[number]}):
        widths = states[0][pair[0]].shape[-1], states[1][pair[1]].shape[-1]
        if widths[0] != widths[1]:
            start = partial(nn.init.orthogonal_, generator=generator(seed, "projection", *pair))
            linears[projection_name(pair)] = started_linear(*widths, like, start)
    return linears


def _pairs(student: PreTrainedModel, teacher: PreTrainedModel, layers: Layers | None) -> tuple[Pair, ...]:
    """Return (student's block, teacher's block) for each of `layers`: teacher's blocks that the student has, or
    pairs."""
    _check_pairs([layer for layer in layers or () if not isinstance(layer, int)], (depth(student), depth(teacher)))
    blocks: Mapping[int, int] = {}  # the student's by the teacher's
    if layers is None or any(isinstance(layer, int) for layer in layers):
        try:
            blocks = {teachers: students for students, teachers in matched_blocks(student, teacher).items()}
        except RecipeError as error:
            raise RecipeError(f"{error}; or name pairs of blocks in layers, as in layers: [[1, 2]]") from error
    chosen = [teachers for teachers, students in blocks.items() if students > 0] if layers is None else layers
    absent = [str(layer) for layer in chosen if isinstance(layer, int) and layer not in blocks]
    if absent or not chosen:
        raise RecipeError(
            f"layers: the student does not have the teacher's block {list_names(absent)}; it has "
            f"{', '.join(map(str, blocks))}"
        )
    return tuple((blocks[layer], layer) if isinstance(layer, int) else layer for layer in chosen)


def _check_pairs(pairs: Sequence[Pair], depths: tuple[int, int]) -> None:
    for pair in pairs:
        for block, blocks, model in zip(pair, depths, ("student", "teacher"), strict=True):
            if block >= blocks:
                raise RecipeError(
                    f"layers: {list(pair)} names a block of the student and one of the teacher, and the {model} has no "
                    f"block {block}; its last is {blocks - 1}"
                )
