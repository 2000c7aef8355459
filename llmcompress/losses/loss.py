"""Losses of distillation: their interface and their registry.

A loss is separable over tokens: the sums and counts of the parts of any split add up to those of the whole. The
training loop adds them over micro-batches and processes and divides once, so no mean of means can arise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

Reads = Literal["whole", "merged", "nothing"]


@dataclass(frozen=True)
class Predictions:
    """Aligned logits: row i of both models predicts `targets[i]`; positions that do not count are left out already."""

    student: Tensor  # [tokens, vocabulary], with grad
    teacher: Tensor  # [tokens, vocabulary], without
    targets: Tensor  # int64 [tokens]


class LossState(Protocol):
    """State that a loss carries from step to step. It goes into the training checkpoint."""

    def update(self, mean: float, progress: float) -> None:
        """Follow an optimizer step: this loss's sum / count over all processes, and the share of steps done."""

    def state_dict(self) -> dict[str, float]:
        """Return the whole state, for a checkpoint."""

    def load_state_dict(self, values: Mapping[str, float]) -> None:
        """The inverse of `state_dict`. Raises KeyError where a value is missing."""


class LossConfig(BaseModel):
    """A loss's arguments, as a recipe spells them. `examples` feed the conformance suite."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    loss: str
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    @property
    def counts_tokens(self) -> bool:
        """True if the count is the number of tokens; else it is a sum of weights, known once the loss is computed."""
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
        """The state before the first step; None for a loss that has none."""
        return None


SumAndCount = tuple[Tensor, Tensor]  # scalars: with grad; without


@dataclass(frozen=True)
class Loss:
    """A registered loss: `run(predictions, config, state) -> (sum, count)`."""

    name: str
    config: type[LossConfig]
    run: Callable[[Predictions, Any, Any], SumAndCount]


_LOSSES: dict[str, Loss] = {}
Run = TypeVar("Run", bound=Callable[..., SumAndCount])


def loss(name: str, config: type[LossConfig]) -> Callable[[Run], Run]:
    """Registers a function `(predictions, config, state) -> (sum, count)` under `name`."""

    def register(run: Run) -> Run:
        _LOSSES[name] = Loss(name, config, run)
        return run

    return register


def losses() -> dict[str, Loss]:
    """Every registered loss on logits by name."""
    return dict(_LOSSES)


def loss_config(arguments: dict[str, Any]) -> LossConfig:
    """A loss as a recipe spells it: `loss` and that loss's arguments. Raises ValueError for an unknown loss."""
    return _LOSSES[known_name(arguments, _LOSSES)].config(**arguments)


def measure(predictions: Predictions, config: LossConfig, state: LossState | None = None) -> SumAndCount:
    """The sum over tokens (float32, or float64 for float64 logits; with grad) and the count (the same dtype)."""
    return _LOSSES[config.loss].run(predictions, config, state)


def known_name(arguments: dict[str, Any], known: Mapping[str, object]) -> str:
    """The `loss` that the arguments name. Raises ValueError for one that is not in `known`."""
    name = arguments.get("loss")
    if not isinstance(name, str) or name not in known:
        near = get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
        raise ValueError(f"unknown loss {name!r}; {hint}")
    return name
