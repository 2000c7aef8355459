"""The feedback engine and the methods on it, against slow float64 transcriptions of their papers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.methods.layer import Layer, apply, relative_error, step
from llmcompress.methods.solvers import feedback as engine
from llmcompress.methods.solvers.grid import GridFormat
from llmcompress.methods.solvers.hessian import FLOAT32, add_damping, inverse_factor, invert_lower, second_moment
from llmcompress.methods.solvers.projection import GridPoints, KeptValues, Zeros
from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import Bitmap, Dense, Grid, Where
from tests.builders import compressed, correlated, gaussian, layer, moments
from tests.methods.oracles.slow import damped_moment, slow_gptq, slow_pb_llm, slow_sparsegpt
from tests.tiers import tiered

OUT, WIDTH = 6, 24
DAMPING = 0.1


def problem(seed: int = 0, out: int = OUT, width: int = WIDTH) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weight, inputs, damped H, undamped diagonal of H)."""
    weight, inputs = gaussian(out, width, seed), correlated(16 * width, width, seed + 1)
    hessian = damped_moment(inputs, DAMPING)
    return weight, inputs, hessian, (inputs.double().square().sum(0) / len(inputs))


def assert_same_but_for_ties(mine: Tensor, slow: Tensor, hessian: Tensor, weight: Tensor) -> None:
    """Equal, but that float32 may round one entry to the other side of a tie, which moves the rest of its row."""
    same = torch.isclose(mine.double(), slow, rtol=2e-3, atol=1e-4 * float(slow.abs().max())).all(1)
    assert int(same.sum()) >= len(slow) - 1, f"{int((~same).sum())} of {len(slow)} rows differ"
    lost = [weight.double() - stored.double() for stored in (mine, slow)]
    losses = [float(((error @ hessian) * error).sum()) for error in lost]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


# --- the factor and the engine --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 20, 2000])
def test_the_factor_is_the_cholesky_factor_of_the_inverse(tokens: int) -> None:
    inputs = correlated(tokens, 40)
    hessian = damped_moment(inputs, 0.1)
    factor, notes = inverse_factor(moments(inputs), 0.1)
    upper = factor.double()
    assert torch.equal(factor, factor.triu()) and bool((factor.diagonal() > 0).all()) and notes == ()
    assert (upper.T @ upper @ hessian - torch.eye(40, dtype=torch.float64)).abs().max() < 1e-4
    torch.testing.assert_close(
        upper, torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("width", [1, 256, 257, 700])
def test_a_triangle_is_inverted_by_halves(width: int) -> None:
    hessian = damped_moment(correlated(2 * width, width), 0.1)
    lower = torch.linalg.cholesky(hessian)
    inverse = invert_lower(lower)
    assert torch.equal(inverse, inverse.tril())
    torch.testing.assert_close(inverse @ lower, torch.eye(width, dtype=torch.float64))


@pytest.mark.parametrize("damping", [FLOAT32, FLOAT32 / 100])
def test_the_factor_is_right_with_little_damping(damping: float) -> None:
    inputs = correlated(3000, 300) * torch.logspace(-1, 2, 300)
    upper = inverse_factor(moments(inputs), damping)[0].double()
    hessian = damped_moment(inputs, damping)
    assert ((upper.T @ upper @ hessian).diagonal() - 1).abs().max() < 1e-2


def test_the_factor_of_an_order_is_that_of_the_permuted_moment() -> None:
    inputs = correlated(500, 20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    permuted = inverse_factor(moments(inputs[:, order]), 0.1)[0]
    torch.testing.assert_close(inverse_factor(moments(inputs), 0.1, order)[0], permuted, rtol=1e-4, atol=1e-5)


def test_the_moment_of_a_dead_channel_is_the_mean_energy() -> None:
    inputs = correlated(500, 8)
    inputs[:, 3] = 0
    hessian = second_moment(moments(inputs))
    energy = inputs.double().square().mean(0)
    assert float(hessian[3, 3]) == pytest.approx(float(energy.mean()), rel=1e-5)
    assert int(hessian[3].count_nonzero()) == 1, "a dead channel must not touch the others"
    assert bool(second_moment(moments(torch.zeros(5, 8))).diagonal().gt(0).all())


@pytest.mark.parametrize("levels, group_size", [(2, 24), (3, 8), (4, 12), (16, 24)])
def test_the_loss_is_the_sum_of_the_fed_back_errors(levels: int, group_size: int) -> None:
    """tr(E H E^T) = sum of |e_j|^2, with e_j = (w_j - q_j) / U_jj (methods: blocked error feedback)."""
    weight, inputs, hessian, _ = problem()
    factor, _ = inverse_factor(moments(inputs), DAMPING)
    seen: list[float] = []

    class Listening(GridPoints):
        def project_block(self, columns: slice, current: Tensor, shares: Tensor | None) -> Tensor:
            errors = super().project_block(columns, current, shares)
            seen.extend((errors / factor.diagonal()[columns, None]).double().square().sum(1).tolist())
            return errors

    projection = Listening(GridFormat(levels, group_size), WIDTH)
    error = weight.double() - dense(engine.feedback(weight, factor, projection)).double()
    loss = float(((error @ hessian) * error).sum())
    assert len(seen) == WIDTH and loss == pytest.approx(sum(seen), rel=1e-4)


def test_without_a_factor_columns_are_projected_as_they_are() -> None:
    weight = gaussian(5, 9)
    assert torch.equal(dense(engine.feedback(weight, None, KeptValues(torch.float32))), weight)
    assert int(dense(engine.feedback(weight, None, Zeros())).count_nonzero()) == 0


def test_exact_columns_cost_nothing() -> None:
    weight, inputs, _, _ = problem()
    factor, _ = inverse_factor(moments(inputs), DAMPING)
    assert torch.equal(dense(engine.feedback(weight, factor, KeptValues(torch.float32))), weight)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (4, 6)])
