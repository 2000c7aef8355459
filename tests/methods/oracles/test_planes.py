"""Binary planes: fits against slow float64 ones that try everything, and the laws of the methods that store them."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from llmcompress.formats.peft import split_low_rank
from llmcompress.methods.binary.billm import SHARES, BiLLM, salient_columns
from llmcompress.methods.layer import apply, relative_error, step
from llmcompress.methods.refine import descend
from llmcompress.methods.solvers.bitplanes import PlaneFormat, Planes, fit_planes, planes_of, point_table, squared_error
from llmcompress.methods.solvers.feedback import feedback
from llmcompress.methods.solvers.hessian import inverse_factor
from llmcompress.methods.solvers.scales import added_grids, refit_scales
from llmcompress.weight.encoding import encode
from llmcompress.weight.expression import bits, dense
from llmcompress.weight.nodes import Bitmap, Columns, Dense, Grid, LowRank, Sum, Where
from llmcompress.weight.rows import rows
from llmcompress.weight.trainable.relax import KINDS, Relaxation, relax
from tests.builders import compressed, correlated, gaussian, layer, moments, seeded
from tests.methods.oracles.slow import damped_moment, optimal_brain_surgeon
from tests.methods.oracles.test_feedback import DAMPING, OUT, WIDTH, assert_same_but_for_ties, problem

Start = Literal["residual", "split", "grid"]
STARTS: tuple[Start, ...] = ("residual", "split", "grid")
FORMS = [(planes, start) for planes in (1, 2, 3) for start in STARTS if planes > 1 or start != "grid"]
every_form = pytest.mark.parametrize("planes, start", FORMS)
# the least squared error of a unit Gaussian: Max's tables for two and four levels; eight levels of three planes lie
# between his best eight, and the best eight at equal distances
GAUSSIAN = {1: (0.3634, 0.3634), 2: (0.1175, 0.1175), 3: (0.0345, 0.0374)}


def row_problem(seed: int, columns: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """(weight [5, columns], importance [columns], shown)."""
    random = seeded(seed)
    return (
        gaussian(5, columns, seed),
        torch.rand(columns, generator=random) + 0.1,
        torch.rand(5, columns, generator=random) < 0.7,
    )


# --- slow ------------------------------------------------------------------------------------------------------------


def all_points(scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
    """Every sum of planes with scales `[planes]`, float64 `[2^planes]`, and what each plane gives, in scales."""
    centres = [0.5] * len(scale) if zero is None else [float(z) for z in zero]
    codes = itertools.product((0, 1), repeat=len(scale))
    basis = torch.tensor([[code - centre for code, centre in zip(each, centres)] for each in codes]).double()
    return basis @ scale.double(), basis


def slow_loss(row: Tensor, weights: Tensor, scale: Tensor, zero: Tensor | None) -> float:
    points = all_points(scale, zero)[0]
    return float(((row[:, None] - points).square().amin(1) * weights).sum())


def slow_split(row: Tensor, weights: Tensor) -> tuple[float, float]:
    """The two magnitudes that lose least: every split of the sorted ones, each side at its mean."""
    order = row.abs().argsort()
    magnitudes, counted = row.abs()[order], weights[order]
    best = (float("inf"), 0.0, 0.0)
    for cut in range(len(row) + 1):
        means, error = [], 0.0
        for side in (slice(0, cut), slice(cut, None)):
            total = float(counted[side].sum())
            mean = float((magnitudes[side] * counted[side]).sum()) / total if total else 0.0
            error += float(((magnitudes[side] - mean).square() * counted[side]).sum())
            means.append(mean)
        if error < best[0] - 1e-12:
            best = (error, means[0], means[1])
    return best[1], best[2]


def slow_alternation(row: Tensor, weights: Tensor, scale: Tensor, rounds: int) -> Tensor:
    """ARB: least-squares scales for nearest signs, while it helps; scales as float16 holds them."""
    best = slow_loss(row, weights, scale, None)
    for _ in range(rounds):
        points, basis = all_points(scale, None)
        chosen = basis[(row[:, None] - points).abs().argmin(1)]
        root = weights.sqrt()[:, None]
        found = torch.linalg.lstsq(chosen * root, (row * root[:, 0])[:, None], driver="gelsd").solution[:, 0]
        tried = found.abs().half().double()
        loss = slow_loss(row, weights, tried, None)
        if loss >= best:
            break
        best, scale = loss, tried
    return scale


def slow_planes(weight: Tensor, hessian: Tensor, energy: Tensor, planes: int, rounds: int, group_size: int) -> Tensor:
    """`planes` with `start: residual` before its last fit: OBS, a group's scales by ARB on weights updated so far."""
    scales: list[Tensor] = []

    def begin(column: int, current: Tensor, pivots: Tensor) -> None:
        if column % group_size:
            return
        part = slice(column, column + group_size)
        scales.clear()
        for row in current[:, part]:
            left, found = row.clone(), []
            for _ in range(planes):
                level = (left.abs() * energy[part]).sum() / energy[part].sum()
                left -= level * torch.where(left > 0, 1.0, -1.0)
                found.append(2 * level)
            start = torch.stack(found).half().double()
            scales.append(slow_alternation(row, energy[part], start, rounds))

    def store(column: int, wanted: Tensor) -> Tensor:
        points = [all_points(scale, None)[0] for scale in scales]
        return torch.stack([each[(each - value).abs().argmin()] for each, value in zip(points, wanted)])

    return optimal_brain_surgeon(weight, hessian, begin, store)


