"""Vectors of columns that are coded together: the nearest entries of codebooks, in error feedback and afterwards.

An error e of the columns of one vector costs |e A|^2, where A says what couples them, and the entry that is chosen is
the nearest under it. Columns of a vector that are stored elsewhere have no say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmcompress.weight.nodes import Codebook, Sum, Weight

TURNS = 2  # of codebooks that are added up, where all are chosen again


class Vectors:
    """A `Side`, and with nothing beside it a `Projection`: vectors of columns as entries of codebooks, added up.

    Entries are fitted before. Codes are chosen when the loop reaches the first column of a vector; that its columns are
    then stored one by one feeds back just what a triangular solve over all of them would.
    """

    def __init__(
        self, books: Sequence[Codebook], factor: Tensor | None = None, importance: Tensor | None = None
    ) -> None:
        """For `books` of one length. In the loop, codes are chosen under the `factor [in, in]` of the feedback, or
        without one by the `importance [in]` of a squared error in a column."""
        self.books, self.factor, self.importance = tuple(books), factor, importance
        self.length, self.width = books[0].centroids.shape[1], books[0].width
        self.strides: tuple[int, ...] = (self.length,)
        self.scales = [book.scale.float() for book in books]  # each [out, 1]
        self.codes = torch.stack([book.codes for book in books])  # [books, out, vectors]
        self.stored = torch.zeros(self.length, self.codes.shape[1], device=self.codes.device)

    def begin(self, column: int, current: Tensor, shown: Tensor | None = None) -> None:
        """Chooses the codes of a vector at its first column; `shown [in, out]` is the same for all rows."""
        if column % self.length:
            return
        places = self.places(column // self.length, None if shown is None else shown[:, 0])
        if len(places):
            codes, values = self.nearest(places, current[places], self._root(places))
            self.codes[:, :, column // self.length] = codes
            self.stored[places - column] = values

    def project(self, column: int, values: Tensor) -> Tensor:
        """Return the values chosen."""
        return self.stored[column % self.length]

    def weight(self, values: Tensor) -> Weight:
        """The expression for the codes as they are now."""
        return sum_of_books(
            [replace(book, codes=codes) for book, codes in zip(self.books, self.codes.clone(), strict=True)]
        )

    def places(self, vector: int, shown: Tensor | None = None) -> Tensor:
        """The columns of a vector, those of them that are `shown [in]`."""
        start, stop = vector * self.length, min((vector + 1) * self.length, self.width)
        inside = torch.arange(start, stop, device=self.codes.device)
        return inside if shown is None else inside[shown[start:stop]]

    def nearest(
        self, places: Tensor, wanted: Tensor, root: Tensor, codes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The codes uint8 `[books, out]` nearest to `wanted [columns, out]` at the columns `places` of one vector,
        under `root [columns, columns]` (A above), and their values `[columns, out]`.

        Codebooks that are added up are searched in turn, each for what the others leave: from `codes [books, out]`, so
        that nothing gets worse, or one after the other from nothing.
        """
        entries = [book.centroids.float()[:, places % self.length] for book in self.books]
        points = [each @ root for each in entries]
        chosen_codes = torch.zeros_like(self.codes[:, :, 0]) if codes is None else codes.clone()
        values = [torch.zeros_like(wanted.T) for _ in entries]
        if codes is not None:
            values = [each[code.long()] * scale for each, code, scale in zip(entries, codes, self.scales, strict=True)]
        for _ in range(1 if codes is not None or len(entries) == 1 else TURNS):
            for book, scale in enumerate(self.scales):
                others = [value for other, value in enumerate(values) if other != book]
                left = sum((-value for value in others), wanted.T)
                left = torch.where(scale > 0, left / scale, 0.0) @ root
                nearness = torch.addmm(points[book].square().sum(1), left, points[book].T, alpha=2, beta=-1)
                chosen = nearness.argmax(1)
                chosen_codes[book], values[book] = chosen, entries[book][chosen] * scale
        return chosen_codes, torch.stack(values).sum(0).T

    def _root(self, places: Tensor) -> Tensor:
        """A for the loop: with feedback inverse(U) of the columns `places`, since e inverse(U) is what is fed back."""
        if self.factor is not None:
            block = self.factor[places][:, places]
            return torch.linalg.solve_triangular(block, torch.eye(len(block), device=block.device), upper=True)
        weights = torch.ones(self.width, device=self.codes.device) if self.importance is None else self.importance
        return weights[places].sqrt().diag()


def sum_of_books(books: Sequence[Codebook]) -> Weight:
    """Codebooks added up."""
    return books[0] if len(books) == 1 else Sum(tuple(books))


def books_of(w: Weight) -> tuple[Codebook, ...]:
    """The codebook that `w` is, or those of one length that it adds up; none of anything else."""
    parts = w.parts if isinstance(w, Sum) else (w,)
    books = tuple(part for part in parts if isinstance(part, Codebook))
    alike = len({book.centroids.shape[1] for book in books}) == 1
    return books if alike and len(books) == len(parts) else ()
