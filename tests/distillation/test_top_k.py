"""A teacher of whose predictions only the likeliest classes are known: what losses are then, and which are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from llmcompress.distillation.objective.chunked_loss import chunked_loss
from llmcompress.distillation.teacher.predictions import Likeliest, Online, TeacherLogits
from llmcompress.losses.loss import LossConfig, Predictions, measure
from tests.losses.cases import CASES, config, every_loss, random_predictions, spelled, value
from tests.losses.spy import largest_tensor

MERGING = [case for case in CASES if config(case["loss"], **case).reads() == "merged"]
merging = pytest.mark.parametrize(
    "config", [config(case["loss"], **case) for case in MERGING], ids=map(spelled, MERGING)
)


def compared(predictions: Predictions, k: int) -> Predictions:
    """On the symbols that are left of the teacher."""
    known = Likeliest.of(predictions.teacher.detach(), k)
    return known.beside(predictions.student, predictions.targets, slice(None))["merged"]


def solved(given: Predictions, wanted: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """The sum of a loss, and its gradient."""
    total, _ = measure(given, config, config.start())
    return total.detach(), torch.autograd.grad(total, wanted)[0]


@merging
@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_all_classes_are_the_whole_prediction(config: LossConfig, dtype: torch.dtype, error: float) -> None:
    given = random_predictions(tokens=9, vocabulary=23, dtype=dtype)
    found = solved(compared(given, 23), given.student, config)
    for one, other in zip(found, solved(given, given.student, config), strict=True):
        assert_close(one, other, rtol=error, atol=error)


@pytest.mark.parametrize("k", [1, 4, 22])
def test_forward_kl_is_the_sum_over_symbols(k: int) -> None:
    """The formula, token by token, on probabilities; and its gradient in closed form."""
    given = random_predictions(tokens=5, vocabulary=23)
    total, gradient = solved(compared(given, k), given.student, config("forward_kl"))
    expected, slopes = 0.0, torch.zeros_like(gradient)
    for row, (p, q) in enumerate(zip(given.teacher.detach().softmax(-1), given.student.detach().softmax(-1))):
        top = sorted(range(23), key=lambda name: -float(p[name]))[:k]
        tails = [1 - sum(float(each[name]) for name in top) for each in (p, q)]
        expected += sum(float(p[name] * (p[name] / q[name]).log()) for name in top)
        expected += tails[0] * float(torch.tensor(tails[0] / tails[1], dtype=torch.float64).log())
        for name in range(23):
            slopes[row, name] = q[name] - p[name] if name in top else q[name] * (1 - tails[0] / tails[1])
    assert_close(float(total), expected, rtol=1e-11, atol=0)
    assert_close(gradient, slopes, rtol=1e-9, atol=1e-12)


@merging
def test_a_divergence_of_symbols_is_a_lower_bound_that_grows_with_them(config: LossConfig) -> None:
    if config.loss == "taid":
        return  # a cross-entropy, between mixtures of logits
    given = random_predictions(tokens=40, vocabulary=23)
    values = [float(value(compared(given, k), config)) for k in (1, 2, 4, 8, 16, 23)]
    assert values == sorted(values) and values[0] < 0.9 * values[-1]
    assert_close(values[-1], float(value(given, config)))


def test_a_small_tail_keeps_its_digits() -> None:
    logits = torch.tensor([[40.0, 1.0, 0.0, -torch.inf]])
    known = Likeliest.of(logits, 1)
    assert_close(known.log_tail, torch.tensor([1.0, 0.0]).logsumexp(-1)[None] - 40)
    assert Likeliest.of(logits, 3).log_tail.tolist() == [-torch.inf]


def test_ruled_out_classes_make_no_nan() -> None:
    given = random_predictions(tokens=6, vocabulary=23)
    never = torch.full((), -torch.inf, dtype=torch.float64)
    student, teacher = given.student.detach().clone(), given.teacher.detach().clone()
    student[:3, 20:], teacher[2:, 18:] = never, never
    student.requires_grad_()
    for k in (2, 18, 21, 23):
        for name in ("forward_kl", "reverse_kl", "taid"):
            total, gradient = solved(
                compared(replace(given, student=student, teacher=teacher), k), student, config(name)
            )
            assert bool(total.isfinite()) and bool(gradient.isfinite().all()), (k, name)


class Ends:
    """The ends of two models, float32."""

    def __init__(self, tokens: int = 13, vocabulary: int = 50, width: int = 6) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
        self.head = nn.Linear(width, vocabulary)
        self.teacher = torch.randn(tokens, vocabulary, generator=generator) * 2
        self.targets = torch.randint(vocabulary, (tokens,), generator=generator)

    def gradients(self, teacher: TeacherLogits, config: LossConfig, chunk: int) -> list[Tensor]:
        """The loss, and its gradients with respect to the hidden states and the head."""
        terms = [(config, config.start(), 0.5)]
        total = chunked_loss(self.hidden, self.head, teacher, self.targets, terms, chunk).total
        return [total.detach(), *torch.autograd.grad(total, [self.hidden, *self.head.parameters()])]


@pytest.mark.parametrize("name", ["forward_kl", "cross_entropy"])
def test_the_chunked_head_takes_either_teacher(name: str) -> None:
    ends = Ends()
    online = Online(ends.teacher, nn.Identity())
    found = ends.gradients(Likeliest.of(ends.teacher, 50), config(name), chunk=4)
    for one, other in zip(found, ends.gradients(online, config(name), chunk=4), strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-5)
    few = Likeliest.of(ends.teacher, 7)
    for one, other in zip(ends.gradients(few, config(name), 4), ends.gradients(few, config(name), 13), strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_memory_is_that_of_a_chunk() -> None:
    ends = Ends(tokens=96, vocabulary=700)
    known = Likeliest.of(ends.teacher, 5)
    assert largest_tensor(lambda: ends.gradients(known, config("forward_kl"), 16)) == 16 * 700 * 4
    assert largest_tensor(lambda: ends.gradients(known, config("forward_kl"), 32)) == 32 * 700 * 4


@every_loss
def test_losses_declare_their_reads(config: LossConfig) -> None:
    """A divergence at temperature 1 stays one when classes are merged; TAID's target is made of the same symbols."""
    merging = config.loss in {"forward_kl", "reverse_kl", "js", "skewed_kl", "taid"}
    expected = "merged" if merging and getattr(config, "temperature", 1) == 1 else "whole"
    assert config.reads() == ("nothing" if config.loss == "cross_entropy" else expected)
