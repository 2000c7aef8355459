"""Weights prepared for kernels: the terms whose sum a product is, each with the inputs that it wants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from llmcompress.kernels.cpu.dispatch import input_block, takes_floats
from llmcompress.kernels.cpu.layouts import KernelMatrix, form_of, packed, packed_elements
from llmcompress.kernels.cpu.quantize_inputs import Inputs
from llmcompress.kernels.cpu.scattered import Lists, lists
from llmcompress.weight.expression import dense
from llmcompress.weight.hadamard import rotate
from llmcompress.weight.nodes import (
    Bitmap,
    Codebook,
    Columns,
    Dense,
    Grid,
    LowRank,
    Minifloat,
    Pattern,
    RotatedInputs,
    ScaledInputs,
    Sum,
    TrellisCodes,
    Weight,
    Where,
    Zero,
    both,
    children,
    shape,
)

FEW = 0.25  # share of elements up to which lists of them are smaller than the matrix, and as fast


@dataclass(frozen=True, eq=False)
class Basis:
    """Changes of inputs before a kernel: some `columns` of them are taken, multiplied by factors, and rotated.

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
        return x if self.signs is None else rotate(x, self.signs, self.block)

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

    def inputs(self, block: int, numbers: int, bfloat16: bool, rounded: bool = False) -> Inputs:
        """Return the kernel that does all of it but the choice of columns."""
        return Inputs(self.width, block, self.block, self.all_factors is not None, numbers, bfloat16, rounded)


