"""Pruning against sorted rows, exact counts and patterns."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.methods.layer import apply, relative_error, step
from llmcompress.methods.pruning.scores import relevance_of, shares_of_columns
from llmcompress.methods.solvers.projection import largest, largest_of_each
from llmcompress.weight.encoding import decode, encode
from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import Pattern, Where
from tests.builders import compressed, correlated, gaussian, layer, moments, seeded

PRUNERS = ("magnitude", "wanda", "sparsegpt", "relevance", "random_mask", "dimap")


def kept(done: Any) -> Tensor:
    base = done.approx
    assert isinstance(base, Where)
    return base.index.inside


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.7, 1.0])
def test_wanda_keeps_the_best_of_each_row(sparsity: float) -> None:
    """arXiv 2306.11695, eq. 1: |w_ij| * norm of channel j, sorted within the row."""
    weight, inputs = gaussian(5, 40), correlated(600, 40)
    done = compressed(weight, inputs, {"method": "wanda", "sparsity": sparsity})
    norms = inputs.double().square().sum(0).sqrt()
    pruned = int(40 * Fraction(str(sparsity)))
    for row in range(5):
        order = sorted(range(40), key=lambda j: float(weight[row, j].double().abs() * norms[j]))
        assert set(kept(done)[row].nonzero()[:, 0].tolist()) == set(order[pruned:])
    assert torch.equal(dense(done.approx), torch.where(kept(done), weight.bfloat16().float(), 0.0))


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "2:3", "1:16"])
def test_patterns_keep_the_best_of_each_group(method: str, pattern: str) -> None:
    weight, inputs = gaussian(5, 48), correlated(600, 48)
    keep, group = map(int, pattern.split(":"))
    scores = weight.double().abs() * (inputs.double().square().sum(0).sqrt() if method == "wanda" else 1.0)
    done = kept(compressed(weight, inputs, {"method": method, "pattern": pattern}))
    for row in range(5):
        for start in range(0, 48, group):
            order = sorted(range(start, start + group), key=lambda j: -float(scores[row, j]))
            assert set((done[row, start : start + group].nonzero()[:, 0] + start).tolist()) == set(order[:keep])


def test_magnitude_keeps_the_best_of_the_whole_layer() -> None:
    weight = gaussian(7, 33)
    keep = kept(compressed(weight, correlated(100, 33), {"method": "magnitude", "sparsity": 0.6}))
    assert float(weight[keep].abs().min()) >= float(weight[~keep].abs().max())


def test_relevance_is_that_of_single_tokens_where_inputs_and_gradients_are_independent() -> None:
    """arXiv 1912.08881: w_ij x_j g_i, here of every token and every weight, and its sum over a row's inputs."""
    weight, inputs, gradients = gaussian(6, 20), correlated(4000, 20).double(), gaussian(4000, 6, seed=5).double()
    gradients *= torch.arange(1.0, 7.0)
    each = inputs[:, None, :] * weight.double() * gradients[:, :, None]  # [tokens, out, in]
    torch.testing.assert_close(each.sum(2), (inputs @ weight.double().T) * gradients, msg="relevance is conserved")
    one = replace(layer(weight, inputs.float()), rows=gradients.square().mean(0).float())
    mine = relevance_of(one, weight).double()
    expected = each.square().mean(0).sqrt()
    torch.testing.assert_close(mine / mine.mean(), expected / expected.mean(), rtol=0.15, atol=0)
    keep = kept(apply(one, [step({"method": "relevance", "sparsity": 0.6})]))
    assert float(mine[keep].min()) >= float(mine[~keep].max())


def test_chance_is_that_of_a_layer_and_a_seed() -> None:
    weight, inputs, config = gaussian(8, 32), correlated(100, 32), {"method": "random_mask", "sparsity": 0.5}
    mask = kept(compressed(weight, inputs, config))
    assert torch.equal(mask, kept(compressed(weight, inputs, config)))
    other = replace(layer(weight, inputs), seed="another")
    assert not torch.equal(mask, kept(apply(other, [step(config)])))


