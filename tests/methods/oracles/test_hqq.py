"""HQQ against plain loops in float64, the official update of zero points, and what it promises beside `rtn`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.methods.grids.hqq import _fit_to_codes, fit_to_norm
from llmcompress.methods.layer import support
from llmcompress.methods.solvers.grid import GridFormat, fit_grid
from llmcompress.weight.expression import bits, dense
from llmcompress.weight.nodes import Grid
from tests.builders import compressed, correlated, gaussian, seeded


def lost(weight: Tensor, approx: Tensor, norm: float) -> Tensor:
    """The sums of |w - w_approx|^norm of every row, float64."""
    return (weight.double() - approx.double()).abs().pow(norm).sum(1)


def slow(row: list[float], scale: float, zero: int, levels: int, norm: float) -> float:
    """The least sum of |w - w_approx|^norm that 20 rounds of half-quadratic splitting meet: one weight at a time."""
    best, beta = float("inf"), 10.0
    for _ in range(20):
        codes = [min(max(round(w / scale + zero), 0), levels - 1) for w in row]
        errors = [w / scale - (code - zero) for w, code in zip(row, codes)]
        best = min(best, sum(abs(x * scale) ** norm for x in errors))
        targets = []
        for w, x in zip(row, errors):
            shrunk = max(abs(x) - max(abs(x), 1e-8) ** (norm - 1) / beta, 0.0)
            targets.append(w / scale - (shrunk if x > 0 else -shrunk))
        mean = sum(code - target for code, target in zip(codes, targets)) / len(row)
        zero = min(max(round(mean), 0), levels - 1)
        points = [code - zero for code in codes]
        energy = sum(point * point for point in points)
        share = sum(point * target for point, target in zip(points, targets)) / energy if energy else 0.0
        rounded = float(torch.tensor(scale * share).half())
        scale = rounded if rounded > 0 else scale
        beta *= 1.01
    return best


@pytest.mark.parametrize("levels", [4, 8, 16])
@pytest.mark.parametrize("norm", [0.7, 1.0, 2.0])
def test_the_solver_agrees_with_plain_loops(norm: float, levels: int) -> None:
    weight = gaussian(24, 32)
    scale, zero = fit_grid(weight, GridFormat(levels, symmetric=False))
    assert zero is not None
    found = fit_to_norm(weight, scale, zero, levels, norm)
    middle = found[1].float()
    approx = ((weight / found[0].float() + middle).round().clamp(0, levels - 1) - middle) * found[0].float()
    expected = torch.tensor(
        [slow(row.tolist(), float(s), int(z), levels, norm) for row, s, z in zip(weight, scale, zero)],
        dtype=torch.float64,
    )
    close = (lost(weight, approx, norm) - expected).abs() <= 1e-3 * expected
    assert int(close.sum()) >= 23, "a code that lies between two points may fall otherwise in float32; no more than one"


def test_one_round_moves_the_zero_as_the_official_update_does() -> None:
    """`zero = mean(codes - (W - shrink(W - W_r)) / scale)`, before rounding; at scale 1 the units are alike."""
    weight, norm, beta = 4 * torch.randn(8, 64, generator=seeded(0)), 0.7, 10.0
    zero, levels = torch.full((8, 1), 7.0), 16
    codes = (weight + zero).round().clamp(0, levels - 1)
    left = weight - (codes - zero)
    shrunk = left.sign() * torch.relu(left.abs() - left.abs().pow(norm - 1) / beta)
    official = (codes - (weight - shrunk)).mean(1, keepdim=True)
    _, moved = _fit_to_codes(weight - shrunk, codes, torch.ones(8, 1).half(), torch.ones_like(weight), levels)
    assert torch.equal(moved.float(), official.round())


CASES: list[dict[str, Any]] = [
    {"bits": number, "group_size": group_size, "norm": norm}
    for number in (2, 3, 4)
    for group_size in (16, None)
    for norm in (0.5, 0.7, 1.0, 2.0)
]


@pytest.mark.parametrize("arguments", CASES, ids=str)
def test_no_group_loses_more_than_under_rtn_in_the_same_bits(arguments: dict[str, Any]) -> None:
    weight, inputs, norm = gaussian(24, 64), correlated(128, 64), arguments["norm"]
    form = {"bits": arguments["bits"], "group_size": arguments["group_size"], "symmetric": False}
    mine = compressed(weight, inputs, {"method": "hqq", **arguments}).approx
    theirs = compressed(weight, inputs, {"method": "rtn", **form}).approx
    assert isinstance(mine, Grid) and bits(mine) == bits(theirs)
    size = arguments["group_size"] or 64
    groups = [matrix.reshape(-1, size) for matrix in (weight, dense(mine), dense(theirs))]
    before, after = lost(groups[0], groups[2], norm), lost(groups[0], groups[1], norm)
    assert bool((after <= before * (1 + 1e-5) + 1e-12).all())
    assert float(after.sum()) < float(before.sum()), "nothing was gained"


def test_a_low_norm_serves_most_weights_and_a_high_one_the_largest() -> None:
    weight, inputs = gaussian(64, 64), correlated(128, 64)
    low, high = (
        (weight - dense(compressed(weight, inputs, {"method": "hqq", "bits": 3, "norm": norm}).approx)).abs()
        for norm in (0.7, 2.0)
    )
    assert float(low.median()) < float(high.median())
    assert float(low.square().sum()) > float(high.square().sum())


def test_of_a_pruned_base_only_what_is_kept_counts() -> None:
    weight, inputs = gaussian(24, 64), correlated(128, 64)
    prune = {"method": "magnitude", "sparsity": 0.5}
    first = compressed(weight, inputs, prune)
    keep = support(first.approx)
    assert keep is not None
    approx = {}
    for name, step in {
        "hqq": {"method": "hqq", "bits": 3, "group_size": 16},
        "rtn": {"method": "rtn", "bits": 3, "group_size": 16, "symmetric": False},
    }.items():
        done = compressed(weight, inputs, prune, step)
        approx[name] = dense(done.approx)
        assert torch.equal(support(done.approx), keep) and int(approx[name][~keep].count_nonzero()) == 0
    ours, rtn = (float(lost((weight * keep), approx[name], 0.7).sum()) for name in ("hqq", "rtn"))
    assert ours < rtn
