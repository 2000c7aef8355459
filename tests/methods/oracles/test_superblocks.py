"""The search for entries of llama.cpp's tables against all of them in float64, and what feedback does for it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from llmcompress.errors import RecipeError
from llmcompress.methods.layer import relative_error
from llmcompress.methods.solvers.superblocks import Entries, best
from llmcompress.weight.expression import bits, dense
from llmcompress.weight.nodes import Superblocks, Weight
from llmcompress.weight.superblocks import (
    LAYOUTS,
    SHIFT,
    SuperblockForm,
    column_scales,
    superblock_table,
    unpack_superblocks,
)
from tests.builders import compressed, correlated, gaussian, moments, seeded
from tests.methods.oracles.slow import damped_moment
from tests.tiers import tiered

pytest.importorskip("gguf", reason="needs the package gguf (extra `export`)")
SIGNED: tuple[SuperblockForm, ...] = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
FORMS: tuple[SuperblockForm, ...] = ("IQ1_S", "IQ1_M", *SIGNED)
every_form = pytest.mark.parametrize("form", tiered(FORMS, ("IQ1_S", "IQ2_XXS", "IQ3_S").__contains__, str))


def octets(form: SuperblockForm) -> Tensor:
    """All that eight columns may become but for their signs, float64 `[entries, 8]`."""
    table = superblock_table(form).double()
    if form == "IQ1_M":
        return torch.cat([table + SHIFT, table - SHIFT])
    if table.shape[1] == 8:
        return table
    return torch.cat([table.repeat_interleave(len(table), 0), table.repeat(len(table), 1)], 1)


def cheapest(wanted: Tensor, metric: Tensor, form: SuperblockForm) -> float:
    """The least cost of any entry under any signs, one pattern of signs after the other."""
    entries, costs = octets(form), []
    for signs in itertools.product((1.0, -1.0), repeat=8) if form in SIGNED else [(1.0,) * 8]:
        if not LAYOUTS[form].is_even or signs.count(-1.0) % 2 == 0:
            left = wanted - entries * torch.tensor(signs, dtype=torch.float64)
            costs.append(((left @ metric) * left).sum(1).min())
    return float(torch.stack(costs).min())


def problem(form: SuperblockForm, coupled: float) -> tuple[Tensor, Tensor]:
    """Vectors of the size of the entries `[R, 8]`, and a metric with couplings of that share."""
    random = seeded(3)
    size = superblock_table(form).square().mean().sqrt()
    mixing = torch.randn(8, 8, generator=random)
    energy = torch.rand(8, generator=random) + 0.5
    return torch.randn(4, 8, generator=random) * size, energy.diag() + coupled * mixing @ mixing.T / 8


def cost(wanted: Tensor, values: Tensor, metric: Tensor) -> Tensor:
    left = (wanted - values).double()
    return ((left @ metric.double()) * left).sum(1)


@pytest.mark.parametrize("form", ["IQ1_S", "IQ1_M"])
def test_the_nearest_entry_is_the_nearest_of_all(form: SuperblockForm) -> None:
    wanted, metric = problem(form, 1.0)
    places, values = Entries(form, wanted.device).nearest(wanted, metric)
    assert torch.equal(octets(form).float()[places[:, 0]], values)
    for row, found in zip(wanted, cost(wanted, values, metric), strict=True):
        assert float(found) == pytest.approx(cheapest(row.double(), metric.double(), form), rel=1e-5)


@pytest.mark.parametrize("form", ["IQ2_S", pytest.param("IQ3_S", marks=pytest.mark.nightly)])
def test_free_signs_without_couplings_are_the_best_of_all(form: SuperblockForm) -> None:
    wanted, metric = problem(form, 0.0)
    _, values = Entries(form, wanted.device).nearest(wanted, metric)
    for row, found in zip(wanted, cost(wanted, values, metric), strict=True):
        assert float(found) == pytest.approx(cheapest(row.double(), metric.double(), form), rel=1e-5)


@pytest.mark.parametrize("form", tiered(SIGNED, ("IQ2_XXS",).__contains__, str))
def test_signs_and_entries_are_nearly_the_best_under_couplings(form: SuperblockForm) -> None:
    """And never better than the best, which a value that the type does not have would be."""
    wanted, metric = problem(form, 0.5)
    _, values = Entries(form, wanted.device).nearest(wanted, metric)
    least = torch.tensor([cheapest(row.double(), metric.double(), form) for row in wanted])
    found = cost(wanted, values, metric)
    assert bool((found >= least * (1 - 1e-5)).all())
    assert float(found.sum()) < 1.15 * float(least.sum())


def test_best_is_the_largest_of_each_row() -> None:
    scores = torch.randn(9, 256, generator=seeded(0))
    assert torch.equal(best(scores), scores.argmax(1))


def made(form: str, *more: dict[str, str], tokens: int = 4096) -> Weight:
    inputs = correlated(4096, 256, seed=1)[:tokens]
    return compressed(gaussian(16, 256), inputs, {"method": "gguf", "type": form}, *more).expression()


def loss(w: Weight) -> float:
    error, hessian = (gaussian(16, 256) - dense(w)).double(), damped_moment(correlated(4096, 256, seed=1), 0.1)
    return float(((error @ hessian) * error).sum())


def test_every_entry_is_the_nearest_once_earlier_errors_are_fed_back() -> None:
    """Against all entries at the scale of its group, by an inverse in float64; over two superblocks."""
    weight, inputs = gaussian(3, 512), correlated(4096, 512, seed=1)
    w = compressed(weight, inputs, {"method": "gguf", "type": "IQ1_M"}).expression()
    assert isinstance(w, Superblocks)
    scales, stored = column_scales(unpack_superblocks(w.codes, w.form), w.form).double(), dense(w).double()
    factor = torch.linalg.cholesky(damped_moment(inputs, 0.1).inverse(), upper=True)
    current, entries = weight.double(), octets("IQ1_M")
    for first in range(0, 512, 8):
        octet, later = slice(first, first + 8), slice(first + 8, None)
        root = factor[octet, octet].inverse()
        errors = (current[:, octet] - stored[:, octet]) @ root
        others = (current[:, None, octet] - scales[:, None, [first]] * entries) @ root
        assert bool((errors.square().sum(1) <= 1.001 * others.square().sum(2).amin(1)).all())
        current[:, later] -= errors @ factor[octet, later]


@every_form
def test_feedback_lowers_the_loss_of_the_nearest_entries(form: SuperblockForm) -> None:
    assert loss(made(form)) < 0.6 * loss(made(form, tokens=0))


@every_form
def test_a_second_look_moves_entries_and_pays(form: SuperblockForm) -> None:
    """In the loss it minimises, and on tokens not seen; the same bits, and again what the type holds."""
    before, after = made(form), made(form, {"method": "refine"})
    unseen = moments(correlated(4096, 256, seed=2))
    assert isinstance(after, Superblocks) and after.form == form and bits(after) == bits(before)
    assert loss(after) < 0.95 * loss(before)
    assert relative_error(gaussian(16, 256), after, unseen) < relative_error(gaussian(16, 256), before, unseen)


def test_a_second_look_refuses_what_it_cannot_move() -> None:
    with pytest.raises(RecipeError, match="there is nothing to polish in TQ2_0"):
        made("TQ2_0", {"method": "refine"})
