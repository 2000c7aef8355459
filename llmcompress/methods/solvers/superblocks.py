"""Superblocks of llama.cpp's types, filled in error feedback: scales, entries of tables, and signs.

An error e of eight columns costs |e A|^2, where A = inverse(U_vv) for the factor U of the inverse Hessian: what is left
once later columns make up for it. For given signs the best entry is found among all, by one product with the entries
and the products of two of their numbers; then the sign whose change gains most is changed, or two where the number of
negative ones is even, and the entry is searched again.
"""

# O out, R rows times scales tried, S scales tried, G groups of a superblock, L columns of an entry

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llmcompress.methods.solvers.grid import float16_scale
from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import Superblocks, Weight
from llmcompress.weight.superblocks import (
    LAYOUTS,
    OCTET,
    SHIFT,
    SUPERBLOCK,
    SuperblockForm,
    SuperblockNumbers,
    column_scales,
    pack_superblocks,
    superblock_table,
    unpack_superblocks,
)

PART = 1024  # vectors whose distances to all entries are in memory at a time
BLOCK = 64  # columns whose moves are gathered into one product; changes speed, never the result
CHANGES = 2  # of the signs of a vector, at most
FITS = 2  # of a group's scale before d is chosen
NEAR = (-2, -1, 0, 1, 2)  # of n, tried around the first guess
SHARES = tuple(1.1 - 0.025 * step for step in range(21))  # of the largest scale of a superblock, tried for d
GROWTH = 1.07  # of d, since errors that are fed back make later groups larger