def test_the_weight_given_is_not_written_to(size: tuple[int, int]) -> None:
    """A single row or column is contiguous both ways, so a transposed view of it is the weight itself."""
    weight = gaussian(*size)
    before = weight.clone()
    engine.feedback(weight, None, GridPoints(GridFormat(4), size[1]))
    assert torch.equal(weight, before), "feedback wrote its result into the layer's dense weight"


LAZY_STEPS: list[list[dict[str, Any]]] = [
    [{"method": "gptq", "bits": 3}],
    [{"method": "gptq", "bits": 2, "group_size": 16}],
    [{"method": "gptq", "bits": 2, "group_size": 48}],
    [{"method": "gptq", "bits": 2, "group_size": 40, "symmetric": False}],
    [{"method": "gptq", "bits": 3, "group_size": 16, "act_order": True}],
    [{"method": "sparsegpt", "sparsity": 0.5}],
    [{"method": "sparsegpt", "pattern": "2:4"}],
    [{"method": "sparsegpt", "sparsity": 0.5, "bits": 4, "group_size": 48}],
    [{"method": "sparsegpt", "pattern": "2:4", "bits": 3, "group_size": 32}],
    [{"method": "sparsegpt", "pattern": "2:4", "bits": 3, "group_size": 12}],
    [{"method": "sparsegpt", "pattern": "2:3", "bits": 3, "group_size": 96}],
    [{"method": "sparsegpt", "pattern": "2:4", "bits": 3, "group_size": 30}],
    [{"method": "pb_llm", "salient": 0.1}],
    [{"method": "pb_llm", "salient": 0.1, "group_size": 48}],
    [{"method": "pb_llm", "salient": 0.1, "group_size": 160}],
    [{"method": "pb_llm", "salient": "1:8", "group_size": 40}],
    [{"method": "pb_llm", "salient": 0.1, "structure": "columns", "group_size": 48}],
    [{"method": "planes", "bits": 2, "group_size": 48}],
    [{"method": "fdb", "group_size": 40}],
    [{"method": "billm", "group_size": 48}],
    [{"method": "wanda", "pattern": "2:4"}, {"method": "gptq", "bits": 3, "group_size": 16}],
    [{"method": "wanda", "pattern": "2:4"}, {"method": "gptq", "bits": 3, "group_size": 48}],
    [{"method": "gptq", "format": "mxfp4"}],
    [{"method": "gptq", "format": "fp8"}],
    [{"method": "sparsegpt", "pattern": "2:4", "format": "nvfp4"}],
]


@pytest.mark.parametrize(
    "steps",
    tiered(
        LAZY_STEPS,
        LAZY_STEPS[::3].__contains__,
        lambda steps: " > ".join(",".join(map(str, s.values())) for s in steps),
    ),
)
def test_the_lazy_block_changes_speed_never_the_result(steps: list[dict[str, Any]], monkeypatch: Any) -> None:
    """Blocks of 1 column are the algorithm as written; a group or span must never read weights that lag behind."""
    weight, inputs = gaussian(16, 240), correlated(2000, 240)
    results = {}
    for lazy in (1, 32, 64, 128):
        monkeypatch.setattr(engine, "LAZY", lazy)
        results[lazy] = dense(compressed(weight, inputs, *steps).expression())
    for lazy, result in results.items():
        moved = float(((result - results[1]).abs() > 1e-3 * float(weight.abs().max())).float().mean())
        assert moved < 2e-3, f"{moved:.1%} of the weights depend on blocks of {lazy}"


# --- GPTQ -----------------------------------------------------------------------------------------------------------

