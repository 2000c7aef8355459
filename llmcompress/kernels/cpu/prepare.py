"""Weights prepared for kernels: products as sums of terms, each with its basis of inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from llmcompress.kernels.cpu.layouts import KernelMatrix, form_of, pack_elements, pack_matrix
from llmcompress.kernels.cpu.quantize_inputs import Inputs
from llmcompress.kernels.cpu.scattered import ElementLists, list_elements
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
    """Changes of inputs before a kernel: some `columns` are selected, multiplied by factors, and rotated.

    `factors` float32 `[in]`, `signs` bool `[in]`; None: no such change. `block`: the size of the rotation.
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
        factors = (
            torch.ones(self.width, dtype=torch.float32, device="cpu") if self.factors is None else self.factors.float()
        )
        if self.signs is not None:
            factors = factors * (self.signs.float() * 2 - 1) * self.block**-0.5
        return factors.contiguous()

    @cached_property
    def name(self) -> tuple[object, ...]:
        """A key, equal for equal bases."""
        parts = (self.columns, self.factors, self.signs)
        return (self.width, self.block, *(None if part is None else part.numpy().tobytes() for part in parts))

    def inputs(self, block: int, numbers: int, bfloat16: bool, rounded: bool = False) -> Inputs:
        """Return the kernel of all changes but the selection of columns."""
        return Inputs(self.width, block, self.block, self.all_factors is not None, numbers, bfloat16, rounded)


@dataclass(frozen=True, eq=False)
class KernelTerm:
    """A packed matrix, and the basis of its inputs; `plans`: those of products with one token, see `matmul`."""

    basis: Basis
    packed: KernelMatrix
    plans: dict[object, Any] = field(default_factory=dict, repr=False)

    def numbers(self, wanted: int) -> int:
        """Return the integers for an input: as many as wanted, or none for weights that are floats."""
        return 0 if self.packed.takes_floats else wanted


@dataclass(frozen=True, eq=False)
class Chain:
    """A product of two: `left @ right`, of low rank."""

    left: PreparedWeight
    right: PreparedWeight


@dataclass(frozen=True, eq=False)
class PlainMatrix:
    """A small dense matrix `[out, in]`, such as a low-rank factor."""

    basis: Basis
    values: Tensor


@dataclass(frozen=True, eq=False)
class ScatteredMatrix:
    """A matrix with few elements, and the basis of its inputs."""

    basis: Basis
    lists: ElementLists


Terms = tuple[KernelTerm | Chain | PlainMatrix | ScatteredMatrix, ...]


@dataclass(frozen=True, eq=False)
class PreparedWeight:
    """A weight `[out, in]` as a sum of terms."""

    size: tuple[int, int]
    terms: Terms

    @cached_property
    def plain(self) -> KernelTerm | None:
        """The term, if the weight is one kernel that takes all columns."""
        first = self.terms[0] if len(self.terms) == 1 else None
        return first if isinstance(first, KernelTerm) and first.basis.columns is None else None

    @cached_property
    def takes_floats(self) -> bool:
        """True if one of its kernels multiplies floats, which takes longer than integers."""
        return any(isinstance(term, KernelTerm) and term.packed.takes_floats for term in self.terms)


def prepare(w: Weight) -> PreparedWeight | None:
    """Return a weight on the CPU prepared for kernels; None unless `is_supported`."""
    terms = _terms(w, Basis(shape(w)[1]))
    return None if terms is None else PreparedWeight(shape(w), terms)


def is_supported(w: Weight, turned: bool = False) -> bool:
    """True if `prepare` would return a weight; the tensors of `w` may hold anything.

    `turned`: True after a rotation, behind which no factors can be taken.
    """
    inner_nodes = [node for _, node, _ in children(w)]
    match w:
        case Zero() | Dense():
            return True
        case Grid() | TrellisCodes() | Codebook() | Minifloat():
            return form_of(w) is not None
        case Sum():
            return all(is_supported(node, turned) for node in inner_nodes)
        case LowRank(left, right):
            return is_supported(left) and is_supported(right, turned)
        case RotatedInputs(inner):
            return not turned and is_supported(inner, True)
        case ScaledInputs() | Where(Columns()):
            return not turned and all(map(is_supported, inner_nodes))
        case Where():
            return all(_elements_supported(node, turned) for node in inner_nodes)
    return False


