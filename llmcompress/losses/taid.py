"""TAID (arXiv 2501.16937): the target moves from the student's own prediction to the teacher's as training goes on.

Target p_t = softmax((1 - t) z + t u) of the student's logits z, taken as constant, and the teacher's u. Minimises the
cross-entropy -sum p_t log q, whose gradient is q - p_t: the form of the authors' code, which matters because the share
t grows with the relative change of this very number. It is not 0 at the teacher; there it is the teacher's entropy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator

from llmcompress.errors import NumericsError
from llmcompress.losses.divergence import over_tokens, shared_logits
from llmcompress.losses.loss import LossConfig, LossState, Predictions, Reads, SumAndCount, loss


class TAID(LossConfig):
    """Arguments of `taid`. Defaults are the authors'.

    `rate` bounds what the loss's fall adds to t in a step, rate (1 - t); the linear floor rises by (t_end - t_start) /
    steps. With the defaults a run of fewer than 2000 steps follows the floor exactly.
    """

    loss: Literal["taid"] = "taid"
    t_start: float = Field(0.4, ge=0, le=1, description="the teacher's share in the target at first")
    t_end: float = Field(1.0, ge=0, le=1, description="and at last")
    rate: float = Field(5e-4, ge=0, le=1, description="size of the adaptive part (the paper's alpha)")
    momentum: float = Field(0.99, ge=0, lt=1, description="of the relative change (the paper's beta)")
    examples = ({}, {"t_start": 0.0, "t_end": 0.9, "rate": 0.1})

    @model_validator(mode="after")
    def _in_order(self) -> TAID:
        if self.t_start > self.t_end:
            raise ValueError(f"t_start {self.t_start} is above t_end {self.t_end}; t only grows")
        return self

    def reads(self) -> Reads:
        """See `LossConfig.reads`. A merged class has the logarithm of its classes' mass for a logit."""
        return "merged"

    def start(self) -> Interpolation:
        """See `LossConfig.start`."""
        return Interpolation(self)


class Interpolation:
    """The teacher's share `t` in the target, the `momentum` of the loss's fall, the previous loss."""

    def __init__(self, config: TAID) -> None:
        self.config = config
        self.t = config.t_start
        self.momentum = 0.0
        self.previous: float | None = None

    def update(self, mean: float, progress: float) -> None:
        """See `LossState.update`. The first call only remembers the loss. Raises NumericsError for a NaN or Inf."""
        if not math.isfinite(mean):
            raise NumericsError(f"taid cannot follow a loss of {mean}; lower the learning rate")
        before, self.previous = self.previous, mean
        if before is None:
            return
        config = self.config
        fall = (before - mean) / (before + 1e-15)
        self.momentum = config.momentum * self.momentum + (1 - config.momentum) * fall
        # tanh, because exp overflows; sigmoid(m) = (1 + tanh(m / 2)) / 2
        adaptive = self.t + config.rate * (1 + math.tanh(self.momentum / 2)) / 2 * (1 - self.t)
        floor = config.t_start + (config.t_end - config.t_start) * progress
        self.t = min(config.t_end, max(floor, adaptive))

    def state_dict(self) -> dict[str, float]:
        """See `LossState.state_dict`; `previous` is absent before the first update."""
        known = {} if self.previous is None else {"previous": self.previous}
        return {"t": self.t, "momentum": self.momentum} | known

    def load_state_dict(self, values: Mapping[str, float]) -> None:
        """See `LossState.load_state_dict`."""
        self.t, self.momentum, self.previous = values["t"], values["momentum"], values.get("previous")


@loss("taid", TAID)
def taid(predictions: Predictions, config: TAID, state: LossState | None) -> SumAndCount:
    """-sum p_t log q in nats, at the state's t. Raises TypeError for a state that is not the loss's own."""
    if not isinstance(state, Interpolation):
        raise TypeError(f"taid needs the state that its config starts, not {type(state).__name__}")
    student, teacher = shared_logits(predictions)
    target = torch.lerp(student.detach(), teacher, state.t).softmax(-1)
    return over_tokens(-(target * student.log_softmax(-1)).sum(-1))
