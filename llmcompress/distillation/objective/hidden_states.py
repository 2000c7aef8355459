"""Losses on hidden states: the matching blocks of two models, and the distance between their inputs.

The input of a student's block is compared with the input of the teacher's block that it was made from. So if blocks
were dropped, the block before the gap learns to produce the former input of the block after it. A student that was not
made from its teacher has no such blocks; its recipe must name the pairs. If widths differ, a linear for each pair of
blocks stands between the student's states and a loss that requires equal widths (`projections.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmcompress.distillation.objective.projections import Pair, projection_name, projections
from llmcompress.errors import RecipeError, list_names
from llmcompress.losses.divergence import wide
from llmcompress.losses.loss import Features, SumAndCount, measure_features, reads_states
from llmcompress.models.dense.blocks import body, depth, matched_blocks, states_between
from llmcompress.recipe.distillation import Layers, Term

if TYPE_CHECKING:
    from transformers import PreTrainedModel

States = Mapping[int, Tensor]  # by block: what it reads, [sequences, length, width]


@dataclass(frozen=True)
class StateMatching:
    """The losses of a recipe that read hidden states. `pairs`: by the number of the loss in the recipe, the blocks of
    the student and of the teacher whose inputs it compares; `models`: student and teacher; `projections`: linears for
    pairs of unequal widths, for the losses that require equal ones."""

    models: tuple[PreTrainedModel, PreTrainedModel]
    pairs: dict[int, tuple[Pair, ...]]
    losses: tuple[Term, ...]
    projections: nn.ModuleDict = field(default_factory=nn.ModuleDict)

    @staticmethod
    def of(student: PreTrainedModel, teacher: PreTrainedModel, losses: Sequence[Term], seed: int = 0) -> StateMatching:
        """Find the blocks, and let both models read two tokens. `seed`: for the initial projections.

        Raises RecipeError if the blocks do not match, InputError if a loss cannot compare them.
        """
        reading = [number for number, term in enumerate(losses) if reads_states(term.of)]
        pairs = {number: _pairs(student, teacher, losses[number].layers) for number in reading}
        found = StateMatching((student, teacher), pairs, tuple(losses))
        with torch.no_grad(), found.watched() as states:
            for model in found.models if reading else ():
                body(model)(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
            found.projections.update(dict(_projections(found, states, seed).items()))
            for number in reading:
                found.measured(number, states, None)
        return found

    @contextmanager
    def watched(self) -> Iterator[tuple[States, States]]:
        """Record the states that the losses read within the context: the student's and the teacher's."""
        if not self.pairs:
            yield {}, {}
            return
        with ExitStack() as stack:
            chosen = ({pair[side] for pairs in self.pairs.values() for pair in pairs} for side in (0, 1))
            mine, theirs = (stack.enter_context(states_between(*one)) for one in zip(self.models, chosen))
            yield mine, theirs

    def measured(self, number: int, states: tuple[States, States], keep: Tensor | None) -> SumAndCount:
        """Measure loss `number`, the mean over its layers, at the positions `keep`, bool `[sequences, length]`."""
        with torch.autocast(next(iter(states[0].values())).device.type, enabled=False):
            found = [self._measured(number, pair, states, keep) for pair in self.pairs[number]]
        sums, counts = zip(*found)
        return torch.stack(sums).mean(), torch.stack(counts).mean()

    def _measured(self, number: int, pair: Pair, states: tuple[States, States], keep: Tensor | None) -> SumAndCount:
        loss, name = self.losses[number].of, projection_name(pair)
        given, wanted = (side[block] for side, block in zip(states, pair, strict=True))
        if loss.needs_one_width and name in self.projections:
            given = self.projections[name](wide(given))
        return measure_features(Features(given, wanted.detach(), keep), loss)


def last_read(student: PreTrainedModel, teacher: PreTrainedModel, losses: Sequence[Term]) -> int | None:
    """Return the last of the teacher's blocks whose input a loss compares; None where no loss reads hidden states.

    Raises RecipeError if the blocks do not match.
    """
    layers = [term.layers for term in losses if reads_states(term.of)]
    return max((theirs for each in layers for _, theirs in _pairs(student, teacher, each)), default=None)


def _projections(matching: StateMatching, states: tuple[States, States], seed: int) -> nn.ModuleDict:
    """Return linears for the pairs of unequal widths that a loss compares at one width."""
    numbers = [number for number in matching.pairs if matching.losses[number].of.needs_one_width]
    pairs = {pair for number in numbers for pair in matching.pairs[number]}
    widths = {pair: (states[0][pair[0]].shape[-1], states[1][pair[1]].shape[-1]) for pair in sorted(pairs)}
    unequal = {pair: both for pair, both in widths.items() if both[0] != both[1]}
    return projections(unequal, seed, next(matching.models[0].parameters()))


def _pairs(student: PreTrainedModel, teacher: PreTrainedModel, layers: Layers | None) -> tuple[Pair, ...]:
    """Return (student's block, teacher's block) for each of `layers`: teacher's blocks that the student has, or
    pairs."""
    _check_there([layer for layer in layers or () if not isinstance(layer, int)], (depth(student), depth(teacher)))
    own = _own(student, teacher) if layers is None or any(isinstance(layer, int) for layer in layers) else {}
    chosen = [theirs for theirs, mine in own.items() if mine > 0] if layers is None else layers
    absent = [str(layer) for layer in chosen if isinstance(layer, int) and layer not in own]
    if absent or not chosen:
        raise RecipeError(
            f"layers: the student does not have the teacher's block {list_names(absent)}; it has "
            f"{', '.join(map(str, own))}"
        )
    return tuple((own[layer], layer) if isinstance(layer, int) else layer for layer in chosen)


def _own(student: PreTrainedModel, teacher: PreTrainedModel) -> dict[int, int]:
    """Return the student's block for each of the teacher's blocks that it still has."""
    try:
        return {theirs: mine for mine, theirs in matched_blocks(student, teacher).items()}
    except RecipeError as error:
        raise RecipeError(f"{error}; or name pairs of blocks in layers, as in layers: [[1, 2]]") from error


def _check_there(pairs: Sequence[Pair], depths: tuple[int, int]) -> None:
    for pair in pairs:
        for block, blocks, model in zip(pair, depths, ("student", "teacher"), strict=True):
            if block >= blocks:
                raise RecipeError(
                    f"layers: {list(pair)} names a block of the student and one of the teacher, and the {model} has no "
                    f"block {block}; its last is {blocks - 1}"
                )