# --- fits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [24, 8])
@pytest.mark.parametrize("planes, rounds", [(1, 0), (2, 0), (2, 5), (3, 3)])
def test_planes_are_obs_with_alternating_fits_on_the_way(planes: int, rounds: int, group_size: int) -> None:
    weight, inputs, hessian, energy = problem(5)
    form = PlaneFormat(planes, "residual", group_size, rounds)
    factor, _ = inverse_factor(moments(inputs), DAMPING)
    mine = dense(feedback(weight, factor, Planes(form, WIDTH, energy.float())))
    slow = slow_planes(weight, hessian, energy, planes, rounds, group_size)
    assert_same_but_for_ties(mine, slow, hessian, weight)


@pytest.mark.parametrize("size", [1, 5e-6])
@every_form
def test_no_round_loses(planes: int, start: Start, size: float) -> None:
    """Not even where scales are so small that float16 hardly tells them apart."""
    for seed in range(4):
        weight, importance, shown = row_problem(seed, columns=40)
        weight *= size
        for hidden in (None, shown):
            before = None
            for rounds in (0, 1, 2, 3, 8, 30):
                fitted = fit_planes(weight, PlaneFormat(planes, start, rounds=rounds), importance, hidden)
                counted = importance.expand_as(weight) * (1 if hidden is None else hidden)
                after = torch.tensor(
                    [
                        slow_loss(row.double(), each.double(), scale, None if fitted[1] is None else fitted[1][r])
                        for r, (row, each, scale) in enumerate(zip(weight, counted, fitted[0]))
                    ]
                )
                if before is not None:
                    assert bool((after <= before * (1 + 1e-6)).all()), (rounds, before, after)
                before = after


@every_form
def test_rounds_pay(planes: int, start: Start) -> None:
    weight = gaussian(16, 256)
    errors = [
        squared_error(weight, *fit_planes(weight, PlaneFormat(planes, start, rounds=rounds))).sum()
        for rounds in (0, 15)
    ]
    exact = planes == 1 or (planes, start) == (2, "split")  # nothing left to gain
    assert errors[1] <= (1.0 if exact else 0.98) * errors[0]


@every_form
def test_the_loss_is_that_of_the_nearest_points(planes: int, start: Start) -> None:
    weight, importance, _ = row_problem(1)
    scale, zero = fit_planes(weight, PlaneFormat(planes, start, rounds=2), importance)
    for r, found in enumerate(squared_error(weight, scale, zero, importance)):
        slow = slow_loss(weight[r].double(), importance.double(), scale[r], None if zero is None else zero[r])
        assert float(found) == pytest.approx(slow, rel=1e-5)


def test_a_split_is_the_best_of_all() -> None:
    """No other place to split, and no other two magnitudes, lose less."""
    weight, importance, _ = row_problem(2)
    scale, _ = fit_planes(weight, PlaneFormat(2, "split"), importance)
    for row, found in zip(weight.double(), scale):
        a, b = slow_split(row, importance.double())
        torch.testing.assert_close(found.float(), torch.tensor([a + b, b - a]), rtol=1e-3, atol=1e-6)
        best = slow_loss(row, importance.double(), found, None)
        for factors in itertools.product((0.9, 1.0, 1.1), repeat=2):
            other = found.double() * torch.tensor(factors)
            assert slow_loss(row, importance.double(), other, None) >= best * (1 - 1e-4)
    again, _ = fit_planes(weight, PlaneFormat(2, "split", rounds=20), importance)
    torch.testing.assert_close(
        squared_error(weight, again, None, importance),
        squared_error(weight, scale, None, importance),
        rtol=1e-4,
        atol=0,
    )


