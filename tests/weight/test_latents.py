"""Formed in another form: nothing changes before a step, then what the papers' formulas say."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import Bitmap, Grid, LowRank, Sum, Transpose, Weight, Where, Zero, shape
from llmcompress.weight.trainable.latents import Form, TensorForm, cells
from llmcompress.weight.trainable.latents.flexround import DividedWeights
from llmcompress.weight.trainable.latents.lora_rounding import Offsets
from llmcompress.weight.trainable.masters import MARGIN
from llmcompress.weight.trainable.relax import KINDS, Relaxation, RelaxedWeight, relax
from llmcompress.weight.trainable.straight_through import slope
from tests.builders import every_node, grid, random_nestings, seeded
from tests.tiers import tiered
from tests.weight.test_relax import assert_same_bits, elsewhere, layout, steps

FORMS: dict[str, Form] = {"offsets": partial(Offsets, rank=3), "divided": DividedWeights}
EXPRESSIONS = every_node() + random_nestings(seed=5, count=12)
GRIDS = {
    "asymmetric": grid((6, 20), 4, 8, 0, symmetric=False),
    "symmetric": grid((6, 20), 3, 8, 0, symmetric=True),
    "turned": Transpose(grid((20, 6), 4, 4, 1, symmetric=False)),
    "pruned": Where(
        Bitmap(torch.rand(6, 20, generator=seeded(4)) > 0.4), grid((6, 20), 4, 20, 2, symmetric=False), Zero((6, 20))
    ),
}


def relaxed(
    w: Weight, form: str, trains: frozenset[str] = frozenset({"codes"}), distance: float = 0.5
) -> RelaxedWeight:
    return relax(w, Relaxation(trains, form=FORMS[form]), elsewhere(w, distance))


def only(module: RelaxedWeight) -> TensorForm:
    [latents] = module.forms().values()
    assert isinstance(latents, TensorForm)
    return latents


@pytest.mark.parametrize("form", tiered(FORMS, "offsets".__eq__))
def test_freezing_returns_the_same_bits(form: str) -> None:
    for w in EXPRESSIONS + list(GRIDS.values()):
        for distance in (0.1, 10.0):
            module = relaxed(w, form, frozenset(KINDS), distance)
            assert_same_bits(module.freeze(), w)
            assert torch.equal(module.weight(), dense(w))
        assert_same_bits(relax(w, Relaxation(frozenset({"codes"}), form=FORMS[form])).freeze(), w)
        assert_same_bits(module.to(torch.bfloat16).freeze(), w)


@pytest.mark.parametrize("form", FORMS)
def test_kinds_are_exactly_what_trains(form: str) -> None:
    for w in EXPRESSIONS + list(GRIDS.values()):
        module = relaxed(w, form, frozenset(KINDS))
        parameters = dict(module.named_parameters())
        assert parameters.keys() == module.kinds().keys()
        assert set(module.forms()) == {name for name in cells(w) if module.levels.get(name)}
        assert all(parameter.dtype == torch.float32 for parameter in parameters.values())


@pytest.mark.parametrize("form", tiered(FORMS, "offsets".__eq__))
def test_trained_codes_are_stored_and_used_alike(form: str) -> None:
    for w in EXPRESSIONS[::2] + list(GRIDS.values()):
        module = relaxed(w, form, frozenset(KINDS))
        steps(module, elsewhere(w, 2.0), 5, confined=True)
        found = module.freeze()
        assert layout(found) == layout(w)
        torch.testing.assert_close(dense(found), module.weight().detach(), rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_training_finds_codes_in_other_cells(form: str) -> None:
    """Of a matrix that the form can give: columns two cells off, or rows of half the size."""
    w = grid((6, 20), 16, 20, 0, symmetric=False)
    w = replace(w, codes=(w.codes // 2 + 4).to(torch.uint8), zero=torch.full_like(w.scale, 8, dtype=torch.uint8))
    columns = torch.arange(20) % 3 - 1
    moved = 2 * columns if form == "offsets" else 0
    halved = 1.0 if form == "offsets" else torch.tensor([1.0, 0.5, 1.5] * 2)[:, None]
    target = (w.codes.float() + moved - 8) * halved * w.scale.float()
    module = relax(w, Relaxation(frozenset({"codes"}), form=FORMS[form]), dense(w))
    before = (module.weight() - target).square().sum()
    steps(module, target, 80, rate=0.05, confined=True)
    assert (module.weight() - target).square().sum() < 0.25 * before


def test_codes_of_factors_stay_numbers_of_their_own() -> None:
    """Nobody knows where in their cells they should be."""
    parts = LowRank(grid((6, 2), 4, 2, 0, symmetric=False), grid((2, 20), 4, 20, 1, symmetric=False))
    module = relaxed(Sum((GRIDS["symmetric"], parts)), "offsets")
    assert set(module.forms()) == {"0_codes"}
    own = {name for name in module.kinds() if not name.startswith("formed.")}
    assert own == {"1_left_codes", "1_right_codes"} and set(module.levels) == own | {"0_codes"}


def gradient_of_codes(module: RelaxedWeight, target: Tensor) -> Tensor:
    """d loss / d latents, flat, by a plain relaxation's master that is where the latents are."""
    [name] = module.levels
    plain = relax(module.freeze(), Relaxation(frozenset({"codes"})))
    with torch.no_grad():
        plain.get_parameter(name).copy_(only(module)())
    (plain.weight() - target).square().sum().backward()
    gradient = plain.get_parameter(name).grad
    assert gradient is not None
    return gradient


