"""Losses on hidden states: which blocks of two models are the same, and how far apart what they read is.

The input of a student's block is compared with the input of the teacher's block that it once was. So where blocks were
dropped, the block before the gap learns to make what the block behind it used to read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmcompress.distill.head import HeadLoss
from llmcompress.distill.losses.features import Features, measure_features, reads_states
from llmcompress.distill.losses.loss import SumAndCount
from llmcompress.distill.recipe import Term
from llmcompress.errors import RecipeError, listed
from llmcompress.states import states_between
from llmcompress.surgery.kept import matched_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

States = Mapping[int, Tensor]  # by block: what it reads, [sequences, length, width]


@dataclass(frozen=True)
class Matching:
    """The losses of a recipe that read hidden states. `pairs`: by the number of the loss in the recipe, the blocks of
    the student and of the teacher whose inputs it compares. `models`: student and teacher."""

    models: tuple[PreTrainedModel, PreTrainedModel]
    pairs: dict[int, tuple[tuple[int, int], ...]]
    losses: tuple[Term, ...]

    @staticmethod
    def of(student: PreTrainedModel, teacher: PreTrainedModel, losses: Sequence[Term]) -> Matching:
        """Finds the blocks, and lets both models read two tokens. Raises RecipeError where they do not match,
        InputError where a loss cannot compare them."""
        reading = [number for number, term in enumerate(losses) if reads_states(term.of)]
        blocks = matched_blocks(student, teacher) if reading else {}
        pairs = {number: _pairs(blocks, losses[number].layers) for number in reading}
        found = Matching((student, teacher), pairs, tuple(losses))
        with torch.no_grad(), found.watched() as states:
            for model in found.models if reading else ():
                model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
            for number in reading:
                found.measured(number, states, None)
        return found

    @contextmanager
    def watched(self) -> Iterator[tuple[States, States]]:
        """Where the models leave, while it lasts, the states that the losses read: the student's, the teacher's."""
        if not self.pairs:
            yield {}, {}
            return
        with ExitStack() as stack:
            chosen = ({pair[side] for pairs in self.pairs.values() for pair in pairs} for side in (0, 1))
            mine, theirs = (stack.enter_context(states_between(*one)) for one in zip(self.models, chosen))
            yield mine, theirs

    def measured(self, number: int, states: tuple[States, States], keep: Tensor | None) -> SumAndCount:
        """Loss `number`: the mean over its layers, of the positions that count: `keep`, bool `[sequences, length]`."""
        given, wanted = states
        with torch.autocast(next(iter(given.values())).device.type, enabled=False):
            found = [
                measure_features(Features(given[mine], wanted[theirs].detach(), keep), self.losses[number].of)
                for mine, theirs in self.pairs[number]
            ]
        sums, counts = zip(*found)
        return torch.stack(sums).mean(), torch.stack(counts).mean()

    def joined(
        self, predicted: HeadLoss, states: tuple[States, States], keep: Tensor, weights: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of all losses, with gradient; and the sum and the count of each `[losses, 2]`, without.

        `predicted`: of the other losses, in their order and weighted already.
        """
        total, rows = predicted.total, []
        others = iter(predicted.terms)
        for number, weight in enumerate(weights):
            if number not in self.pairs:
                rows.append(torch.stack(next(others)))
                continue
            found, count = self.measured(number, states, keep)
            total = total + weight * found
            rows.append(torch.stack([found.detach(), count]).to(total.dtype))
        return total, torch.stack(rows)


def _pairs(blocks: Mapping[int, int], layers: Sequence[int] | None) -> tuple[tuple[int, int], ...]:
    """(student's block, teacher's block) for each of the teacher's blocks `layers`."""
    own = {theirs: mine for mine, theirs in blocks.items()}
    chosen = [theirs for theirs, mine in own.items() if mine > 0] if layers is None else layers
    absent = [str(theirs) for theirs in chosen if theirs not in own]
    if absent or not chosen:
        raise RecipeError(
            f"layers: the student does not have the teacher's block {listed(absent)}; it has {', '.join(map(str, own))}"
        )
    return tuple((own[theirs], theirs) for theirs in chosen)