@pytest.mark.parametrize("planes", GAUSSIAN)
def test_a_gaussian_loses_what_theory_says(planes: int) -> None:
    weight = torch.randn(64, 2048, generator=seeded(0))
    left = squared_error(weight, *fit_planes(weight, PlaneFormat(planes, "split", rounds=15)))
    error = float(left.sum() / weight.square().sum())
    least, most = GAUSSIAN[planes]
    assert 0.98 * least <= error <= 1.02 * most


@every_form
def test_hidden_entries_do_not_count(planes: int, start: Start) -> None:
    weight, importance, shown = row_problem(3)
    loud = torch.where(shown, weight, 1e3)
    form = PlaneFormat(planes, start, rounds=5)
    for mine, same in zip(fit_planes(weight, form, importance, shown), fit_planes(loud, form, importance, shown)):
        assert (mine is None and same is None) or torch.equal(mine, same)  # type: ignore[arg-type]


@every_form
def test_a_group_of_zeros_or_of_nothing_is_zero(planes: int, start: Start) -> None:
    for weight, shown in ((torch.zeros(2, 8), None), (gaussian(2, 8), torch.zeros(2, 8, dtype=torch.bool))):
        scale, zero = fit_planes(weight, PlaneFormat(planes, start, rounds=5), torch.ones(8), shown)
        assert int(point_table(scale, zero).count_nonzero()) == 0


@pytest.mark.parametrize("start", ["split", "grid"])
@pytest.mark.parametrize("group_size", [7, 30])
def test_points_are_stored_bit_for_bit(start: Start, group_size: int) -> None:
    weight = gaussian(6, 30)
    planes = Planes(PlaneFormat(3, start, group_size, rounds=4), 30)
    values = torch.empty_like(weight)
    for column in range(30):
        planes.begin(column, weight.T)
        values[:, column] = planes.project(column, weight[:, column])
    stored = planes.weight(values)
    assert torch.equal(dense(stored), values)
    again = Planes.like(planes_of(stored))
    assert torch.equal(torch.stack([again.project(c, weight[:, c]) for c in range(30)], 1), values)


# --- what methods promise --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [None, 8, 10])
@pytest.mark.parametrize("fed_back", [True, False])
def test_dual_binarization_starts_as_a_grid_of_two_bits(group_size: int | None, fed_back: bool) -> None:
    """The planes are the bits of the codes and of the zero points (arXiv 2402.11960)."""
    weight, inputs = gaussian(OUT, WIDTH), correlated(400, WIDTH)
    form = {"group_size": group_size, "rounds": 0, "feedback": fed_back}
    dual = compressed(weight, inputs, {"method": "fdb", **form}).approx
    grid = {"method": "gptq", "bits": 2, "group_size": group_size, "symmetric": False}
    if not fed_back:
        inputs = inputs.square().sum(0).sqrt().diag()  # of the same energies, uncorrelated
    plain = compressed(weight, inputs, grid).approx
    assert isinstance(plain, Grid) and isinstance(dual, Sum)
    assert torch.equal(dense(dual), dense(plain))
    low, high = dual.parts
    assert isinstance(low, Grid) and isinstance(high, Grid) and plain.zero is not None
    assert torch.equal(low.codes + 2 * high.codes, plain.codes)
    assert low.zero is not None and high.zero is not None and torch.equal(low.zero + 2 * high.zero, plain.zero)
    assert torch.equal(high.scale, 2 * low.scale)


METHODS: list[dict[str, Any]] = [
    {"method": "planes", "bits": 2},
    {"method": "planes", "bits": 3, "group_size": 16},
    {"method": "fdb", "group_size": 16},
    {"method": "billm"},
    {"method": "billm", "group_size": 16, "rounds": 3},
]
every_method = pytest.mark.parametrize("arguments", METHODS, ids=lambda a: ",".join(map(str, a.values())))


@every_method
def test_planes_train_and_are_looked_up(arguments: dict[str, Any]) -> None:
    w = compressed(gaussian(24, 48), correlated(768, 48), arguments).expression()
    relaxed = relax(w, Relaxation(frozenset(KINDS)), gaussian(24, 48))
    assert set(relaxed.kinds().values()) == {"codes", "scales"}
    frozen, stored = encode(relaxed.freeze()), encode(w)
    assert frozen[0] == stored[0] and all(torch.equal(frozen[1][name], stored[1][name]) for name in stored[1])
    chosen = torch.tensor([5, 0, 23, 5])
    torch.testing.assert_close(dense(rows(*stored, chosen)), dense(w)[chosen], rtol=0, atol=0)