def _elements_supported(w: Weight, turned: bool) -> bool:
    """True if any elements of a weight have terms; `turned` as in `is_supported`."""
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
            return _concatenate([_terms(part, basis) for part in parts])
        case LowRank(left, right):
            first, second = _terms(right, basis), _terms(left, Basis(shape(left)[1]))
            if first is None or second is None:
                return None
            return (Chain(PreparedWeight(shape(left), second), PreparedWeight(shape(right), first)),)
        case RotatedInputs(inner, signs, block) if basis.signs is None:
            return _terms(inner, replace(basis, signs=signs, block=block))
        case ScaledInputs(inner, columns) if basis.signs is None:
            return _terms(inner, _multiply_factors(basis, columns.float()))
        case Where(Columns(mask), inside, outside) if basis.signs is None:
            return _concatenate([_column_terms(inside, mask, basis), _terms(outside, _multiply_factors(basis, ~mask))])
        case Where(Bitmap(mask) | Pattern(mask), inside, outside):
            return _concatenate([_element_terms(inside, mask, basis), _element_terms(outside, ~mask, basis)])
        case Grid() | TrellisCodes() | Codebook() | Minifloat():
            matrix = pack_matrix(w)
            return None if matrix is None else (KernelTerm(basis, matrix),)
    return None


def _concatenate(parts: Sequence[Terms | None]) -> Terms | None:
    """Return the terms of all parts; None if a part is None."""
    terms: Terms = ()
    for part in parts:
        if part is None:
            return None
        terms += part
    return terms


def _column_terms(w: Weight, inside: Tensor, basis: Basis) -> Terms | None:
    """Return the terms of the columns `inside` of a weight, only these columns if they share a scale."""
    if isinstance(w, Grid) and w.scale.shape[1] == 1 and basis.columns is None:
        places = inside.nonzero()[:, 0]
        factors = None if basis.factors is None else basis.factors[places]
        narrow = Grid(w.codes[:, places], w.scale, w.zero, w.levels, max(len(places), 1))
        return _terms(narrow, Basis(len(places), places, factors)) if len(places) else ()
    return _terms(w, _multiply_factors(basis, inside))


def _element_terms(w: Weight, shown: Tensor, basis: Basis) -> Terms | None:
    """Return the terms of the elements in the mask `shown`, bool `[out, in]`."""
    match w:
        case Dense(values):
            if shown.sum() > FEW * shown.numel():
                return (PlainMatrix(basis, values.masked_fill(~shown, 0)),)
            return (ScatteredMatrix(basis, list_elements(values, shown)),)
        case Grid():
            return (_grid_elements(w, shown, basis),)
        case Minifloat(codes):
            return _terms(replace(w, codes=codes.masked_fill(~shown, 0)), basis)
        case ScaledInputs(inner, columns) if basis.signs is None:
            return _element_terms(inner, shown, _multiply_factors(basis, columns.float()))
        case Zero() | Sum() | Where():
            return _concatenate([_element_terms(node, both(mask, shown), basis) for _, node, mask in children(w)])
    return None


def _grid_elements(w: Grid, shown: Tensor, basis: Basis) -> KernelTerm | ScatteredMatrix:
    """Return the elements of a grid in a mask: few as lists, many as a matrix with zeros."""
    if shown.sum() > FEW * shown.numel() and (matrix := pack_elements(w, shown)):
        return KernelTerm(basis, matrix)
    rows = len(w.codes)
    if w.scale.shape[1] > 1:
        return ScatteredMatrix(basis, list_elements(dense(w), shown))
    centre = w.scale.new_full((1, 1), (w.levels - 1) / 2, dtype=torch.float32) if w.zero is None else w.zero
    lists = list_elements(w.codes, shown, w.scale.expand(rows, 1)[:, 0], centre.expand(rows, 1)[:, 0])
    return ScatteredMatrix(basis, lists)


def _multiply_factors(basis: Basis, factors: Tensor) -> Basis:
    known = basis.factors
    return replace(basis, factors=factors.float() if known is None else known * factors)
