"""Losses on hidden states: what every one promises, and each against its formula, slow and plain."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import llmcompress.losses  # noqa: F401  (registers them)
from llmcompress.errors import InputError
from llmcompress.losses.loss import Features, LossConfig, feature_losses, loss_config, measure_features
from tests.losses.cases import spelled
from tests.losses.spy import largest_tensor

CASES = [{"loss": each.name, **example} for each in feature_losses().values() for example in each.config.examples]
every_loss = pytest.mark.parametrize("config", [loss_config(case) for case in CASES], ids=map(spelled, CASES))
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def config(name: str, **arguments: Any) -> LossConfig:
    """A loss by its name."""
    return loss_config({"loss": name, **arguments})


def random_features(
    sequences: int = 5, length: int = 7, width: int = 6, teacher_width: int = 6, ragged: bool = False
) -> Features:
    """Two layers that have little to do with each other; `ragged`: sequences end early."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(sequences, length, n, generator=generator, dtype=torch.float64) for n in (width, teacher_width)
    )
    ends = torch.randint(1, length + 1, (sequences, 1), generator=generator)
    keep = torch.arange(length) < ends if ragged else None
    return Features(student.requires_grad_(), teacher.requires_grad_(), keep)


def solved(features: Features, config: LossConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, count, and the sum's gradient with respect to the student."""
    total, count = measure_features(features, config)
    [gradient] = torch.autograd.grad(total, [features.student])
    return total.detach(), count, gradient


def sequences(features: Features, index: Tensor) -> Features:
    """Some of them."""
    keep = None if features.keep is None else features.keep[index]
    return Features(features.student.detach()[index].requires_grad_(), features.teacher[index], keep)


# --- every example of every loss --------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("ragged", [False, True])
def test_parts_add_up_to_the_whole(config: LossConfig, ragged: bool) -> None:
    whole = random_features(ragged=ragged)
    total, count, gradient = solved(whole, config)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(1))
    parts = [solved(sequences(whole, part), config) for part in order.tensor_split([0, 2, 3])]
    assert_close(torch.stack([part[0] for part in parts]).sum(), total, **EXACT)
    assert_close(torch.stack([part[1] for part in parts]).sum(), count, **EXACT)
    assert_close(torch.cat([part[2] for part in parts]), gradient[order], **EXACT)
    assert total.shape == count.shape == () and not count.requires_grad


@every_loss
def test_gradient_flows_to_the_student_alone(config: LossConfig) -> None:
    given = random_features()
    measure_features(given, config)[0].backward()
    assert given.student.grad is not None and given.student.grad.any()
    assert given.teacher.grad is None


@every_loss
def test_nothing_pulls_a_student_away_from_its_teacher(config: LossConfig) -> None:
    given = random_features()
    total, _, gradient = solved(replace(given, teacher=given.student.detach()), config)
    assert abs(float(total)) < 1e-13 and gradient.abs().max() < 1e-13
    assert solved(given, config)[0] > 0


@every_loss
def test_positions_outside_keep_do_not_matter(config: LossConfig) -> None:
    given = random_features(ragged=True)
    spoiled = given.student.detach().masked_fill(~given.keep[..., None], float("nan"))
    expected = solved(given, config)
    found = solved(replace(given, student=spoiled.requires_grad_()), config)
    for now, before in zip(found, expected):
        assert_close(now, before, **EXACT)
    assert not found[2][~given.keep].any()


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(config: LossConfig, dtype: torch.dtype) -> None:
    given = random_features()
    student, teacher = (states.detach().to(dtype) for states in (given.student, given.teacher))
    half = solved(Features(student.requires_grad_(), teacher), config)
    full = solved(Features(student.detach().float().requires_grad_(), teacher.float()), config)
    assert half[0].dtype == half[1].dtype == torch.float32 and half[2].dtype == dtype
    assert torch.equal(half[0], full[0]) and torch.equal(half[1], full[1])


@every_loss
def test_a_config_survives_being_written(config: LossConfig) -> None:
    assert loss_config(config.model_dump(mode="json")) == config


# --- hidden states ----------------------------------------------------------------------------------------------------


