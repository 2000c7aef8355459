"""Every loss and its gradient with respect to the logits, against the formula on plain probabilities in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from llmcompress.losses.taid import TAID
from tests.losses.cases import config, random_predictions, solved

Solution = tuple[Tensor, Tensor]  # loss [tokens], gradient [tokens, vocabulary]
GIVEN = random_predictions()


def probabilities(temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """q of the student and p of the teacher, by exponentials."""
    q, p = ((logits.detach() / temperature).exp() for logits in (GIVEN.student, GIVEN.teacher))
    return q / q.sum(-1, keepdim=True), p / p.sum(-1, keepdim=True)


def centred(q: Tensor, slope: Tensor) -> Tensor:
    """q (s - <q, s>): what a slope with respect to log-weights of q becomes on the logits."""
    return q * (slope - (q * slope).sum(-1, keepdim=True))


def forward_kl(temperature: float = 1.0) -> Solution:
    q, p = probabilities(temperature)
    return temperature**2 * (p * (p / q).log()).sum(-1), temperature * (q - p)


def reverse_kl(temperature: float = 1.0) -> Solution:
    q, p = probabilities(temperature)
    return temperature**2 * (q * (q / p).log()).sum(-1), temperature * centred(q, (q / p).log())


def js(beta: float, temperature: float = 1.0) -> Solution:
    q, p = probabilities(temperature)
    m = beta * p + (1 - beta) * q
    each = beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)
    return temperature**2 * each, temperature * (1 - beta) * centred(q, (q / m).log())


def skewed_kl(alpha: float, direction: str, temperature: float = 1.0) -> Solution:
    q, p = probabilities(temperature)
    if direction == "forward":
        m = alpha * p + (1 - alpha) * q
        w = (1 - alpha) * p * q / m
        each, gradient = (p * (p / m).log()).sum(-1), q * w.sum(-1, keepdim=True) - w
    else:
        m = (1 - alpha) * p + alpha * q
        each, gradient = (q * (q / m).log()).sum(-1), centred(q, (q / m).log() + 1 - alpha * q / m)
    return temperature**2 * each, temperature * gradient


def dad(gamma: float, least_entropy: float) -> Solution:
    q, p = probabilities()
    weights = (-(p * p.log()).sum(-1)).clamp(min=least_entropy) ** gamma
    return weights * (p * (p / q).log()).sum(-1), weights[:, None] * (q - p)


def bdkd(raised: float, temperature: float = 1.0) -> Solution:
    q, p = probabilities(temperature)
    unsure = (-(q * q.log()).sum(-1) > -(p * p.log()).sum(-1)).double()
    assert 0 < unsure.sum() < len(unsure)  # both branches are tested
    a, b = raised - (raised - 1) * unsure, 1 + (raised - 1) * unsure
    forward, reverse = forward_kl(temperature), reverse_kl(temperature)
    return a * forward[0] + b * reverse[0], a[:, None] * forward[1] + b[:, None] * reverse[1]


def ofa(gamma: float) -> Solution:
    q, p = probabilities()
    e = torch.nn.functional.one_hot(GIVEN.targets, 11)
    target = (p + e) ** gamma - e
    return -(target * q.log()).sum(-1), target.sum(-1, keepdim=True) * q - target


def cross_entropy() -> Solution:
    q, _ = probabilities()
    e = torch.nn.functional.one_hot(GIVEN.targets, 11)
    return -(e * q.log()).sum(-1), q - e


def logit_mse() -> Solution:
    z, u = GIVEN.student.detach(), GIVEN.teacher.detach()
    difference = z - z.mean(-1, keepdim=True) - (u - u.mean(-1, keepdim=True))
    return difference.square().sum(-1) / 22, difference / 11


def topk(k: int, mass: float, top: float, rest: float) -> Solution:
    """Token by token: weights of KL((P, 1 - P) || (Q, 1 - Q)), of P KL(p|K || q|K), of (1 - P) KL(p|rest || q|rest)."""
    losses, gradients = [], []
    for q, p in zip(*probabilities()):
        likeliest = sorted(range(11), key=lambda i: -float(p[i]))[:k]
        loss, gradient = torch.zeros((), dtype=torch.float64), torch.zeros(11, dtype=torch.float64)
        for weight, part in ((top, likeliest), (rest, [i for i in range(11) if i not in likeliest])):
            inside_p, inside_q = p[part].sum(), q[part].sum()
            loss += mass * inside_p * (inside_p / inside_q).log()
            loss += weight * (p[part] * ((p[part] / inside_p) / (q[part] / inside_q)).log()).sum()
            gradient[part] += mass * q[part] * (1 - inside_p / inside_q)
            gradient[part] += weight * (inside_p * q[part] / inside_q - p[part])
        losses.append(loss)
        gradients.append(gradient)
    return torch.stack(losses), torch.stack(gradients)


TABLE: list[tuple[str, Callable[..., Solution], dict[str, Any]]] = [
    ("forward_kl", forward_kl, {}),
    ("forward_kl", forward_kl, {"temperature": 2.5}),
    ("reverse_kl", reverse_kl, {}),
    ("reverse_kl", reverse_kl, {"temperature": 0.4}),
    ("js", js, {"beta": 0.5}),
    ("js", js, {"beta": 0.1, "temperature": 3.0}),
    ("skewed_kl", skewed_kl, {"alpha": 0.1, "direction": "forward"}),
    ("skewed_kl", skewed_kl, {"alpha": 0.6, "direction": "forward", "temperature": 2.0}),
    ("skewed_kl", skewed_kl, {"alpha": 0.1, "direction": "reverse"}),
    ("skewed_kl", skewed_kl, {"alpha": 0.6, "direction": "reverse", "temperature": 2.0}),
    ("dad", dad, {"gamma": 0.1, "least_entropy": 1e-4}),
    ("dad", dad, {"gamma": 3.0, "least_entropy": 0.9}),
    ("bdkd", bdkd, {"raised": 2.0}),
    ("bdkd", bdkd, {"raised": 7.0, "temperature": 2.0}),
    ("ofa", ofa, {"gamma": 1.5}),
    ("ofa", ofa, {"gamma": 1.0}),
    ("cross_entropy", cross_entropy, {}),
    ("logit_mse", logit_mse, {}),
    ("topk", topk, {"k": 1, "mass": 1.0, "top": 1.0, "rest": 1.0}),
    ("topk", topk, {"k": 4, "mass": 0.3, "top": 2.0, "rest": 0.7}),
    ("topk", topk, {"k": 10, "mass": 0.0, "top": 0.0, "rest": 1.0}),
]


@pytest.mark.parametrize("name, formula, arguments", TABLE, ids=lambda part: getattr(part, "__name__", str(part)))
def test_value_and_gradient(name: str, formula: Callable[..., Solution], arguments: dict[str, Any]) -> None:
    total, _, gradient = solved(GIVEN, config(name, **arguments))
    each, slope = formula(**arguments)
    assert_close(total, each.sum(), rtol=1e-13, atol=0)
    assert_close(gradient, slope, rtol=0, atol=1e-13)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_taid_has_the_gradient_of_a_constant_target(t: float) -> None:
    taid = TAID()
    state = taid.start()
    state.t = t
    z, u = GIVEN.student.detach(), GIVEN.teacher.detach()
    target = ((1 - t) * z + t * u).exp()
    target /= target.sum(-1, keepdim=True)
    q, _ = probabilities()
    total, _, gradient = solved(GIVEN, taid, state)
    assert_close(total, -(target * q.log()).sum(), rtol=1e-13, atol=0)
    assert_close(gradient, q - target, rtol=0, atol=1e-14)


def test_weights_of_dad_are_at_least_the_floor() -> None:
    certain = random_predictions()
    certain.teacher.data *= 1e3  # entropies of 0
    _, count, _ = solved(certain, config("dad", gamma=2.0, least_entropy=0.1))
    assert math.isclose(float(count), 7 * 0.1**2)
