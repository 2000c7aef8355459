"""DIMAP's shares against the sums written out, and what they do not depend on."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from llmcompress.methods.layer import Layer, support
from llmcompress.methods.pruning.scores import shares_of_columns
from tests.builders import compressed, correlated, gaussian, seeded


def pruned(weight: Tensor, **arguments: object) -> Tensor:
    """Return the mask of the weights that `dimap` keeps, bool `[out, in]`."""
    done: Layer = compressed(weight, correlated(64, weight.shape[1]), {"method": "dimap", **arguments})
    keep = support(done.approx)
    assert keep is not None
    return keep


def test_shares_are_what_the_formula_says() -> None:
    """arXiv 2404.13648, eq. 10, of magnitudes: each weight over the sum of those in its column that are not smaller."""
    weight = gaussian(9, 12)
    for (row, column), share in {
        (i, j): float(shares_of_columns(weight)[i, j]) for i in range(9) for j in range(12)
    }.items():
        own = abs(float(weight[row, column]))
        rest = sum(abs(float(other)) for other in weight[:, column] if abs(float(other)) >= own)
        assert share == pytest.approx(own / rest, rel=1e-5)


def test_rescaling_input_channels_changes_nothing() -> None:
    """Gains can move between a norm and the columns behind it; magnitudes see that, shares do not."""
    weight = gaussian(24, 32)
    gains = 2.0 ** torch.randint(-3, 4, (32,), generator=seeded(5))
    for arguments in ({"sparsity": 0.5}, {"pattern": "2:4"}):
        assert torch.equal(pruned(weight * gains, **arguments), pruned(weight, **arguments))


def test_of_one_channel_it_is_magnitude() -> None:
    weight = gaussian(40, 1)
    kept = pruned(weight, sparsity=0.5)
    assert float(weight[kept].abs().min()) >= float(weight[~kept].abs().max())


def test_no_input_channel_is_cut_off() -> None:
    """The largest weight of a column scores 1, however small it is beside other columns' weights."""
    weight = gaussian(16, 32) * torch.logspace(-3, 0, 32)
    assert bool(pruned(weight, sparsity=0.9).any(0).all()), "0.9 leaves 52 weights for 32 channels"


@pytest.mark.parametrize("sparsity", ["0.0", "0.29", "0.57", "1.0"])
def test_the_number_of_zeros_is_exact(sparsity: str) -> None:
    for weight in (gaussian(4, 100), torch.ones(4, 100), torch.zeros(4, 100)):
        assert int((~pruned(weight, sparsity=float(sparsity))).sum()) == 400 * Fraction(sparsity)


def test_a_pattern_keeps_the_best_shares_of_each_group() -> None:
    weight = gaussian(6, 48)
    shares, keep = shares_of_columns(weight), pruned(weight, pattern="2:4")
    for row in range(6):
        for start in range(0, 48, 4):
            best = sorted(range(start, start + 4), key=lambda j: -float(shares[row, j]))[:2]
            assert set((keep[row, start : start + 4].nonzero()[:, 0] + start).tolist()) == set(best)