@pytest.mark.parametrize("name", GRIDS)
def test_offsets_are_of_the_rank_that_was_asked_for(name: str) -> None:
    w = GRIDS[name]
    module = relaxed(w, "offsets")
    offsets, [here] = only(module), cells(w).values()
    out, width = here.size
    assert sum(p.numel() for p in module.parameters()) == 3 * (out + width)
    steps(module, elsewhere(w, 3.0), 30)
    start = offsets.get_buffer("start")
    moved = (offsets() - start).detach()
    product = (offsets.get_parameter("left") @ offsets.get_parameter("right")).detach()
    assert torch.linalg.matrix_rank(product.double(), rtol=1e-6) == 3
    torch.testing.assert_close(moved, here.take_stored(product), atol=1e-5, rtol=1e-4)
    assert not torch.equal(moved, torch.zeros_like(moved)) and shape(module.freeze()) == shape(w)


def test_offsets_have_no_more_rank_than_the_matrix() -> None:
    module = relax(
        grid((2, 20), 4, 20, 0, symmetric=True), Relaxation(frozenset({"codes"}), form=partial(Offsets, rank=9))
    )
    assert only(module).get_parameter("left").shape == (2, 2)


@pytest.mark.parametrize("name", GRIDS)
def test_gradients_of_offsets_are_those_of_all_latents(name: str) -> None:
    """d left = G right^T, d right = left^T G, with G of the latents and zero where no code is stored."""
    w = GRIDS[name]
    module, target = relaxed(w, "offsets"), elsewhere(w, 2.0)
    left, right = (only(module).get_parameter(key) for key in ("left", "right"))
    with torch.no_grad():
        right.copy_(0.3 * torch.randn(right.shape, generator=seeded(1)))
    (module.weight() - target).square().sum().backward()
    [here] = cells(w).values()
    flat = gradient_of_codes(module, target)
    matrix = torch.zeros(here.size)
    if here.shown is None:
        matrix.copy_(flat.reshape(here.size))
    else:
        matrix[here.shown.expand(here.size)] = flat
    torch.testing.assert_close(left.grad, matrix @ right.detach().T)
    torch.testing.assert_close(right.grad, left.detach().T @ matrix)


@pytest.mark.parametrize("name", GRIDS)
def test_gradients_of_divisors_grow_with_the_weights(name: str) -> None:
    """FlexRound: proportional to the weight, in units of its scale, times the gradient of plain rounding."""
    w = GRIDS[name]
    module, target = relaxed(w, "divided"), elsewhere(w, 2.0)
    divided, [here] = only(module), cells(w).values()
    (module.weight() - target).square().sum().backward()
    expected = -(divided.get_buffer("weights")) * gradient_of_codes(module, target)
    elements, rows = (divided.get_parameter(key).grad for key in ("elements", "rows"))
    torch.testing.assert_close(elements, expected)
    numbers = here.take_stored(torch.arange(here.size[0])[:, None].expand(here.size))
    torch.testing.assert_close(rows, torch.zeros(here.size[0]).index_add(0, numbers, expected))


def test_codes_are_flexrounds() -> None:
    """round(w / (scale element row) + zero), clamped: in float64, where weights are in the cells of their codes."""
    w = GRIDS["asymmetric"]
    assert isinstance(w, Grid) and w.zero is not None
    scale, zero = (one.double().repeat_interleave(8, 1)[:, :20] for one in (w.scale, w.zero))
    inside = (torch.rand(6, 20, generator=seeded(2)) - 0.5) * 0.9
    target = ((w.codes + inside - zero) * scale).float()
    module = relax(w, Relaxation(frozenset({"codes"}), form=DividedWeights), target)
    element = torch.exp(0.4 * torch.randn(6, 20, generator=seeded(3)))
    row = torch.exp(0.2 * torch.randn(6, generator=seeded(4)))
    with torch.no_grad():
        only(module).get_parameter("elements").copy_(element.log().flatten())
        only(module).get_parameter("rows").copy_(row.log())
    exact = target.double() / (scale * element * row[:, None]) + zero
    clear = (exact - exact.floor() - 0.5).abs() > 1e-4
    frozen = module.freeze()
    assert isinstance(frozen, Grid) and clear.float().mean() > 0.99
    assert torch.equal(frozen.codes[clear].double(), (exact + 0.5).floor().clamp(0, w.levels - 1)[clear])
    assert (frozen.codes.int() - w.codes.int()).abs().max() > 1, "more than one cell"


def test_a_weight_of_zero_stays_and_large_ones_come_back() -> None:
    """After many steps beyond the range, one step back changes latents again; a divisor does not move what is zero."""
    w = grid((4, 16), 4, 16, 0, symmetric=False)
    module = relax(w, Relaxation(frozenset({"codes"}), form=DividedWeights), dense(w))
    divided, zero = only(module), dense(w).flatten() == 0
    with torch.no_grad():
        divided.get_parameter("elements").sub_(5.0)
    assert ((divided() < -0.5) | (divided() > w.levels - 0.5)).any()
    codes = module.freeze().codes  # type: ignore[union-attr]
    divided.settle()
    latents = divided().detach()
    assert torch.equal(module.freeze().codes, codes)  # type: ignore[union-attr]
    assert bool(zero.any()) and torch.equal(latents[zero], divided.get_buffer("zero")[zero])
    assert bool((slope(latents, w.levels) == 1).all()), "all have a gradient again"
    assert float(latents.min()) >= -0.5 + MARGIN / 2 and float(latents.max()) <= w.levels - 0.5 - MARGIN / 2