FORMS: list[dict[str, Any]] = [
    {"bits": 4},
    {"bits": 4, "clip": False},
    {"bits": 3, "group_size": 8},
    {"bits": 2, "group_size": 7},
    {"bits": 3, "group_size": 8, "symmetric": False},
    {"bits": 2, "group_size": 12, "symmetric": False, "clip": False},
    {"bits": "ternary", "group_size": 8},
    {"bits": 1, "group_size": 6},
]


def only(form: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in form.items() if name in names}


def slow_form(form: dict[str, Any]) -> dict[str, Any]:
    levels = 3 if form["bits"] == "ternary" else 2 ** form["bits"]
    rest = only(form, "symmetric", "clip")
    return {"levels": levels, "group_size": form.get("group_size", WIDTH), **rest}


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gptq_is_obs_one_column_at_a_time(form: dict[str, Any], seed: int) -> None:
    weight, inputs, hessian, energy = problem(10 * seed)
    mine = dense(compressed(weight, inputs, {"method": "gptq", "damping": DAMPING, **form}).approx)
    slow = slow_gptq(weight, hessian, energy, **slow_form(form))
    assert_same_but_for_ties(mine, slow, hessian, weight)


@pytest.mark.parametrize("form", [{"bits": 3, "group_size": 8}, {"bits": 4, "symmetric": False}], ids=str)
def test_act_order_is_obs_on_reordered_columns_with_their_original_groups(form: dict[str, Any]) -> None:
    weight, inputs, hessian, energy = problem(5)
    order = energy.argsort(descending=True)
    arguments = {"method": "gptq", "damping": DAMPING, "act_order": True, **form}
    mine = dense(compressed(weight, inputs, arguments).approx)
    permuted = slow_gptq(weight[:, order], hessian[order][:, order], energy, static=order, **slow_form(form))
    assert_same_but_for_ties(mine, permuted[:, order.argsort()], hessian, weight)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_white_inputs_make_gptq_rtn(form: dict[str, Any]) -> None:
    given = white_layer(gaussian(OUT, WIDTH))
    mine, plain = (apply(given, [step({"method": name, **form})]).approx for name in ("gptq", "rtn"))
    assert isinstance(mine, Grid) and isinstance(plain, Grid)
    torch.testing.assert_close(dense(mine), dense(plain), rtol=1e-5, atol=1e-7)


def white_layer(weight: Tensor) -> Layer:
    """A layer whose input second moment is exactly 4 I."""
    width = weight.shape[1]
    return layer(weight, 2 * width**0.5 * torch.eye(width))


# --- SparseGPT ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("sparsity", [0.5, 0.29, 0.75])
def test_sparsegpt_is_obs_with_an_exact_mask_per_span(sparsity: float, seed: int) -> None:
    weight, inputs, hessian, _ = problem(10 * seed)
    mine = dense(compressed(weight, inputs, {"method": "sparsegpt", "sparsity": sparsity}).approx)
    slow = slow_sparsegpt(weight, hessian, sparsity, span=WIDTH)
    assert torch.equal(mine == 0, slow == 0), "another mask"
    assert_same_but_for_ties(mine, slow, hessian, weight)


def test_sparsegpt_chooses_anew_every_128_columns() -> None:
    weight, inputs, hessian, _ = problem(3, out=4, width=144)
    mine = dense(compressed(weight, inputs, {"method": "sparsegpt", "sparsity": 0.5}).approx)
    slow = slow_sparsegpt(weight, hessian, 0.5, span=128)
    assert (mine[:, :128] == 0).sum() == 256 and (mine[:, 128:] == 0).sum() == 32
    assert ((mine == 0) != (slow == 0)).float().mean() < 0.01, "another mask"


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "2:3"])
def test_sparsegpt_keeps_n_of_m_as_obs_does(pattern: str) -> None:
    weight, inputs, hessian, _ = problem(7)
    kept, group = map(int, pattern.split(":"))
    mine = dense(compressed(weight, inputs, {"method": "sparsegpt", "pattern": pattern}).approx)
    slow = slow_sparsegpt(weight, hessian, (kept, group), span=group)
    assert torch.equal(mine == 0, slow == 0), "another mask"
    assert_same_but_for_ties(mine, slow, hessian, weight)


