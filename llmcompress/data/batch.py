"""The input of one forward: token ids, their marks as targets, and the beginnings of documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = -1  # the document of what is no text; its token is 0, which no position that counts ever reads


@dataclass(frozen=True, eq=False)
class Batch:
    """Token sequences `[sequences, length]`.

    ids: int64. counted: bool, true = this token is a target that counts, so the position before it is what a loss
    reads; never true in the first column, which nothing predicts. documents: the number of the document that a token
    belongs to, PADDING behind the last; documents do not see each other. None: a sequence is one document, padded
    behind its end or not at all, where causal attention needs no mask. numbers: int64 [sequences], which of the data
    each sequence is, in what a step reads.
    """

    ids: Tensor
    counted: Tensor
    documents: Tensor | None = None
    numbers: Tensor | None = None

    @staticmethod
    def of(ids: Tensor) -> Batch:
        """Sequences of one document each, of which every token but the first counts."""
        counted = torch.ones_like(ids, dtype=torch.bool)
        counted[:, :1] = False
        return Batch(ids, counted)

    @staticmethod
    def join(batches: Sequence[Batch]) -> Batch:
        """All sequences, short ones padded to the longest."""
        if len(batches) == 1:
            return batches[0]
        length = max(batch.ids.shape[1] for batch in batches)
        apart = any(batch.documents is not None for batch in batches)
        return Batch(
            torch.cat([_padded(batch.ids, length, 0) for batch in batches]),
            torch.cat([_padded(batch.counted, length, False) for batch in batches]),
            torch.cat([_padded(batch.document_numbers(), length, PADDING) for batch in batches]) if apart else None,
        )

    def __len__(self) -> int:
        """Number of sequences."""
        return self.ids.shape[0]

    def __getitem__(self, index: slice | Tensor) -> Batch:
        """Some of the sequences."""
        return self._with(lambda values: values[index], lambda numbers: numbers[index])

    def chunks(self, size: int) -> list[Batch]:
        """Parts of at most `size` sequences."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return self._with(lambda values: values.to(device))

    def trim(self) -> Batch:
        """Return a batch without the columns after the last target: later tokens change nothing that counts."""
        used = self.counted.any(0).nonzero()
        last = int(used[-1]) + 1 if len(used) else 2
        return self._with(lambda values: values[:, :last])

    def _with(
        self, change: Callable[[Tensor], Tensor], choose: Callable[[Tensor], Tensor] = lambda numbers: numbers
    ) -> Batch:
        """Return a batch with every tensor `[sequences, length]` changed, and the numbers chosen alike."""
        documents = None if self.documents is None else change(self.documents)
        numbers = None if self.numbers is None else choose(self.numbers)
        return Batch(change(self.ids), change(self.counted), documents, numbers)

    @property
    def targets(self) -> int:
        """The number of tokens that count."""
        return int(self.counted.sum())

    @property
    def predicting(self) -> Tensor:
        """bool `[sequences, length]`: true where the next token counts, so never in the last column."""
        return torch.cat([self.counted[:, 1:], torch.zeros_like(self.counted[:, :1])], dim=1)

    @property
    def read(self) -> Tensor:
        """bool `[sequences, length]`: true up to a sequence's last target; what comes behind is read by nothing."""
        return self.counted.flip(1).cumsum(1).flip(1) > 0

    def document_numbers(self) -> Tensor:
        """`documents`; zeros where a sequence is one document."""
        return torch.zeros_like(self.ids, dtype=torch.int32) if self.documents is None else self.documents

    def positions(self) -> Tensor:
        """int64 `[sequences, length]`: the place of each token in its document, from 0."""
        documents, place = self.document_numbers(), torch.arange(self.ids.shape[1], device=self.ids.device)
        begins = torch.ones_like(self.counted)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        return place - torch.where(begins, place, 0).cummax(1).values


def _padded(values: Tensor, length: int, filling: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - values.shape[1]), value=filling)
