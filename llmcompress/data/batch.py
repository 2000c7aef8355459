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

    ids: int64. counted: bool, True if a token is a target, so that a loss reads the position before it; never in the
    first column. documents: the number of the document of a token, PADDING behind the last; documents do not see each
    other. None: a sequence is one document, padded behind its end if at all, so causal attention needs no mask.
    numbers: int64 [sequences], the places of the sequences in the data of a step.
    """

    ids: Tensor
    counted: Tensor
    documents: Tensor | None = None
    numbers: Tensor | None = None

    @staticmethod
    def of(ids: Tensor) -> Batch:
        """Return sequences of one document each, whose every token but the first counts."""
        counted = torch.ones_like(ids, dtype=torch.bool)
        counted[:, :1] = False
        return Batch(ids, counted)

    @staticmethod
    def join(batches: Sequence[Batch]) -> Batch:
        """Return all sequences, short ones padded to the longest."""
        if len(batches) == 1:
            return batches[0]
        length = max(batch.ids.shape[1] for batch in batches)
        apart = any(batch.documents is not None for batch in batches)
        return Batch(
            torch.cat([_pad(batch.ids, length, 0) for batch in batches]),
            torch.cat([_pad(batch.counted, length, False) for batch in batches]),
            torch.cat([_pad(batch.document_numbers(), length, PADDING) for batch in batches]) if apart else None,
        )

    def __len__(self) -> int:
        """Number of sequences."""
        return self.ids.shape[0]

    def __getitem__(self, index: slice | Tensor) -> Batch:
        """Return some of the sequences."""
        return self._with(lambda values: values[index], lambda numbers: numbers[index])

    def chunks(self, size: int) -> list[Batch]:
        """Return parts of at most `size` sequences."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def to(self, device: torch.device) -> Batch:
        """Return the same on another device."""
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
        """bool `[sequences, length]`, True if the next token counts; never in the last column."""
        return torch.cat([self.counted[:, 1:], torch.zeros_like(self.counted[:, :1])], dim=1)

    @property
    def read(self) -> Tensor:
        """bool `[sequences, length]`, True up to a sequence's last target; nothing reads the rest."""
        return self.counted.flip(1).cumsum(1).flip(1) > 0

    def document_numbers(self) -> Tensor:
        """Return `documents`; zeros if each sequence is one document."""
        return torch.zeros_like(self.ids, dtype=torch.int32) if self.documents is None else self.documents

    def positions(self) -> Tensor:
        """Return the place of each token in its document, from 0: int64 `[sequences, length]`."""
        documents, place = self.document_numbers(), torch.arange(self.ids.shape[1], device=self.ids.device)
        begins = torch.ones_like(self.counted)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        return place - torch.where(begins, place, 0).cummax(1).values


def _pad(values: Tensor, length: int, filling: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - values.shape[1]), value=filling)
