"""Weights prepared for kernels: the terms whose sum a product is, each with the inputs that it wants."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from llmcompress.kernels.cpu.inputs import Inputs
from llmcompress.kernels.cpu.layouts import Packed, form_of, packed
from llmcompress.kernels.cpu.product import block_size
from llmcompress.weight.hadamard import rotate_inputs
from llmcompress.weight.nodes import (
    Columns,
    Dense,
    Grid,
    LowRank,
    Rotated,
    Scaled,
    Sum,
    TrellisCoded,
    Weight,
    Where,
    Zero,
    children,
    shape,
)


@dataclass(frozen=True, eq=False)
class Basis:
    """What happens to inputs before a kernel: some `columns` of them are taken, multiplied by factors, and rotated.

    `factors` float32 `[in]`, `signs` bool `[in]`; None: nothing of the kind. `block` is the size of the rotation.
    """

    width: int
    columns: Tensor | None = None  # int64
    factors: Tensor | None = None
    signs: Tensor | None = None
    block: int = 1

    def apply(self, x: Tensor) -> Tensor:
        """Return `x [..., in]` in this basis, in its dtype."""
        if self.columns is not None:
            x = x[..., self.columns]
        if self.factors is not None:
            x = (x * self.factors).to(x.dtype)
        return x if self.signs is None else rotate_inputs(x, self.signs, self.block)

    @cached_property
    def all_factors(self) -> Tensor | None:
        """Factors, signs, and the normalisation of the rotation, in one: float32 `[width]`."""
        if self.factors is None and self.signs is None:
            return None
        found = torch.ones(self.width) if self.factors is None else self.factors.float()
        if self.signs is not None:
            found = found * (self.signs.float() * 2 - 1) * self.block**-0.5
        return found.contiguous()

    @cached_property
    def name(self) -> tuple[object, ...]:
        """Equal for bases that do the same."""
        parts = (self.columns, self.factors, self.signs)
        return (self.width, self.block, *(None if part is None else part.numpy().tobytes() for part in parts))

    def inputs(self, block: int, numbers: int, bfloat16: bool) -> Inputs:
        """Return the kernel that does all of it but the choice of columns."""
        return Inputs(self.width, block, self.block, self.all_factors is not None, numbers, bfloat16)


@dataclass(frozen=True, eq=False)
class Term:
    """A packed matrix, and the basis that it wants inputs in."""

    basis: Basis
    packed: Packed

    @property
    def block(self) -> int:
        """Columns of a block of inputs."""
        return block_size(self.packed.form)


@dataclass(frozen=True, eq=False)
class Chain:
    """A product of two: `left @ right`, of low rank."""

    left: Prepared
    right: Prepared


@dataclass(frozen=True, eq=False)
class Plain:
    """A small dense matrix `[out, in]`, as low-rank factors have it."""

    basis: Basis
    values: Tensor


@dataclass(frozen=True, eq=False)
class Prepared:
    """A weight `[out, in]` as a sum of terms."""

    size: tuple[int, int]
    terms: tuple[Term | Chain | Plain, ...]

    @cached_property
    def single(self) -> Term | None:
        """The term, where one kernel is all of it."""
        first = self.terms[0] if len(self.terms) == 1 else None
        return first if isinstance(first, Term) else None

    @property
    def bytes(self) -> int:
        """Bytes held."""
        found = 0
        for term in self.terms:
            match term:
                case Term(packed=packed):
                    found += packed.bytes
                case Chain(left, right):
                    found += left.bytes + right.bytes
                case Plain(values=values):
                    found += values.nbytes
        return found


def prepare(w: Weight) -> Prepared | None:
    """Return a weight on the CPU prepared for kernels; None if it is not `supported`."""
    terms = _terms(w, Basis(shape(w)[1]))
    return None if terms is None else Prepared(shape(w), terms)


def supported(w: Weight) -> bool:
    """Return True if `prepare` would not return None; the tensors of `w` may hold anything."""
    match w:
        case Zero() | Dense():
            return True
        case Grid() | TrellisCoded():
            return form_of(w) is not None
        case Rotated() if any(isinstance(node, Rotated | Scaled) for _, node, _ in children(w)):
            return False
        case Where(Columns()):
            return all(supported(node) for _, node, _ in children(w))
        case Sum() | LowRank() | Rotated() | Scaled():
            return all(supported(node) for _, node, _ in children(w))
    return False


def _terms(w: Weight, basis: Basis) -> tuple[Term | Chain | Plain, ...] | None:
    """Return the terms of a weight whose inputs are in a basis."""
    match w:
        case Zero():
            return ()
        case Dense(values):
            return (Plain(basis, values.contiguous()),)
        case Sum(parts):
            found = [_terms(part, basis) for part in parts]
            return None if None in found else tuple(term for terms in found if terms for term in terms)
        case LowRank(left, right):
            first, second = _terms(right, basis), _terms(left, Basis(shape(left)[1]))
            if first is None or second is None:
                return None
            return (Chain(Prepared(shape(left), second), Prepared(shape(right), first)),)
        case Rotated(inner, signs, block) if basis.signs is None:
            return _terms(inner, replace(basis, signs=signs, block=block))
        case Scaled(inner, columns) if basis.signs is None:
            return _terms(inner, _times(basis, columns.float()))
        case Where(Columns(inside_columns), inside, outside) if basis.signs is None and basis.columns is None:
            chosen, others = _selected(inside, inside_columns, basis), _terms(outside, _times(basis, ~inside_columns))
            return None if chosen is None or others is None else chosen + others
    repacked = packed(w)
    return None if repacked is None else (Term(basis, repacked),)


def _selected(w: Weight, inside: Tensor, basis: Basis) -> tuple[Term | Chain | Plain, ...] | None:
    """Return the terms of the columns that show of a weight, alone where they share a scale."""
    if isinstance(w, Grid) and w.scale.shape[1] == 1:
        places = inside.nonzero()[:, 0]
        factors = None if basis.factors is None else basis.factors[places]
        narrow = Grid(w.codes[:, places], w.scale, w.zero, w.levels, max(len(places), 1))
        return _terms(narrow, Basis(len(places), places, factors)) if len(places) else ()
    return _terms(w, _times(basis, inside))


def _times(basis: Basis, factors: Tensor) -> Basis:
    known = basis.factors
    return replace(basis, factors=factors.float() if known is None else known * factors)
