"""Relations between the losses: limits, bounds, and splits that lose nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from llmcompress.losses.ofa import enhance_truth
from tests.losses.cases import config, random_predictions, solved, value

GIVEN = random_predictions()
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def test_js_tends_to_the_two_kl_divergences() -> None:
    for near, end, divergence in ((1e-7, 0.0, "forward_kl"), (1 - 1e-7, 1.0, "reverse_kl")):
        total, _, gradient = solved(GIVEN, config(divergence))
        assert_close(value(GIVEN, config("js", beta=end)), total, rtol=0, atol=0)
        found, _, slope = solved(GIVEN, config("js", beta=near))
        scale = near * (1 - near)
        assert_close(found / scale, total, rtol=1e-5, atol=0)
        assert_close(slope / scale, gradient, rtol=1e-4, atol=1e-5)


def test_js_is_made_of_skewed_divergences() -> None:
    for beta in (0.2, 0.5):
        forward = value(GIVEN, config("skewed_kl", alpha=beta))
        reverse = value(GIVEN, config("skewed_kl", alpha=1 - beta, direction="reverse"))
        assert_close(value(GIVEN, config("js", beta=beta)), beta * forward + (1 - beta) * reverse, **EXACT)


def test_skewed_divergences_begin_at_the_plain_ones() -> None:
    for direction in ("forward", "reverse"):
        plain = solved(GIVEN, config(f"{direction}_kl"))
        skewed = solved(GIVEN, config("skewed_kl", alpha=0.0, direction=direction))
        nearly = value(GIVEN, config("skewed_kl", alpha=1e-9, direction=direction))
        assert_close(skewed[0], plain[0], **EXACT)
        assert_close(skewed[2], plain[2], **EXACT)
        assert_close(nearly, plain[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_mixtures_bound_the_loss_of_opposite_models(share: float) -> None:
    opposite = random_predictions()
    opposite.student.data *= 500
    opposite.teacher.data *= -500
    for direction in ("forward", "reverse"):
        found = value(opposite, config("skewed_kl", alpha=share, direction=direction)) / 7
        assert 0 < found <= -math.log(share) + 1e-12
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert 0 < value(opposite, config("js", beta=share)) / 7 <= entropy + 1e-12


@pytest.mark.parametrize("k", [1, 2, 5, 10, 11, 50])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_topk_splits_forward_kl_without_loss(k: int, temperature: float) -> None:
    split = config("topk", k=k, mass=1.0, top=1.0, rest=1.0, temperature=temperature)
    for found, expected in zip(solved(GIVEN, split), solved(GIVEN, config("forward_kl", temperature=temperature))):
        assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("part", ["mass", "top", "rest"])
def test_every_part_of_topk_is_a_divergence(part: str) -> None:
    weights = {"mass": 0.0, "top": 0.0, "rest": 0.0} | {part: 1.0}
    assert 0 < value(GIVEN, config("topk", k=4, **weights)) < value(GIVEN, config("forward_kl"))


def test_a_split_of_nearly_certain_predictions_keeps_its_small_part() -> None:
    certain = random_predictions(dtype=torch.float32)
    certain.teacher.data *= 20
    certain.student.data *= 20
    split = config("topk", k=2, mass=1.0, top=1.0, rest=1.0)
    assert_close(value(certain, split), value(certain, config("forward_kl")), rtol=1e-5, atol=0)


def test_hot_forward_kl_is_the_distance_of_logits() -> None:
    """arXiv 2105.08919: T^2 KL goes to |centred difference|^2 / (2 V) as T grows."""
    hot = [value(GIVEN, config("forward_kl", temperature=t)) for t in (50.0, 100.0)]
    limit = value(GIVEN, config("logit_mse"))
    assert abs(hot[1] / limit - 1) < 0.02
    assert_close(2 * hot[1] - hot[0], limit, rtol=1e-3, atol=0)  # what is left falls like 1 / T


def test_weights_that_say_nothing_change_nothing() -> None:
    forward, reverse = solved(GIVEN, config("forward_kl")), solved(GIVEN, config("reverse_kl"))
    dad = solved(GIVEN, config("dad", gamma=0.0))
    assert_close(dad[0] / dad[1], forward[0] / forward[1], **EXACT)
    balanced = solved(GIVEN, config("bdkd", raised=1.0))
    assert_close(balanced[0], forward[0] + reverse[0], **EXACT)
    assert_close(balanced[2], forward[2] + reverse[2], **EXACT)
    assert_close(solved(GIVEN, config("ofa", gamma=1.0))[2], forward[2], **EXACT)


def test_dad_prefers_tokens_on_which_the_teacher_hesitates() -> None:
    given = random_predictions(tokens=2)
    given.teacher.data[0] *= 0.1
    given.teacher.data[1] *= 5
    shares = [solved(given, config("dad", gamma=gamma)) for gamma in (0.0, 0.5, 1.0)]
    sizes = [(gradient / count).abs().sum(-1) for _, count, gradient in shares]
    assert sizes[0][0] < sizes[1][0] < sizes[2][0] and sizes[0][1] > sizes[1][1] > sizes[2][1]


def test_enhancement_raises_the_truth_and_lowers_the_rest() -> None:
    p = GIVEN.teacher.detach().softmax(-1)
    true = torch.nn.functional.one_hot(GIVEN.targets, 11).bool()
    assert_close(enhance_truth(p, GIVEN.targets, 1.0), p, **EXACT)
    before = p
    for gamma in (1.2, 1.5, 2.0):
        target = enhance_truth(p, GIVEN.targets, gamma)
        assert (target[true] > before[true]).all() and (target[~true] < before[~true]).all()
        before = target