def test_white_inputs_make_wanda_magnitude_by_row() -> None:
    weight = gaussian(6, 32)
    keep = kept(compressed(weight, 3 * torch.eye(32), {"method": "wanda", "sparsity": 0.5}))
    threshold = weight.abs().sort(1).values[:, 16:17]
    assert torch.equal(keep, weight.abs() >= threshold)


def test_wanda_is_the_best_mask_of_a_row_for_uncorrelated_channels() -> None:
    """Every other mask with as many weights loses more where H is diagonal: all 70 masks of a row of 8."""
    weight = gaussian(1, 8)
    inputs = torch.diag(torch.arange(1.0, 9.0))
    done = compressed(weight, inputs, {"method": "wanda", "sparsity": 0.5})
    mine = relative_error(weight, torch.where(kept(done), weight, 0.0), moments(inputs))
    for chosen in torch.combinations(torch.arange(8), 4):
        other = torch.zeros_like(weight)
        other[0, chosen] = weight[0, chosen]
        assert mine <= relative_error(weight, other, moments(inputs)) + 1e-12


@pytest.mark.parametrize("sparsity", ["0.0", "0.1", "0.29", "0.5", "0.57", "1.0"])
@pytest.mark.parametrize("method", PRUNERS)
def test_the_number_of_zeros_is_exact(method: str, sparsity: str) -> None:
    """The official threshold prunes one too many, all ties, and fails at 1.0; binary 0.29 * 100 is 28.99."""
    for weight in (gaussian(4, 100), torch.ones(4, 100)):  # ones: all ties
        keep = kept(compressed(weight, correlated(1600, 100), {"method": method, "sparsity": float(sparsity)}))
        assert int((~keep).sum()) == 400 * Fraction(sparsity), "a wrong number of zeros"
        if method == "wanda":
            assert bool(((~keep).sum(1) == int(100 * Fraction(sparsity))).all())


@pytest.mark.parametrize("method", PRUNERS)
def test_sparsity_zero_keeps_everything(method: str) -> None:
    weight = gaussian(5, 40)
    done = compressed(weight, correlated(600, 40), {"method": method, "sparsity": 0.0})
    assert bool(kept(done).all())
    error = relative_error(weight, done.approx)
    assert error < 1e-5, f"bfloat16 rounding (fed back in SparseGPT) loses about 3e-6, not {error:.1e}"


JOINT: list[dict[str, Any]] = [
    {},
    {"bits": 4},
    {"bits": 3, "group_size": 12},
    {"bits": 3, "group_size": 30},
    {"bits": 3, "group_size": 50, "symmetric": False},
    {"bits": 3, "group_size": 7},
]


@pytest.mark.parametrize("joint", JOINT, ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "2:3"])
def test_the_pattern_holds_in_every_group_whatever_the_quantization_groups(pattern: str, joint: dict[str, Any]) -> None:
    weight, inputs = gaussian(9, 120), correlated(1920, 120)
    done = compressed(weight, inputs, {"method": "sparsegpt", "pattern": pattern, **joint}).approx
    assert isinstance(done, Where) and isinstance(done.index, Pattern)
    keep, group = map(int, pattern.split(":"))
    counts = done.index.inside.reshape(9, -1, group).sum(2)
    assert bool((counts == keep).all()), f"groups with {counts.unique().tolist()} weights"
    assert torch.equal(dense(decode(*encode(done))), dense(done))


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:8"])
def test_the_salient_pattern_holds_in_every_group(pattern: str) -> None:
    keep, group = map(int, pattern.split(":"))
    for group_size in (None, 4, 24, 40):
        config = {"method": "pb_llm", "salient": pattern, "group_size": group_size}
        if group_size is not None and group_size % group and group % group_size:
            continue
        done = compressed(gaussian(9, 120), correlated(1920, 120), config).approx
        assert isinstance(done, Where)
        assert bool((done.index.inside.reshape(9, -1, group).sum(2) == keep).all())


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
@pytest.mark.parametrize("form", [{"sparsity": 0.6}, {"pattern": "2:4"}], ids=str)
def test_quantizing_what_is_pruned_keeps_the_zeros_and_stores_only_the_rest(
    quantizer: str, form: dict[str, Any]
) -> None:
    weight, inputs = gaussian(16, 64), correlated(1024, 64)
    first = compressed(weight, inputs, {"method": "wanda", **form})
    both = compressed(weight, inputs, {"method": "wanda", **form}, {"method": quantizer, "bits": 4, "group_size": 16})
    assert torch.equal(kept(both), kept(first))
    assert int(dense(both.approx)[~kept(both)].count_nonzero()) == 0
    assert relative_error(weight, both.approx, moments(inputs)) < 1.3 * relative_error(
        weight, first.approx, moments(inputs)
    )