@pytest.mark.parametrize("form", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
def test_white_inputs_leave_weights_that_sparsegpt_keeps(form: dict[str, Any]) -> None:
    weight = gaussian(OUT, WIDTH)
    mine = dense(apply(white_layer(weight), [step({"method": "sparsegpt", **form})]).approx)
    plain = dense(apply(white_layer(weight), [step({"method": "magnitude", **form})]).approx)
    torch.testing.assert_close(mine, plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    "form", [{"sparsity": 0.5, "bits": 3}, {"pattern": "2:4", "bits": 3, "group_size": 12}], ids=str
)
def test_joint_pruning_and_quantization_feeds_both_errors_back(form: dict[str, Any]) -> None:
    """Held against doing one after the other with feedback in both: joint is no worse by more than 5 %."""
    weight, inputs = gaussian(32, 96), correlated(1600, 96)
    joint = compressed(weight, inputs, {"method": "sparsegpt", **form})
    pruning, grid = only(form, "sparsity", "pattern"), only(form, "bits", "group_size")
    after = compressed(weight, inputs, {"method": "magnitude", **pruning}, {"method": "gptq", **grid})
    errors = [relative_error(weight, done.expression(), moments(inputs)) for done in (joint, after)]
    assert errors[0] <= 1.05 * errors[1], errors


# --- PB-LLM ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [24, 8])
@pytest.mark.parametrize("salient", [0.1, 0.25])
@pytest.mark.parametrize("salient_bits", [4, 8])
def test_pb_llm_is_obs_with_two_kinds_of_entries(salient: float, salient_bits: int, group_size: int) -> None:
    weight, inputs, hessian, energy = problem(11)
    config = {"method": "pb_llm", "salient": salient, "salient_bits": salient_bits, "group_size": group_size}
    mine = dense(compressed(weight, inputs, config).approx)
    slow = slow_pb_llm(weight, hessian, energy, salient, 2**salient_bits, group_size)
    assert_same_but_for_ties(mine, slow, hessian, weight)


def test_the_binary_scale_is_the_best_for_its_signs() -> None:
    """alpha = sum h |w| / sum h over the binarized entries; one percent more or less is worse (arXiv 2310.00034)."""
    weight, inputs, _, energy = problem(2)
    done = compressed(weight, inputs, {"method": "pb_llm", "salient": 0.2, "feedback": False}).approx
    assert isinstance(done, Where) and isinstance(done.outside, Grid) and done.outside.levels == 2
    rest = ~done.index.inside
    signs = torch.where(done.outside.codes > 0, 1.0, -1.0).double()
    assert torch.equal(signs[rest], weight.double().sign()[rest])
    alpha = done.outside.scale.double() / 2

    def loss(alpha: Tensor) -> Tensor:
        return ((weight.double() - alpha * signs).square() * energy * rest).sum(1)

    expected = (weight.double().abs() * energy * rest).sum(1) / (energy * rest).sum(1)
    torch.testing.assert_close(alpha[:, 0], expected, rtol=1e-3, atol=0)
    assert bool((loss(alpha) < loss(alpha * 1.01)).all() and (loss(alpha) < loss(alpha * 0.99)).all())


def test_nothing_salient_is_plain_binarization_and_everything_salient_is_rtn() -> None:
    weight, inputs, _, _ = problem(4)
    none = compressed(weight, inputs, {"method": "pb_llm", "salient": 0.0})
    binary = compressed(weight, inputs, {"method": "gptq", "bits": 1})
    torch.testing.assert_close(dense(none.approx), dense(binary.approx))
    every = compressed(weight, inputs, {"method": "pb_llm", "salient": 1.0})
    eight = compressed(weight, inputs, {"method": "gptq", "bits": 8})
    torch.testing.assert_close(dense(every.approx), dense(eight.approx))


@pytest.mark.parametrize("salient", [0.1, 0.3])
def test_the_salient_count_is_exact(salient: float) -> None:
    weight, inputs = gaussian(16, 128), correlated(2000, 128)
    elements = compressed(weight, inputs, {"method": "pb_llm", "salient": salient}).approx
    assert isinstance(elements, Where) and int(elements.index.inside.sum()) == round(16 * 128 * salient)
    columns = compressed(weight, inputs, {"method": "pb_llm", "salient": salient, "structure": "columns"}).approx
    assert isinstance(columns, Where) and int(columns.index.inside.sum()) == round(128 * salient)
    assert isinstance(elements.index, Bitmap) and columns.index.inside.shape == (128,)


def test_salient_entries_are_kept_precisely() -> None:
    weight, inputs, _, _ = problem(6)
    done = compressed(
        weight, inputs, {"method": "pb_llm", "salient": 0.2, "salient_bits": 16, "feedback": False}
    ).approx
    assert isinstance(done, Where) and isinstance(done.inside, Dense)
    chosen = done.index.inside
    assert torch.equal(dense(done)[chosen], weight.bfloat16().float()[chosen])


def test_the_damped_moment_is_the_one_the_package_uses() -> None:
    inputs = correlated(300, 16)
    torch.testing.assert_close(
        add_damping(second_moment(moments(inputs)), 0.3), damped_moment(inputs, 0.3), rtol=1e-5, atol=1e-6
    )