class Entries:
    """The vectors that eight columns may become, in units of their scale, and the search among them."""

    def __init__(self, form: SuperblockForm, device: torch.device) -> None:
        self.layout = LAYOUTS[form]
        table = superblock_table(form).to(device)
        self.table = torch.cat([table + SHIFT, table - SHIFT]) if form == "IQ1_M" else table
        self.length = self.layout.length
        self.pairs = torch.triu_indices(self.length, self.length, 1, device=device)
        self.pairs_of_eight = torch.triu_indices(OCTET, OCTET, 1, device=device)
        first, second = (self.table[:, side] for side in self.pairs)
        self.features = torch.cat([self.table, first * second], 1).T.contiguous()

    def nearest(self, wanted: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
        """Return the places int64 `[R, 8 / L]` of the entries nearest to `wanted [R, 8]`, and the values `[R, 8]`.

        An error e costs `e metric e^T`.
        """
        if self.layout.is_signed:
            found = [self._nearest_signed(part, metric) for part in wanted.split(PART)]
            return torch.cat([places for places, _ in found]), torch.cat([values for _, values in found])
        points = self.table @ metric
        bias = -(points * self.table).sum(1)
        places = torch.cat([best(torch.addmm(bias, part, points.T, alpha=2)) for part in wanted.split(PART)])
        return places[:, None], self.table[places]

    def _nearest_signed(self, wanted: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
        signs = torch.where(wanted < 0, -1.0, 1.0)
        if self.layout.is_even:
            cheapest = (wanted.square() * metric.diagonal()).argmin(1, keepdim=True)
            signs.scatter_(1, cheapest, signs.gather(1, cheapest) * signs.prod(1, keepdim=True))
        places = torch.zeros(len(wanted), OCTET // self.length, dtype=torch.int64, device=wanted.device)
        values = wanted.clone()  # entries that come later count as exact until then
        rows = torch.arange(len(wanted), device=wanted.device)
        for _ in range(CHANGES):
            some, own = wanted[rows], signs[rows]
            stored, chosen = values[rows], places[rows]
            for part in range(OCTET // self.length):
                self._choose(part, some, own, stored, chosen, metric)
            values[rows], places[rows] = stored, chosen
            changed, turned = self._turn(some, stored, metric)
            rows = rows[changed]
            if not len(rows):
                break
            signs[rows] *= turned
            values[rows] *= turned
        return places, values

    def _choose(self, part: int, wanted: Tensor, signs: Tensor, stored: Tensor, places: Tensor, metric: Tensor) -> None:
        """Overwrite a part of `stored [R, 8]`, and its `places [R, parts]`, with the best entry for its signs."""
        inside = slice(part * self.length, (part + 1) * self.length)
        block, own = metric[inside, inside], signs[:, inside]
        pull = (wanted - stored) @ metric[:, inside] + stored[:, inside] @ block
        first, second = self.pairs
        weights = torch.cat([pull * own, -block[first, second] * own[:, first] * own[:, second]], 1)
        bias = -(self.table.square() @ block.diagonal())
        places[:, part] = best(torch.addmm(bias, weights, self.features, alpha=2))
        stored[:, inside] = self.table[places[:, part]] * own

    def _turn(self, wanted: Tensor, stored: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows in which other signs gain, bool `[R]`, and the factors of their values `[rows, 8]`."""
        left = (wanted - stored) @ metric
        cost = 4 * stored * (left + stored * metric.diagonal())
        factors = torch.ones_like(stored)
        if self.layout.is_even:
            first, second = self.pairs_of_eight
            both = 8 * metric[first, second] * stored[:, first] * stored[:, second]
            lowest, pair = (cost[:, first] + cost[:, second] + both).min(1)
            factors.scatter_(1, self.pairs_of_eight.T[pair], -1.0)
        else:
            lowest, column = cost.min(1)
            factors.scatter_(1, column[:, None], -1.0)
        gains = lowest < 0
        return gains, factors[gains]


def best(scores: Tensor) -> Tensor:
    """Return the places of the largest of each row, int64: as `argmax`, several times as fast."""
    classes = scores.unflatten(1, (16, -1))
    chosen = classes.amax(1).argmax(1)
    inside = classes[torch.arange(len(scores), device=scores.device), :, chosen].argmax(1)
    return inside * classes.shape[2] + chosen


def as_stored(places: Tensor, values: Tensor, shift: Tensor, form: SuperblockForm) -> tuple[Tensor, Tensor]:
    """Return the places and signs of `SuperblockNumbers`, int32 `[R, count]`, of octets `[R, 8 * octets]`.

    `shift [R, 1]`: what IQ1_S adds to a group.
    """
    if form == "IQ1_S":
        return places.int(), (shift < 0).int()
    if form == "IQ1_M":
        entries = len(superblock_table(form))
        return (places % entries).int(), (places // entries).int()
    negative = (values < 0).int().unflatten(1, (-1, OCTET))
    masks = (negative << torch.arange(OCTET, dtype=torch.int32, device=values.device)).sum(2, dtype=torch.int32)
    return places.int(), masks & ((1 << LAYOUTS[form].signs[0][0]) - 1)


@dataclass
class FilledSuperblocks:
    """Numbers chosen so far: d `[O, 1]` of each superblock; n `[O, 1]`, places and signs `[O, count]` of each group."""

    d: list[Tensor] = field(default_factory=list)
    n: list[Tensor] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list)
    signs: list[Tensor] = field(default_factory=list)


class InSuperblocks:
    """A `Projection` to superblocks of an IQ type, which fill the matrix.

    d is chosen where a superblock starts, n and all entries of a group where that starts, each on weights that carry
    all feedback so far. `factor [in, in]`: that of the feedback; without one, all errors count alike.
    """

    def __init__(self, form: SuperblockForm, factor: Tensor | None, device: torch.device) -> None:
        self.form, self.layout, self.factor = form, LAYOUTS[form], factor
        self.strides: tuple[int, ...] = (SUPERBLOCK, self.layout.group)
        self.entries = Entries(form, device)
        self.filled = FilledSuperblocks()
        self.unit = torch.zeros(0, 1)  # d of the superblock
        self.scale_of_size = torch.zeros(0, 1)  # fitted scales of its groups, over the mean size of their weights
        self.stored = torch.zeros(0, 0)  # values of the group, [group, O]

    def begin(self, column: int, current: Tensor) -> None:
        """Fill the superblock's head, and the group, that start at `column`."""
        if column % SUPERBLOCK == 0:
            self._start(column, current)
        if column % self.layout.group == 0:
            self._fill(column, current)

    def project(self, column: int, values: Tensor) -> Tensor:
        """Return the chosen values."""
        return self.stored[column % self.layout.group]

    def _start(self, column: int, current: Tensor) -> None:
        """Choose d such that the scales of groups, fitted without feedback between them, are nearly its multiples."""
        group, layout = self.layout.group, self.layout
        starts = range(column, column + SUPERBLOCK, group)
        fitted = [self._fit(current[start : start + group].T, self._factor(start)[1]) for start in starts]
        scales, weights, sizes = (torch.cat(part, 1) for part in zip(*fitted, strict=True))
        self.scale_of_size = scales * inverse(sizes)
        largest = scales.amax(1, keepdim=True) / layout.largest
        tried = torch.stack([largest * share for share in SHARES])  # [S, O, 1]
        errors = (scales - (2 * self._nearest_n(scales * inverse(tried)) + 1) * tried).square() * weights
        step = tried.gather(0, errors.sum(2).argmin(0)[None, :, None])[0]
        self.unit = float16_scale(GROWTH * layout.divisor * step).float()
        self.filled.d.append(self.unit)

    def _factor(self, start: int) -> tuple[Tensor, list[Tensor]]:
        """Return U of a group, and A of each of its octets."""
        columns = slice(start, start + self.layout.group)
        eye = torch.eye(self.layout.group, device=self.entries.table.device)
        block = eye if self.factor is None else self.factor[columns, columns]
        octets = [slice(first, first + OCTET) for first in range(0, len(block), OCTET)]
        small = eye[:OCTET, :OCTET]
        return block, [torch.linalg.solve_triangular(block[each, each], small, upper=True) for each in octets]

    def _fit(self, wanted: Tensor, roots: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the least-squares scale of a group `wanted [O, C]`, what an error of it costs, and the mean size."""
        size = wanted.square().mean(1, keepdim=True).sqrt()
        scale, energy = size / self.entries.table.square().mean().sqrt(), size
        for _ in range(FITS):
            gain, energy = torch.zeros_like(size), torch.zeros_like(size)
            for part, root in zip(wanted.split(OCTET, 1), roots, strict=True):
                values = self.entries.nearest(part * inverse(scale), root @ root.T)[1]
                pull = values @ root @ root.T
                gain += (part * pull).sum(1, keepdim=True)
                energy += (values * pull).sum(1, keepdim=True)
            scale = (gain * inverse(energy)).clamp_min(0)
        return scale, energy, size

    def _nearest_n(self, multiples: Tensor) -> Tensor:
        return ((multiples - 1) / 2).round().clamp_(0, self.layout.largest // 2)

    def _fill(self, column: int, current: Tensor) -> None:
        """Choose n among those near a first guess, each with its entries and the feedback within the group."""
        wanted = current[column : column + self.layout.group].T
        step = self.unit / self.layout.divisor
        scale_of_size = self.scale_of_size[:, [column % SUPERBLOCK // self.layout.group]]
        guess = self._nearest_n(scale_of_size * wanted.square().mean(1, keepdim=True).sqrt() * inverse(step))
        n = torch.cat([(guess + near).clamp_(0, self.layout.largest // 2) for near in NEAR])  # [R, 1]
        shift = torch.zeros_like(n)
        if self.form == "IQ1_S":
            n, shift = torch.cat([n, n]), torch.cat([shift + SHIFT, shift - SHIFT])
        tried = len(n) // len(wanted)
        scale = (2 * n + 1) * step.repeat(tried, 1)
        left, errors = wanted.repeat(tried, 1), torch.zeros_like(scale)
        block, roots = self._factor(column)
        places, values = [], []
        for start, root in zip(range(0, len(block), OCTET), roots, strict=True):
            octet, later = slice(start, start + OCTET), slice(start + OCTET, None)
            at, numbers = self.entries.nearest(left[:, octet] * inverse(scale) - shift, root @ root.T)
            places.append(at)
            values.append((numbers + shift) * scale)
            error = (left[:, octet] - values[-1]) @ root
            errors += error.square().sum(1, keepdim=True)
            left[:, later] -= error @ block[octet, later]
        best_tries = errors.view(tried, -1).argmin(0)
        rows = best_tries * len(wanted) + torch.arange(len(wanted), device=wanted.device)
        chosen = torch.cat(values, 1)[rows]
        at, signs = as_stored(torch.cat(places, 1)[rows], chosen, shift[rows], self.form)
        self.stored = chosen.T
        self.filled.n.append(n[rows].int())
        self.filled.places.append(at)
        self.filled.signs.append(signs)

    def weight(self, values: Tensor) -> Weight:
        """Return the `Superblocks`."""
        blocks = values.shape[1] // SUPERBLOCK
        d, n, places, signs = (torch.cat(part, 1).unflatten(1, (blocks, -1)) for part in vars(self.filled).values())
        return Superblocks(pack_superblocks(SuperblockNumbers(d.half(), n, places, signs), self.form), self.form)


def visit_superblocks(w: Superblocks, target: Tensor, hessian: Tensor) -> Superblocks:
    """Return superblocks of an IQ type after one visit to all octets, left to right, each moved to what is nearest to
    `q + (E H)_v inverse(H_vv)` under H_vv, if that is nearer than what it has. Scales stay.

    `target [out, in]`; `hessian [in, in]`.
    """
    numbers, entries = unpack_superblocks(w.codes, w.form), Entries(w.form, w.codes.device)
    scales, shifts = column_scales(numbers, w.form), torch.zeros(1, len(hessian), device=hessian.device)
    if w.form == "IQ1_S":
        shifts = (SHIFT - 2 * SHIFT * numbers.signs).repeat_interleave(LAYOUTS[w.form].group, 2).flatten(1)
    places, signs = (part.flatten(1).clone() for part in (numbers.places, numbers.signs))
    values = dense(w)
    pull = hessian @ (target - values).T  # [in, out]
    for start in range(0, len(hessian), BLOCK):
        stop = min(start + BLOCK, len(hessian))
        moves = torch.zeros(stop - start, len(values), device=values.device)
        for first in range(start, stop, OCTET):
            octet, metric = slice(first, first + OCTET), hessian[first : first + OCTET, first : first + OCTET]
            away = torch.linalg.solve(metric, pull[octet]).T
            scale, shift = scales[:, [first]], shifts[:, [first]]
            at, nearest = entries.nearest((values[:, octet] + away) * inverse(scale) - shift, metric)
            found = (nearest + shift) * scale
            move = found - values[:, octet]
            gains = (((2 * away - move) @ metric) * move).sum(1, keepdim=True) > 0
            move = torch.where(gains, move, 0.0)
            own = as_stored(at, found, shift.expand_as(scale), w.form)
            for stored, chosen in zip((places, signs), own, strict=True):
                count = stored.shape[1] * OCTET // len(hessian)
                if count:  # IQ1_S has a sign for several octets, which stays
                    here = slice(first // OCTET * count, first // OCTET * count + count)
                    stored[:, here] = torch.where(gains, chosen, stored[:, here])
            values[:, octet] += move
            moves[first - start : first - start + OCTET] = move.T
            pull[first + OCTET : stop] -= hessian[first + OCTET : stop, octet] @ move.T
        pull[stop:] -= hessian[stop:, start:stop] @ moves  # rows before `stop` are not read again
    found_numbers = replace(numbers, places=places.view_as(numbers.places), signs=signs.view_as(numbers.signs))
    return Superblocks(pack_superblocks(found_numbers, w.form), w.form)


def inverse(numbers: Tensor) -> Tensor:
    """Return `1 / numbers`, 0 where they are 0."""
    return torch.where(numbers == 0, 0.0, 1 / numbers)