def test_ties_go_to_the_first_and_counts_are_exact() -> None:
    scores = torch.ones(3, 4)
    assert largest(scores, 5).reshape(-1).tolist() == [True] * 5 + [False] * 7
    assert int(largest(scores, 0).sum()) == 0 and int(largest(scores, 12).sum()) == 12
    assert largest_of_each(torch.ones(8, 2), 1, 4)[:, 0].tolist() == [True, False, False, False] * 2


def test_pruning_a_layer_leaves_the_dense_layer_alone() -> None:
    given = layer(gaussian(4, 8), correlated(64, 8))
    assert torch.equal(dense(given.approx), given.weight.bfloat16().float())


def dimap_mask(weight: Tensor, **arguments: object) -> Tensor:
    """Return the mask of the weights that `dimap` keeps, bool `[out, in]`."""
    return kept(compressed(weight, correlated(64, weight.shape[1]), {"method": "dimap", **arguments}))


def test_dimap_shares_follow_the_formula() -> None:
    """arXiv 2404.13648, eq. 10, of magnitudes: each weight over the sum of those in its column that are not smaller."""
    weight = gaussian(9, 12)
    shares = shares_of_columns(weight)
    for row in range(9):
        for column in range(12):
            own = abs(float(weight[row, column]))
            rest = sum(abs(float(other)) for other in weight[:, column] if abs(float(other)) >= own)
            assert float(shares[row, column]) == pytest.approx(own / rest, rel=1e-5)


def test_rescaling_input_channels_changes_nothing_for_dimap() -> None:
    """Gains can move between a norm and the columns behind it; magnitudes see that, shares do not."""
    weight = gaussian(24, 32)
    gains = 2.0 ** torch.randint(-3, 4, (32,), generator=seeded(5))
    for arguments in ({"sparsity": 0.5}, {"pattern": "2:4"}):
        assert torch.equal(dimap_mask(weight * gains, **arguments), dimap_mask(weight, **arguments))


def test_dimap_of_one_channel_is_magnitude() -> None:
    weight = gaussian(40, 1)
    keep = dimap_mask(weight, sparsity=0.5)
    assert float(weight[keep].abs().min()) >= float(weight[~keep].abs().max())


def test_dimap_cuts_no_input_channel_off() -> None:
    """The largest weight of a column scores 1, however small it is beside other columns' weights."""
    weight = gaussian(16, 32) * torch.logspace(-3, 0, 32)
    assert bool(dimap_mask(weight, sparsity=0.9).any(0).all()), "0.9 leaves 52 weights for 32 channels"


def test_dimap_patterns_keep_the_best_shares_of_each_group() -> None:
    weight = gaussian(6, 48)
    shares, keep = shares_of_columns(weight), dimap_mask(weight, pattern="2:4")
    for row in range(6):
        for start in range(0, 48, 4):
            best = sorted(range(start, start + 4), key=lambda j: -float(shares[row, j]))[:2]
            assert set((keep[row, start : start + 4].nonzero()[:, 0] + start).tolist()) == set(best)
