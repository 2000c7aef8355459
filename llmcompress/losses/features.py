"""Losses on hidden states, beside those on predictions: their input and their registry.

The training loop matches the layers of the two models and projects them where their widths differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from llmcompress.losses.loss import LossConfig, SumAndCount, known_name, loss_config, losses


@dataclass(frozen=True)
class Features:
    """The same positions in two matched layers. Only positions in `keep` count; without it, all do."""

    student: Tensor  # [tokens, width] or [sequences, length, width], with grad
    teacher: Tensor  # the same but for its own width, without grad
    keep: Tensor | None = None  # bool [tokens] or [sequences, length], true = counts


@dataclass(frozen=True)
class FeatureLoss:
    """A registered loss on hidden states: `run(features, config) -> (sum, count)`."""

    name: str
    config: type[LossConfig]
    run: Callable[[Features, Any], SumAndCount]


_FEATURE_LOSSES: dict[str, FeatureLoss] = {}
Run = TypeVar("Run", bound=Callable[..., SumAndCount])


def feature_loss(name: str, config: type[LossConfig]) -> Callable[[Run], Run]:
    """Registers a function `(features, config) -> (sum, count)` under `name`."""

    def register(run: Run) -> Run:
        _FEATURE_LOSSES[name] = FeatureLoss(name, config, run)
        return run

    return register


def feature_losses() -> dict[str, FeatureLoss]:
    """Every registered loss on hidden states by name."""
    return dict(_FEATURE_LOSSES)


def feature_loss_config(arguments: dict[str, Any]) -> LossConfig:
    """A loss as a recipe spells it: `loss` and that loss's arguments. Raises ValueError for an unknown loss."""
    return _FEATURE_LOSSES[known_name(arguments, _FEATURE_LOSSES)].config(**arguments)


def any_loss_config(arguments: dict[str, Any]) -> LossConfig:
    """A loss on predictions or on hidden states, as a recipe spells it. Raises ValueError for an unknown loss."""
    known = {**losses(), **feature_losses()}
    return (feature_loss_config if known_name(arguments, known) in _FEATURE_LOSSES else loss_config)(arguments)


def reads_states(config: LossConfig) -> bool:
    """True if a loss is on hidden states."""
    return config.loss in _FEATURE_LOSSES


def measure_features(features: Features, config: LossConfig) -> SumAndCount:
    """The sum (float32, or float64 for float64 states; with grad) and the count (the same dtype) of one layer."""
    return _FEATURE_LOSSES[config.loss].run(features, config)
