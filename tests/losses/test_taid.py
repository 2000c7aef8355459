"""TAID's schedule (arXiv 2501.16937): how the target moves from the student to the teacher."""

from __future__ import annotations

import json
import math
import random

import pytest
from pydantic import ValidationError

from llmcompress.errors import NumericsError
from llmcompress.losses.taid import TAID, taid
from tests.losses.cases import random_predictions


def noisy_losses(steps: int, seed: int = 0) -> list[float]:
    """A loss that falls, with noise."""
    noise = random.Random(seed)
    return [2 + 3 * math.exp(-5 * step / steps) * noise.uniform(0.5, 1.5) for step in range(steps)]


def trace(config: TAID, losses: list[float]) -> list[float]:
    """t after every step."""
    state, shares = config.start(), []
    for step, loss in enumerate(losses):
        state.update(loss, (step + 1) / len(losses))
        shares.append(state.t)
    return shares


def paper_schedule(config: TAID, losses: list[float]) -> list[float]:
    """The paper's update, eq. by eq.: relative change, momentum, step, floor."""
    t, momentum, shares = config.t_start, 0.0, [config.t_start]
    for n in range(1, len(losses)):
        change = (losses[n - 1] - losses[n]) / (losses[n - 1] + 1e-15)
        momentum = config.momentum * momentum + (1 - config.momentum) * change
        step = config.rate / (1 + math.exp(-momentum)) * (1 - t)
        floor = config.t_start + (config.t_end - config.t_start) * (n + 1) / len(losses)
        t = min(config.t_end, max(floor, t + step))
        shares.append(t)
    return shares


@pytest.mark.parametrize("config", [TAID(), TAID(rate=0.05, momentum=0.9), TAID(t_start=0.0, t_end=0.8, rate=0.01)])
@pytest.mark.parametrize("steps", [2, 50, 5000])
def test_the_schedule_follows_the_paper(config: TAID, steps: int) -> None:
    losses = noisy_losses(steps)
    assert trace(config, losses) == pytest.approx(paper_schedule(config, losses), rel=1e-12)


@pytest.mark.parametrize("rate", [0.0, 5e-4, 0.1, 1.0])
def test_t_grows_between_the_floor_and_the_end(rate: float) -> None:
    config = TAID(t_start=0.2, t_end=0.9, rate=rate)
    shares = trace(config, noisy_losses(300))
    assert shares == sorted(shares) and shares[-1] == pytest.approx(0.9) and max(shares) <= 0.9
    floor = [0.2 + 0.7 * (step + 1) / 300 for step in range(300)]
    assert all(t >= min(least, 0.9) - 1e-12 for t, least in zip(shares[1:], floor[1:]))


def test_the_adaptive_part_is_bounded() -> None:
    config = TAID(t_start=0.4, rate=0.01)
    state = config.start()
    for loss in noisy_losses(50):
        before = state.t
        state.update(loss, 0.0)  # the floor stays where it is
        assert 0 <= state.t - before <= config.rate * (1 - before)


def test_short_runs_follow_the_floor() -> None:
    shares = trace(TAID(), noisy_losses(1500))
    assert shares[1:] == pytest.approx([0.4 + 0.6 * (step + 1) / 1500 for step in range(1, 1500)], rel=1e-12)
    ahead = trace(TAID(), noisy_losses(20_000))
    assert ahead[10_000] > 0.4 + 0.6 * 10_001 / 20_000 + 0.01  # a long one goes ahead of it


def test_a_falling_loss_moves_faster_than_a_rising_one() -> None:
    config = TAID(rate=0.1, momentum=0.5)
    falling, rising = ([100.0 * factor**n for n in range(10)] for factor in (0.5, 2.0))
    states = [config.start(), config.start()]
    for losses, state in zip((falling, rising), states):
        for loss in losses:
            state.update(loss, 0.0)
    assert states[0].t > states[1].t > 0.4


def test_state_survives_a_checkpoint() -> None:
    config, losses = TAID(rate=0.02), noisy_losses(40)
    for cut in (0, 1, 17):
        whole, first, second = config.start(), config.start(), config.start()
        for step, loss in enumerate(losses[:cut]):
            first.update(loss, step / 40)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for step, loss in enumerate(losses):
            whole.update(loss, step / 40)
            if step >= cut:
                second.update(loss, step / 40)
        assert second.state_dict() == whole.state_dict()


def test_impossible_taid_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"t_start 0.9 is above t_end 0.5"):
        TAID(t_start=0.9, t_end=0.5)
    with pytest.raises(NumericsError, match="a loss of nan"):
        TAID().start().update(math.nan, 0.5)
    with pytest.raises(TypeError, match="needs the state"):
        taid(random_predictions(), TAID(), None)