@dataclass(frozen=True, eq=False)
class KernelTerm:
    """A packed matrix, and the basis that it wants inputs in; `plans` is for `decode` to remember."""

    basis: Basis
    packed: KernelMatrix
    plans: dict[object, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def block(self) -> int:
        """Columns of a block of inputs."""
        return input_block(self.packed.form)

    def numbers(self, wanted: int) -> int:
        """Return how many integers stand for an input, of as many as wanted: none for weights that are floats."""
        return 0 if takes_floats(self.packed.form) else wanted


@dataclass(frozen=True, eq=False)
class Chain:
    """A product of two: `left @ right`, of low rank."""

    left: Prepared
    right: Prepared


@dataclass(frozen=True, eq=False)
class PlainMatrix:
    """A small dense matrix `[out, in]`, as low-rank factors have it."""

    basis: Basis
    values: Tensor


@dataclass(frozen=True, eq=False)
class Scattered:
    """The few elements that show of a matrix, and the basis that they want inputs in."""

    basis: Basis
    lists: Lists


Terms = tuple[KernelTerm | Chain | PlainMatrix | Scattered, ...]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A weight `[out, in]` as a sum of terms."""

    size: tuple[int, int]
    terms: Terms

    @cached_property
    def plain(self) -> KernelTerm | None:
        """The term, where one kernel that takes all columns is all of it."""
        first = self.terms[0] if len(self.terms) == 1 else None
        return first if isinstance(first, KernelTerm) and first.basis.columns is None else None

    @cached_property
    def takes_floats(self) -> bool:
        """True if a kernel of it multiplies floats, which takes longer than integers."""
        return any(isinstance(term, KernelTerm) and takes_floats(term.packed.form) for term in self.terms)

    @property
    def bytes(self) -> int:
        """Bytes held."""
        found = 0
        for term in self.terms:
            match term:
                case KernelTerm(packed=packed):
                    found += packed.bytes
                case Chain(left, right):
                    found += left.bytes + right.bytes
                case PlainMatrix(values=values):
                    found += values.nbytes
                case Scattered(lists=held):
                    found += held.bytes
        return found


def prepare(w: Weight) -> Prepared | None:
    """Return a weight on the CPU prepared for kernels; None if it is not `supported`."""
    terms = _terms(w, Basis(shape(w)[1]))
    return None if terms is None else Prepared(shape(w), terms)


def supported(w: Weight, turned: bool = False) -> bool:
    """Return True if `prepare` would not return None; the tensors of `w` may hold anything.

    `turned`: a rotation comes before, behind which no factors can be taken.
    """
    below = [node for _, node, _ in children(w)]
    match w:
        case Zero() | Dense():
            return True
        case Grid() | TrellisCodes() | Codebook() | Minifloat():
            return form_of(w) is not None
        case Sum():
            return all(supported(node, turned) for node in below)
        case LowRank(left, right):
            return supported(left) and supported(right, turned)
        case RotatedInputs(inner):
            return not turned and supported(inner, True)
        case ScaledInputs() | Where(Columns()):
            return not turned and all(map(supported, below))
        case Where():
            return all(_elements_supported(node, turned) for node in below)
    return False


def _elements_supported(w: Weight, turned: bool) -> bool:
    """Return True if there are terms of any elements of a weight; `turned` as in `supported`."""
    match w:
        case Zero() | Dense() | Grid():
            return True
        case Minifloat():
            return form_of(w) is not None
        case ScaledInputs(inner):
            return not turned and _elements_supported(inner, turned)
        case Sum() | Where():
            return all(_elements_supported(node, turned) for _, node, _ in children(w))
    return False


def _terms(w: Weight, basis: Basis) -> Terms | None:
    """Return the terms of a weight whose inputs are in a basis."""
    match w:
        case Zero():
            return ()
        case Dense(values):
            return (PlainMatrix(basis, values.contiguous()),)
        case Sum(parts):
            return _together([_terms(part, basis) for part in parts])
        case LowRank(left, right):
            first, second = _terms(right, basis), _terms(left, Basis(shape(left)[1]))
            if first is None or second is None:
                return None
            return (Chain(Prepared(shape(left), second), Prepared(shape(right), first)),)
        case RotatedInputs(inner, signs, block) if basis.signs is None:
            return _terms(inner, replace(basis, signs=signs, block=block))
        case ScaledInputs(inner, columns) if basis.signs is None:
            return _terms(inner, _times(basis, columns.float()))
        case Where(Columns(chosen), inside, outside) if basis.signs is None:
            return _together([_selected(inside, chosen, basis), _terms(outside, _times(basis, ~chosen))])
        case Where(Bitmap(chosen) | Pattern(chosen), inside, outside):
            return _together([_elements(inside, chosen, basis), _elements(outside, ~chosen, basis)])
        case Grid() | TrellisCodes() | Codebook() | Minifloat():
            repacked = packed(w)
            return None if repacked is None else (KernelTerm(basis, repacked),)
    return None


def _together(parts: Sequence[Terms | None]) -> Terms | None:
    """Return the terms of all parts; None if one has none."""
    found: Terms = ()
    for part in parts:
        if part is None:
            return None
        found += part
    return found


def _selected(w: Weight, inside: Tensor, basis: Basis) -> Terms | None:
    """Return the terms of the columns that show of a weight, alone where they share a scale."""
    if isinstance(w, Grid) and w.scale.shape[1] == 1 and basis.columns is None:
        places = inside.nonzero()[:, 0]
        factors = None if basis.factors is None else basis.factors[places]
        narrow = Grid(w.codes[:, places], w.scale, w.zero, w.levels, max(len(places), 1))
        return _terms(narrow, Basis(len(places), places, factors)) if len(places) else ()
    return _terms(w, _times(basis, inside))


def _elements(w: Weight, shown: Tensor, basis: Basis) -> Terms | None:
    """Return the terms of the elements that show of a weight, bool `[out, in]`."""
    match w:
        case Dense(values):
            if shown.sum() > FEW * shown.numel():
                return (PlainMatrix(basis, values.masked_fill(~shown, 0)),)
            return (Scattered(basis, lists(values, shown)),)
        case Grid():
            return (_grid_elements(w, shown, basis),)
        case Minifloat(codes):
            return _terms(replace(w, codes=codes.masked_fill(~shown, 0)), basis)
        case ScaledInputs(inner, columns) if basis.signs is None:
            return _elements(inner, shown, _times(basis, columns.float()))
        case Zero() | Sum() | Where():
            return _together([_elements(node, both(here, shown), basis) for _, node, here in children(w)])
    return None


def _grid_elements(w: Grid, shown: Tensor, basis: Basis) -> KernelTerm | Scattered:
    """Return the elements of a grid that show: few as lists, many as a matrix with zeros."""
    if shown.sum() > FEW * shown.numel() and (found := packed_elements(w, shown)):
        return KernelTerm(basis, found)
    rows = len(w.codes)
    if w.scale.shape[1] > 1:
        return Scattered(basis, lists(dense(w), shown))
    centre = torch.tensor([[(w.levels - 1) / 2]]) if w.zero is None else w.zero
    return Scattered(basis, lists(w.codes, shown, w.scale.expand(rows, 1)[:, 0], centre.expand(rows, 1)[:, 0]))


def _times(basis: Basis, factors: Tensor) -> Basis:
    known = basis.factors
    return replace(basis, factors=factors.float() if known is None else known * factors)