def test_relative_error_of_tokens_and_of_layers() -> None:
    given = random_features()
    error = (given.student - given.teacher).detach().square().sum(-1)
    energy = given.teacher.detach().square().sum(-1)
    total, count, gradient = solved(given, config("hidden"))
    assert_close(total, (error / energy).sum(), **EXACT)
    assert float(count) == 35
    assert_close(gradient, 2 * (given.student - given.teacher).detach() / energy[..., None], **EXACT)
    total, count, _ = solved(given, config("hidden", per="layer"))
    assert_close(total / count, error.sum() / energy.sum(), **EXACT)


@pytest.mark.parametrize("per", ["token", "layer"])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_states_scaled_together_lose_the_same(per: str, scale: float) -> None:
    given = random_features()
    scaled = Features((scale * given.student.detach()).requires_grad_(), scale * given.teacher.detach())
    (before, n, _), (after, m, _) = (solved(each, config("hidden", per=per)) for each in (given, scaled))
    assert_close(after / m, before / n, **EXACT)


def test_one_huge_token_is_not_the_whole_loss() -> None:
    given = random_features()
    given.student.data[:, 0] *= 100
    given.teacher.data[:, 0] *= 100
    shares = {}
    for per in ("token", "layer"):
        total, _, _ = solved(given, config("hidden", per=per))
        first, _, _ = solved(Features(given.student[:, :1], given.teacher[:, :1]), config("hidden", per=per))
        shares[per] = float(first / total)
    assert shares["token"] < 0.5 and shares["layer"] > 0.99


def test_a_teacher_state_of_zero_has_no_error() -> None:
    given = random_features()
    given.teacher.data[1, 2] = 0
    total, count, gradient = solved(given, config("hidden"))
    assert float(count) == 35 and total.isfinite() and gradient.isfinite().all() and not gradient[1, 2].any()


def test_other_widths_are_refused() -> None:
    with pytest.raises(InputError, match="use the loss minilm"):
        measure_features(random_features(teacher_width=8), config("hidden"))


# --- relations --------------------------------------------------------------------------------------------------------


def slow_relations(features: Features, heads: int) -> tuple[Tensor, int]:
    """One sequence, position and head at a time: KL between the two models' likeness to the positions so far."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for n in range(features.student.shape[0]):
        kept = [i for i in range(features.student.shape[1]) if features.keep is None or features.keep[n, i]]
        for head in range(heads):
            for i in kept:
                rows = []
                for states in (features.student.detach()[n], features.teacher.detach()[n]):
                    width = states.shape[-1] // heads
                    part = states[:, head * width : (head + 1) * width]
                    alike = torch.stack([part[i] @ part[j] / width**0.5 for j in kept if j <= i])
                    rows.append(alike.softmax(0))
                total += (rows[1] * (rows[1] / rows[0]).log()).sum() / heads
        count += len(kept)
    return total, count


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("ragged", [False, True])
def test_relations_equal_a_slow_loop(heads: int, chunk: int, ragged: bool) -> None:
    given = random_features(width=6, teacher_width=12, ragged=ragged)
    total, count, _ = solved(given, config("minilm", relation_heads=heads, chunk=chunk))
    expected, number = slow_relations(given, heads)
    assert_close(total, expected, **EXACT)
    assert float(count) == number


def test_chunks_change_no_gradient() -> None:
    given = random_features(teacher_width=4)
    whole, *others = (solved(given, config("minilm", relation_heads=2, chunk=n))[2] for n in (100, 1, 3))
    for other in others:
        assert_close(other, whole, **EXACT)


def test_relations_are_in_memory_a_chunk_at_a_time() -> None:
    given = random_features(sequences=1, length=96)

    def size(chunk: int) -> int:
        return largest_tensor(lambda: solved(given, config("minilm", relation_heads=1, chunk=chunk)))

    assert size(96) == 96 * 96 * 8 and size(8) == 8 * 96 * 8


def test_later_positions_are_not_seen() -> None:
    given = random_features()
    changed = given.student.detach().clone()
    changed[:, -1] += 1
    before, after = (
        measure_features(Features(s[:, :-1], given.teacher[:, :-1]), config("minilm", relation_heads=2))[0]
        for s in (given.student.detach(), changed)
    )
    assert torch.equal(before, after)


def test_a_width_without_such_heads_is_refused() -> None:
    with pytest.raises(InputError, match="relation_heads a divisor of the width"):
        measure_features(random_features(), config("minilm", relation_heads=4))
    flat = Features(torch.zeros(5, 4), torch.zeros(5, 4))
    with pytest.raises(InputError, match=r"must be \[sequences, length, width\]"):
        measure_features(flat, config("minilm", relation_heads=1))