@every_method
def test_scales_at_the_end_are_least_squares_under_h(arguments: dict[str, Any]) -> None:
    """One factor for each plane of a row, from a float64 solve of all of them."""
    weight, inputs = gaussian(6, 32), correlated(600, 32)
    hessian = damped_moment(inputs, 0.1)
    w = compressed(weight, inputs, arguments | {"group_size": None, "rounds": 0}).approx
    if isinstance(w, Where):
        w = w.outside  # of all columns
    values = torch.stack([dense(grid) for grid in planes_of(w)]).double()
    mine = dense(refit_scales(w, weight, hessian.float())).double()
    for row in range(6):
        root = torch.linalg.cholesky(hessian).T  # H = root^T root
        factors = torch.linalg.lstsq(root @ values[:, row].T, root @ weight[row].double()).solution
        expected = values[:, row].T @ factors
        errors = [weight[row].double() - found for found in (mine[row], expected)]
        losses = [float((error @ hessian * error).sum()) for error in errors]
        if bool((factors > 0).all()):
            assert losses[0] <= 1.002 * losses[1], "float16 alone may come between them"


@pytest.mark.parametrize("name", ["gptq", "planes", "fdb"])
def test_scales_fitted_many_times_are_those_of_all_groups_together(name: str) -> None:
    """Every plane's part in every group is a column of one least-squares problem a row."""
    weight, inputs = gaussian(6, 32), correlated(600, 32)
    hessian = damped_moment(inputs, 0.1)
    w = compressed(weight, inputs, {"method": name, "group_size": 8}).approx
    before = dense(w)
    parts = added_grids(w) or (w,)
    for _ in range(100):
        w = refit_scales(w, weight, hessian.float())
    root = torch.linalg.cholesky(hessian).T
    for row in range(6):
        columns = [dense(part)[row] * (torch.arange(32) // 8 == group) for part in parts for group in range(4)]
        basis = root @ torch.stack(columns, 1).double()
        wanted = root @ weight[row].double()
        best = (wanted - basis @ torch.linalg.lstsq(basis, wanted, driver="gelsd").solution).square().sum()
        mine, old = ((wanted - root @ found[row].double()).square().sum() for found in (dense(w), before))
        assert float(best) <= float(mine) <= min(float(old), 1.02 * float(best)), "float16 may come between them"


@pytest.mark.parametrize("size", [1, 5e-6])
@pytest.mark.parametrize("group_size", [None, 8])
def test_fitting_scales_to_outputs_never_loses(group_size: int | None, size: float) -> None:
    weight, inputs = size * gaussian(24, 32), correlated(600, 32)
    hessian = damped_moment(inputs, 0.1)
    for arguments in ({"method": "planes"}, {"method": "fdb"}, {"method": "gptq", "bits": 2}):
        w, gained = compressed(weight, inputs, arguments | {"group_size": group_size}).approx, []
        for _ in range(4):
            after = refit_scales(w, weight, hessian.float())
            errors = [weight.double() - dense(each).double() for each in (w, after)]
            losses = [((error @ hessian) * error).sum(1) for error in errors]
            assert bool((losses[1] <= losses[0] * (1 + 1e-5)).all()), arguments
            gained.append(float(losses[1].sum() / losses[0].sum()))
            w = after
        assert arguments["method"] != "gptq" or min(gained) < 0.99, "its scales are fitted to weights, not to outputs"


def test_one_visit_is_the_best_move_of_every_weight_in_turn() -> None:
    weight, inputs = gaussian(5, 20), correlated(400, 20)
    hessian = damped_moment(inputs, 0.1)
    w = compressed(weight, inputs, {"method": "planes", "bits": 2, "group_size": 8}).approx
    assert isinstance(w, Sum)
    values = dense(w).double()
    grids = planes_of(w)
    for row, column in itertools.product(range(5), range(20)):
        points = all_points(torch.stack([grid.scale[row, column // 8] for grid in grids]), None)[0]
        trials = values[row].repeat(len(points), 1)
        trials[:, column] = points
        errors = weight[row].double() - trials
        values[row, column] = points[((errors @ hessian) * errors).sum(1).argmin()]
    mine = dense(descend(w, weight, hessian.float()))
    torch.testing.assert_close(mine.double(), values, rtol=1e-5, atol=1e-6)


def test_terms_leave_a_sum_of_planes_whole() -> None:
    """A low-rank term beside planes, in a sum of its own or, as a folded adapter is, in theirs."""
    planes = compressed(gaussian(24, 48), correlated(768, 48), METHODS[0]).approx
    assert isinstance(planes, Sum)
    term = LowRank(Dense(gaussian(24, 2)), Dense(gaussian(2, 48)))
    for w in (Sum((planes, term)), Sum((*planes.parts, term))):
        base, factors = split_low_rank(w)
        assert factors is not None and torch.equal(dense(base), dense(planes)) and isinstance(base, Sum)


# --- BiLLM -----------------------------------------------------------------------------------------------------------


def test_a_sign_and_a_bitmap_are_two_planes() -> None:
    """The paper's form of what is not salient, of the same values, takes the salient columns' share of bitmap more."""
    weight, inputs = gaussian(24, 64), correlated(1024, 64)
    w = compressed(weight, inputs, {"method": "billm", "feedback": False}).approx
    assert isinstance(w, Where) and isinstance(w.index, Columns) and isinstance(w.outside, Sum)
    salient = w.index.inside
    assert 0 < int(salient.sum()) < 32
    magnitudes = dense(w.outside).abs()
    level = [grid.scale.float() / 2 for grid in planes_of(w.outside)]
    large = magnitudes > level[0]
    groups = [
        Grid((weight > 0).to(torch.uint8), (2 * each).half(), None, 2, 64)
        for each in (level[0] + level[1], level[0] - level[1])
    ]
    bitmap = Where(w.index, w.inside, Where(Bitmap(large), groups[0], groups[1]))
    torch.testing.assert_close(dense(bitmap), dense(w), rtol=2e-3, atol=1e-5)
    assert bits(bitmap) == bits(w) + 24 * int(salient.sum())
    assert bits(w) == 24 * 64 * 2 + 24 * 4 * 16 + 64
    for row in range(24):  # bell-shaped: what is large is larger than what is small
        rest = ~salient
        inside, outside = weight[row, rest & large[row]].abs(), weight[row, rest & ~large[row]].abs()
        assert inside.min() >= outside.max()


def test_the_share_of_salient_columns_is_the_one_that_loses_least() -> None:
    weight, energy = gaussian(12, 64), torch.rand(64, generator=seeded(0)) + 0.1
    weight[:, [3, 40]] *= 10
    pivots = torch.rand(64, generator=seeded(1)) / 2 + 0.75
    config = BiLLM()
    chosen = salient_columns(weight.T, pivots, energy, config)
    assert bool(chosen[3]) and bool(chosen[40])
    ranked = sorted(range(64), key=lambda c: -float(weight[:, c].square().sum() / pivots[c]))
    losses = {}
    for share in SHARES:
        inside = torch.zeros(64, dtype=torch.bool)
        inside[ranked[: round(64 * share)]] = True
        sides = [
            (weight[:, inside], config.salient(), energy[inside]),
            (weight[:, ~inside], config.others(), energy[~inside]),
        ]
        total = sum(
            slow_loss(row.double(), each.double(), scale, None)
            for part, form, each in sides
            if part.shape[1]
            for row, scale in zip(part, fit_planes(part, form, each)[0])
        )
        losses[int(inside.sum())] = total
    assert int(chosen.sum()) == min(losses, key=lambda count: losses[count])


@pytest.mark.parametrize("arguments", [{"group_size": None}, {"group_size": 16}], ids=str)
def test_a_second_plane_never_loses(arguments: dict[str, Any]) -> None:
    """Of residual binarization, which salient columns get: order two against order one."""
    weight, inputs = gaussian(24, 64), correlated(1024, 64)
    plain = {"method": "planes", "start": "residual", "rounds": 0, "feedback": False, **arguments}
    errors = [
        relative_error(weight, compressed(weight, inputs, {**plain, "bits": count}).approx) for count in (1, 2, 3)
    ]
    assert errors == sorted(errors, reverse=True)


def test_white_inputs_feed_nothing_back() -> None:
    given = layer(gaussian(12, 32), 2 * 32**0.5 * torch.eye(32))
    for arguments in METHODS:
        fed, plain = (apply(given, [step({**arguments, "feedback": on})]).approx for on in (True, False))
        torch.testing.assert_close(dense(fed), dense(plain), rtol=1e-4, atol=1e-6)
