"""Documents into sequences of one length: joined and cut, with or without their boundaries, or one in each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmcompress.data.batch import Batch

Tokens = tuple[list[int], list[bool]]  # ids, and which of them count as targets
Document = Iterable[Tokens]  # piece by piece


@dataclass(frozen=True, eq=False)
class PackedText:
    """Sequences, the number of documents `read` for them, and of sequences `dropped` as too short or without target."""

    sequences: Batch
    read: int
    dropped: int


def count_all(pieces: Iterable[list[int]]) -> Iterator[Tokens]:
    """Yield the pieces of a document whose every token counts."""
    return ((ids, [True] * len(ids)) for ids in pieces)


def pack_documents(
    documents: Iterable[Document], bos: int | None, length: int, samples: int, boundaries: bool = False
) -> PackedText:
    """Return at most `samples` sequences of `length` tokens cut out of the joined documents, without the rest.

    Every sequence starts with `bos`. With `boundaries` every document does too, its first token is no target, and the
    sequences know which document a token is of; the rest of a document that is cut is a document of its own.
    """
    rows, row, read, dropped = _Rows(length), _Row(), 0, 0
    for read, document in enumerate(documents, start=1):
        for ids, counted in document:
            used = 0
            while used < len(ids):
                begins = not row.ids or (boundaries and row.documents[-1] != read)
                if begins and bos is not None and ids[used] != bos:  # a rendered chat may bring its own
                    row.add([bos], [False], read)
                    begins = False
                part = slice(used, used + length - len(row.ids))
                row.add(ids[part], [False, *counted[part][1:]] if begins else counted[part], read)
                used = min(part.stop, len(ids))
                if len(row.ids) == length:
                    dropped += not rows.add(row, boundaries)
                    row = _Row()
                    if len(rows.ids) == samples:
                        return PackedText(rows.batch(boundaries), read, dropped)
    return PackedText(rows.batch(boundaries), read, dropped)


def first_tokens(
    documents: Iterable[Document], bos: int | None, length: int, samples: int, padded: bool = False
) -> PackedText:
    """Return the first `length` tokens of each document, `bos` first; short ones are `padded` behind, or dropped."""
    rows, read, dropped = _Rows(length), 0, 0
    for document in documents:
        read += 1
        row = _Row()
        for ids, counted in document:
            if not row.ids and bos is not None and ids[:1] != [bos]:
                row.add([bos], [False], read)
            row.add(ids, counted if row.ids else [False, *counted[1:]][: len(ids)], read)
            if len(row.ids) >= length:
                break
        dropped += not ((padded or len(row.ids) >= length) and rows.add(row, False))
        if len(rows.ids) == samples:
            break
    return PackedText(rows.batch(False), read, dropped)


@dataclass
class _Row:
    """A sequence under construction."""

    ids: list[int] = field(default_factory=list)
    counted: list[bool] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)

    def add(self, ids: list[int], counted: list[bool], document: int) -> None:
        self.ids += ids
        self.counted += counted
        self.documents += [document] * len(ids)


class _Rows:
    """The finished sequences, as tensors: a list of numbers takes four times the memory."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.ids: list[Tensor] = []
        self.counted: list[Tensor] = []
        self.documents: list[Tensor] = []

    def add(self, row: _Row, boundaries: bool) -> bool:
        """Add a row, padded, and return True, unless it has no target."""
        counted = row.counted[: self.length]
        if not any(counted):
            return False
        missing = (0, self.length - len(counted))
        self.ids.append(pad(torch.tensor(row.ids[: self.length]), missing))
        self.counted.append(pad(torch.tensor(counted), missing))
        if boundaries:
            self.documents.append(torch.tensor(row.documents, dtype=torch.int32))
        return True

    def batch(self, boundaries: bool) -> Batch:
        if not self.ids:
            empty = torch.zeros((0, self.length), dtype=torch.int64)
            return Batch(empty, empty.bool())
        return Batch(
            torch.stack(self.ids), torch.stack(self.counted), torch.stack(self.documents) if boundaries else None
        )
