"""The state of a training: what moves, the optimizer's moments, the step. A run resumes from it, to the bit."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from llmcompress.models.files.store import Store
from llmcompress.recipe.distillation import Distillation

STATE = "state"  # the record
SHARE = 0.05  # of the time that writing states may take, if a recipe does not say how often
SOONEST = 10.0  # seconds between states then


@dataclass
class Progress:
    """The progress of a training.

    `targets`: tokens predicted so far; `losses`: the state of each loss, None without one; `shares`, `cursors`: of each
    domain, its part of a step and how many of its sequences were read; `history`: looks at the held-out sequences;
    `frozen`: how many codes are frozen; `factors`: of the losses' weights, if balanced; `written`: sequences that the
    student wrote, by name.
    """

    step: int = 0
    targets: int = 0
    seconds: float = 0.0
    losses: list[dict[str, float] | None] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    cursors: list[int] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    frozen: int | None = None
    factors: list[float] = field(default_factory=list)
    written: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class Saving:
    """The times to save a state. `at`: the time of the last one, or of the start; `took`: the seconds to write it."""

    recipe: Distillation
    at: float = field(default_factory=time.monotonic)
    took: float = 0.0

    def is_due(self, step: int) -> bool:
        """True if a state is due after so many steps."""
        return self.recipe.save_every is not None and step % self.recipe.save_every == 0

    def is_late(self) -> bool:
        """True if a state is due by the clock."""
        wait = 60 * self.recipe.save_minutes
        if self.recipe.save_every is None:
            wait = min(wait, max(SOONEST, self.took * (1 / SHARE - 1)))
        return time.monotonic() - self.at >= wait

    @contextmanager
    def measure_time(self) -> Iterator[None]:
        """Time the writing of a state in the context."""
        began = time.monotonic()
        yield
        self.at = time.monotonic()
        self.took = self.at - began


def save_state(store: Store, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
    """Replace the last state. Raises DiskError if it cannot be written."""
    store.put(STATE, vars(progress), tensors)


def last_state(store: Store) -> tuple[Progress, dict[str, Tensor]]:
    """Return the last state and its tensors, or a new `Progress`. Raises InputError for another run's, or damage."""
    record = store.get(STATE)
    if record is None:
        return Progress(), {}
    try:
        return Progress(**record.entry), record.tensors
    except TypeError as error:
        raise store.damage(error) from error
