"""Documents into sequences of one length: joined and cut, with or without their boundaries, or one in each, padded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmcompress.data.batch import Batch

Tokens = tuple[list[int], list[bool]]  # ids, and which of them count as targets
Document = Iterable[Tokens]  # piece by piece


@dataclass(frozen=True, eq=False)
class PackedText:
    """Sequences, the documents `read` for them, and how much was `dropped` because nothing in it counts: sequences, or
    documents where each has a sequence of its own."""

    sequences: Batch
    read: int
    dropped: int


def pack_documents(
    documents: Iterable[Document], bos: int | None, length: int, samples: int, boundaries: bool
) -> PackedText:
    """At most `samples` sequences of `length` tokens cut out of the joined documents; what is left over is dropped.

    Every sequence starts with `bos`. With `boundaries` every document does, its first token is no target, and the
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
                here = slice(used, used + length - len(row.ids))
                row.add(ids[here], [False, *counted[here][1:]] if begins else counted[here], read)
                used = min(here.stop, len(ids))
                if len(row.ids) == length:
                    dropped += not rows.keep(row, boundaries)
                    row = _Row()
                    if len(rows.ids) == samples:
                        return PackedText(rows.batch(boundaries), read, dropped)
    return PackedText(rows.batch(boundaries), read, dropped)


def pad_documents(documents: Iterable[Document], bos: int | None, length: int, samples: int) -> PackedText:
    """The first `length` tokens of each document, `bos` first, short ones padded behind their end."""
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
        dropped += not rows.keep(row, False)
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
    """The sequences that have a target, as tensors: a list of numbers takes four times the memory."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.ids: list[Tensor] = []
        self.counted: list[Tensor] = []
        self.documents: list[Tensor] = []

    def keep(self, row: _Row, boundaries: bool) -> bool:
        """True if it has a target."""
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
        shape = len(self.ids), self.length
        ids = torch.stack(self.ids) if self.ids else torch.zeros(shape, dtype=torch.int64)
        counted = torch.stack(self.counted) if self.ids else torch.zeros(shape, dtype=torch.bool)
        return Batch(ids, counted, torch.stack(self.documents) if boundaries and self.ids else None)
