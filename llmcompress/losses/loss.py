"""The interface of losses, on predictions and on hidden states, and their registry.

A loss is separable over tokens: sums and counts of the parts of any split add up to those of the whole. The training
loop adds them over micro-batches and processes and divides once, so there is no mean of means. For a loss on hidden
states the loop also matches the blocks of both models, and projects states of unequal widths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from pydantic import BaseModel
from torch import Tensor

Reads = Literal["whole", "merged", "nothing"]


@dataclass(frozen=True)
class Predictions:
    """Aligned logits, without the positions that do not count: row i of both models predicts `targets[i]`."""

    student: Tensor  # [tokens, vocabulary], with grad
    teacher: Tensor  # [tokens, vocabulary], without
    targets: Tensor  # int64 [tokens]


@dataclass(frozen=True)
class Features:
    """The hidden states of two matched layers at the same positions."""

    student: Tensor  # [tokens, width] or [sequences, length, width], with grad
    teacher: Tensor  # the same but for its own width, without grad
    keep: Tensor | None = None  # bool [tokens] or [sequences, length], True if the position counts; None: all do


class LossState(Protocol):
    """State that a loss carries from step to step, and into the state of a run."""

    def update(self, mean: float, progress: float) -> None:
        """Follow an optimizer step. `mean`: sum / count over all processes; `progress`: share of the steps done."""

    def state_dict(self) -> dict[str, float]:
        """Return the whole state."""

    def load_state_dict(self, values: Mapping[str, float]) -> None:
        """The inverse of `state_dict`. Raises KeyError for a missing value."""


class LossConfig(BaseModel, extra="forbid", frozen=True):
    """The arguments of a loss in a recipe. `examples` feed the conformance suite."""

    loss: str
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    @property
    def counts_tokens(self) -> bool:
        """True if the count is the number of tokens, False if it is a sum of weights that the loss computes."""
        return True

    @property
    def needs_one_width(self) -> bool:
        """True if a loss on hidden states requires teacher and student to have the same width."""
        return False

    @property
    def reads_truth(self) -> bool:
        """True if a loss on predictions takes the data's next token for the truth."""
        return False

    def reads(self) -> Reads:
        """The part of the teacher that it reads: whole predictions, those with classes merged into one, or nothing."""
        return "whole"

    def start(self) -> LossState | None:
        """The state before the first step; None for a loss without one."""
        return None


SumAndCount = tuple[Tensor, Tensor]  # scalars: with grad; without


@dataclass(frozen=True)
class Loss:
    """A registered loss. `run`: (predictions, config, state), or (features, config), -> (sum, count)."""

    name: str
    config: type[LossConfig]
    run: Callable[..., SumAndCount]


_LOSSES: dict[str, Loss] = {}
_FEATURE_LOSSES: dict[str, Loss] = {}
Run = TypeVar("Run", bound=Callable[..., SumAndCount])


def loss(name: str, config: type[LossConfig]) -> Callable[[Run], Run]:
    """Registers a loss on predictions: a function `(predictions, config, state) -> (sum, count)`."""

    def register(run: Run) -> Run:
        _LOSSES[name] = Loss(name, config, run)
        return run

    return register


def feature_loss(name: str, config: type[LossConfig]) -> Callable[[Run], Run]:
    """Registers a loss on hidden states: a function `(features, config) -> (sum, count)`."""

    def register(run: Run) -> Run:
        _FEATURE_LOSSES[name] = Loss(name, config, run)
        return run

    return register


def losses() -> dict[str, Loss]:
    """Every registered loss on predictions by name."""
    return dict(_LOSSES)


def feature_losses() -> dict[str, Loss]:
    """Every registered loss on hidden states by name."""
    return dict(_FEATURE_LOSSES)


def loss_config(arguments: dict[str, Any]) -> LossConfig:
    """The config of a loss of either kind, from `loss` and its arguments. Raises ValueError for an unknown loss."""
    known, name = {**_LOSSES, **_FEATURE_LOSSES}, arguments.get("loss")
    if not isinstance(name, str) or name not in known:
        near = get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
        raise ValueError(f"unknown loss {name!r}; {hint}")
    return known[name].config(**arguments)


def reads_states(config: LossConfig) -> bool:
    """True if a loss is on hidden states."""
    return config.loss in _FEATURE_LOSSES


def measure(predictions: Predictions, config: LossConfig, state: LossState | None = None) -> SumAndCount:
    """The sum over tokens, with grad, and the count: float32, or float64 for float64 logits."""
    return _LOSSES[config.loss].run(predictions, config, state)


def measure_features(features: Features, config: LossConfig) -> SumAndCount:
    """The sum over positions of one layer, with grad, and the count: float32, or float64 for float64 states."""
    return _FEATURE_LOSSES[config.loss].run(features, config)
