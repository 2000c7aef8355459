"""Units of a layer's inputs, neurons or heads, that it needs least, and the weights that make up for the others.

By energy, the worth of a unit is its own addition to the outputs. As a subset (column subset selection), it is the
cost of its absence with all other weights of the layer free to make up for it: without the columns S of W that is
`tr(W_S inverse(P_SS) W_S^T)`, where `P = inverse(H)`; this is the exact least-squares error, and the weights that reach
it are `W - W_S inverse(P_SS) P_S` (Optimal Brain Surgeon for columns, as in ZipLM, arXiv 2302.04089). Units go in a few
portions, the cheapest first, and every portion is made up for before the next is judged. Channel exploration (CHEX,
arXiv 2203.15794) chooses by the same objective and lets units grow back; after the refit that gains nothing here. A
subset leaves less error in each layer, and energy the better model (docs/results/distillation.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.errors import RecipeError
from llmcompress.runtime.seeding import generator

BY = ("energy", "subset", "random")
DAMPING = 0.01  # of H, as a share of its mean diagonal
PORTIONS = 32  # of the units that go, each judged once the ones before are made up for


@dataclass(frozen=True)
class UnitScore:
    """The worth of units: `energy`, `subset` or `random`, drawn by `seed`. Raises RecipeError for another name."""

    by: str = "energy"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise RecipeError(f"by is {self.by!r}; choose one of {', '.join(BY)}")


@dataclass(frozen=True, eq=False)
class Subset:
    """Units that stay, by their `numbers`, ascending. `weight [out, in]`: of the layer, made up for the others, whose
    columns are zero; `error`: of the outputs, as a share of their energy."""

    numbers: tuple[int, ...]
    weight: Tensor
    error: float


def choose_units(weight: Tensor, hessian: Tensor, keep: int, size: int = 1, score: UnitScore = UnitScore()) -> Subset:
    """Choose `keep` units of a layer, and refit its weights to them.

    `weight`: `[out, in]`; `hessian`: the damped second moment of its inputs, float64 `[in, in]`; `size`: columns of a
    unit, of which unit u has `u * size` to `(u + 1) * size - 1`.
    """
    exact = weight.double()
    units = weight.shape[1] // size
    if score.by == "subset":
        gone = _cheapest_units(exact, hessian, size, units - keep)
    elif score.by == "random":
        values = torch.rand(units, dtype=torch.float64, generator=generator("random units", score.seed))
        gone = values.argsort(stable=True)[: units - keep].to(weight.device)
    else:
        gone = _energies(exact, hessian, size).argsort(stable=True)[: units - keep]
    numbers = sorted(set(range(units)) - set(gone.tolist()))
    columns = _columns(torch.tensor(numbers, device=weight.device), size)
    factor = torch.linalg.cholesky(hessian[columns][:, columns])
    left = torch.zeros_like(exact)
    left[:, columns] = torch.cholesky_solve(hessian[columns] @ exact.T, factor).T
    change = left - exact
    error = ((change @ hessian) * change).sum() / ((exact @ hessian) * exact).sum()
    return Subset(tuple(numbers), left.to(weight.dtype), float(error))


def _cheapest_units(weight: Tensor, hessian: Tensor, size: int, count: int) -> Tensor:
    """Return the numbers of the `count` units that go: in portions, the cheapest first."""
    weight, inverse = weight.clone(), torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    gone = torch.empty(0, dtype=torch.long, device=weight.device)
    while len(gone) < count:
        costs = _costs(weight, inverse, size)
        costs[gone] = torch.inf
        more = costs.argsort(stable=True)[: min(count - len(gone), -(-count // PORTIONS))]
        _remove_columns(weight, inverse, _columns(more, size))
        gone = torch.cat([gone, more])
    return gone


def _costs(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
    """Return the error `[units]` that each unit's absence would add; meaningless for units that are gone."""
    units = len(inverse) // size
    own = _own_blocks(inverse, units)
    lost = own.diagonal(dim1=1, dim2=2).sum(1) == 0
    own = torch.where(lost[:, None, None], torch.eye(size, dtype=own.dtype, device=own.device), own)
    parts = weight.T.reshape(units, size, -1)
    return (torch.linalg.solve(own, parts) * parts).sum((1, 2))


def _remove_columns(weight: Tensor, inverse: Tensor, columns: Tensor) -> None:
    """Set some columns of a weight and the inverse to zero, in place, and make up for them in the others."""
    rows = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
    weight.addmm_(weight[:, columns], rows, alpha=-1)
    inverse.addmm_(inverse[:, columns], rows, alpha=-1)
    weight[:, columns] = 0
    inverse[columns] = 0
    inverse[:, columns] = 0


def _columns(units: Tensor, size: int) -> Tensor:
    """Return the numbers of the columns of units."""
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


def _energies(weight: Tensor, hessian: Tensor, size: int) -> Tensor:
    """Return the energy `[units]` that each unit alone adds to the outputs."""
    units = weight.shape[1] // size
    parts = weight.T.reshape(units, size, -1)
    return (_own_blocks(hessian, units) @ parts * parts).sum((1, 2))


def _own_blocks(square: Tensor, units: int) -> Tensor:
    """Return the square of each unit on the diagonal of `square [in, in]`, `[units, in / units, in / units]`."""
    size = len(square) // units
    return square.reshape(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
