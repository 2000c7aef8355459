"""Inputs of the tests of distillation: random logits, and every example of every registered loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import llmcompress.losses  # noqa: F401  (registers them)
from llmcompress.losses.loss import LossConfig, LossState, Predictions, loss_config, losses, measure

# Losses that want something else than the teacher's prediction: the truth, too.
BY_TRUTH = {"cross_entropy", "ofa"}
# Losses that are not zero where the student equals its teacher.
CROSS_ENTROPIES = BY_TRUTH | {"taid"}
CASES = [{"loss": each.name, **example} for each in losses().values() for example in each.config.examples]


def spelled(arguments: dict[str, Any]) -> str:
    """A loss in a test's name."""
    return ",".join(str(value) for value in arguments.values())


every_loss = pytest.mark.parametrize("config", [loss_config(case) for case in CASES], ids=map(spelled, CASES))


def config(name: str, **arguments: Any) -> LossConfig:
    """A loss by its name."""
    return loss_config({"loss": name, **arguments})


def random_predictions(
    tokens: int = 7, vocabulary: int = 11, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Predictions:
    """Two models that have little to do with each other; the teacher's logits would take a gradient, too."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, tokens, vocabulary, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return Predictions(student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_(), targets)


def solved(
    predictions: Predictions, config: LossConfig, state: LossState | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, count, and the sum's gradient with respect to the student's logits."""
    total, count = measure(predictions, config, config.start() if state is None else state)
    [gradient] = torch.autograd.grad(total, [predictions.student])
    return total.detach(), count, gradient


def value(predictions: Predictions, config: LossConfig) -> Tensor:
    """The sum alone."""
    return measure(predictions, config, config.start())[0].detach()
