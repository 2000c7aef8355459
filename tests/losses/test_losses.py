"""Promises of every registered loss, checked on every example of its config: a new loss is tested from here on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from llmcompress.losses.divergence import FLOOR
from llmcompress.losses.loss import LossConfig, Predictions, loss_config, losses, measure
from tests.losses.cases import BY_TRUTH, CROSS_ENTROPIES, every_loss, random_predictions, solved, value
from tests.rules.source_tree import modules

EXACT = {"rtol": 1e-12, "atol": 1e-12}
NEVER = [float("-inf"), torch.finfo(torch.bfloat16).min, 10 * FLOOR]
PADDED = [  # which logit says never, and who says it
    pytest.param(never, by, marks=() if (number, by) in {(0, "both"), (2, "student")} else pytest.mark.slow)
    for number, never in enumerate(NEVER)
    for by in ("both", "student", "teacher")
]


def rows(predictions: Predictions, index: torch.Tensor) -> Predictions:
    """Some of the tokens."""
    student, teacher = (logits.detach()[index] for logits in (predictions.student, predictions.teacher))
    return Predictions(student.requires_grad_(), teacher, predictions.targets[index])


def widened(predictions: Predictions, student: float, teacher: float) -> Predictions:
    """Three classes more, with constant logits."""
    pairs = ((predictions.student, student), (predictions.teacher, teacher))
    wide = [torch.nn.functional.pad(logits.detach(), (0, 3), value=value) for logits, value in pairs]
    return Predictions(wide[0].requires_grad_(), wide[1], predictions.targets)


# --- every example of every loss --------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("seed", range(4))
def test_parts_add_up_to_the_whole(config: LossConfig, seed: int) -> None:
    whole = random_predictions(tokens=9)
    total, count, gradient = solved(whole, config)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(9, generator=generator)
    cuts = torch.randint(10, (3,), generator=generator).sort().values
    parts = list(order.tensor_split(cuts))  # some may be empty
    solutions = [solved(rows(whole, part), config) for part in parts]
    assert_close(torch.stack([one[0] for one in solutions]).sum(), total, **EXACT)
    assert_close(torch.stack([one[1] for one in solutions]).sum(), count, **EXACT)
    assert_close(torch.cat([one[2] for one in solutions]), gradient[order], **EXACT)


@every_loss
def test_gradient_flows_to_the_student_alone(config: LossConfig) -> None:
    given = random_predictions()
    total, count = measure(given, config, config.start())
    assert total.shape == count.shape == () and not count.requires_grad
    total.backward()
    assert given.student.grad is not None and given.student.grad.any()
    assert given.teacher.grad is None
    if config.counts_tokens:
        assert float(count) == len(given.targets)


@every_loss
def test_no_token_is_nothing(config: LossConfig) -> None:
    total, count, gradient = solved(rows(random_predictions(), torch.arange(0)), config)
    assert float(total) == float(count) == 0 and gradient.shape == (0, 11)


@every_loss
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_constant_on_all_logits_changes_nothing(config: LossConfig, whose: str) -> None:
    given = random_predictions()
    total, count, gradient = solved(given, config)
    assert_close(gradient.sum(-1), torch.zeros(7, dtype=torch.float64), **EXACT)
    moved = getattr(given, whose).detach() + torch.linspace(-5, 50, 7, dtype=torch.float64)[:, None]
    again = solved(replace(given, **{whose: moved.requires_grad_()}), config)
    for now, before in zip(again, (total, count, gradient)):
        assert_close(now, before, rtol=1e-11, atol=1e-11)


@every_loss
def test_classes_have_no_order(config: LossConfig) -> None:
    given = random_predictions()
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    student, teacher = (logits.detach()[:, order] for logits in (given.student, given.teacher))
    shuffled = Predictions(student.requires_grad_(), teacher, order.argsort()[given.targets])
    total, count, gradient = solved(given, config)
    again = solved(shuffled, config)
    for now, before in zip(again, (total, count, gradient[:, order])):
        assert_close(now, before, **EXACT)


@every_loss
def test_nothing_pulls_a_student_away_from_its_teacher(config: LossConfig) -> None:
    given = random_predictions()
    assert config.loss in BY_TRUTH or value(given, config) > 0
    total, _, gradient = solved(replace(given, teacher=given.student.detach()), config)
    if config.loss not in BY_TRUTH:
        assert gradient.abs().max() < 1e-15
    if config.loss not in CROSS_ENTROPIES:
        assert abs(float(total)) < 1e-14


@every_loss
@pytest.mark.parametrize("never, by", PADDED)
def test_padded_classes_change_nothing(config: LossConfig, never: float, by: str) -> None:
    given = random_predictions()
    padded = widened(given, 0.5 if by == "teacher" else never, 0.5 if by == "student" else never)
    if config.loss == "cross_entropy" and by == "teacher":
        return  # it does not look at the teacher
    expected, found = solved(given, config), solved(padded, config)
    assert_close(found[0], expected[0], **EXACT)
    assert_close(found[1], expected[1], **EXACT)
    assert_close(found[2][:, :11], expected[2], **EXACT)
    assert float(found[2][:, 11:].abs().max()) == 0


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(config: LossConfig, dtype: torch.dtype) -> None:
    half = random_predictions(dtype=dtype)
    full = Predictions(half.student.detach().float().requires_grad_(), half.teacher.detach().float(), half.targets)
    found, expected = solved(half, config), solved(full, config)
    assert found[0].dtype == found[1].dtype == torch.float32 and found[2].dtype == dtype
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert_close(found[2], expected[2].to(dtype))


@every_loss
def test_autocast_rounds_nothing(config: LossConfig) -> None:
    """Models run under it; a product within a loss would be rounded to bfloat16 there."""
    given = random_predictions()
    wide = Predictions(given.student.detach().float().requires_grad_(), given.teacher.float(), given.targets)
    expected = solved(wide, config)
    with torch.autocast("cpu", torch.bfloat16):
        found = solved(Predictions(wide.student.detach().requires_grad_(), wide.teacher, wide.targets), config)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


@every_loss
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_certain_models_give_finite_numbers(config: LossConfig, size: float) -> None:
    given = random_predictions()
    student, teacher = ((size * logits.detach()).float() for logits in (given.student, given.teacher))
    total, count, gradient = solved(Predictions(student.requires_grad_(), teacher, given.targets), config)
    assert total.isfinite() and count.isfinite() and gradient.isfinite().all()


@every_loss
def test_float32_is_near_float64(config: LossConfig) -> None:
    double = random_predictions(tokens=5, vocabulary=300)
    single = Predictions(double.student.detach().float().requires_grad_(), double.teacher.float(), double.targets)
    for found, expected in zip(solved(single, config), solved(double, config)):
        assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


# --- the registry -----------------------------------------------------------------------------------------------------


def test_an_unknown_loss_is_guessed() -> None:
    with pytest.raises(ValueError, match="unknown loss 'foward_kl'; did you mean 'forward_kl'"):
        loss_config({"loss": "foward_kl"})
    with pytest.raises(ValueError, match="unknown loss 'minlm'; did you mean 'minilm'"):
        loss_config({"loss": "minlm"})
    with pytest.raises(ValueError, match="unknown loss None; known: bdkd, cross_entropy, dad"):
        loss_config({})


def test_arguments_are_strict() -> None:
    with pytest.raises(ValidationError, match="temprature"):
        loss_config({"loss": "forward_kl", "temprature": 2.0})
    for wrong in ({"loss": "js", "beta": 1.1}, {"loss": "skewed_kl", "alpha": 1.0}, {"loss": "topk", "k": 0}):
        with pytest.raises(ValidationError):
            loss_config(wrong)


@every_loss
def test_a_config_survives_being_written(config: LossConfig) -> None:
    assert loss_config(config.model_dump(mode="json")) == config


def test_every_loss_is_registered_by_its_file() -> None:
    [index] = [module for module in modules() if module.name == "llmcompress.losses"]
    declared = {m.name for m in modules() if "\n@loss(" in m.text or "\n@feature_loss(" in m.text}
    assert declared <= index.local_imports(), "losses/__init__.py does not import all of them"
    assert {f"llmcompress.losses.{name}" for name in losses()} <= declared, "a loss's file has its name"
