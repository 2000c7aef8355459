"""Codes that oscillate while they train, and their freezing (arXiv 2203.11086, 2302.02210).

A latent whose best value lies near the edge of its cell is pushed over it and back, step after step. Its code changes
as long as training lasts, which is noise to all others, and its final value is left to chance. So after every step of
the optimizer, each code has:

    turned     it changed, and the other way than it did the last time
    frequency  moving average of having turned
    mean       moving average of the code

A code whose frequency is above a threshold is frozen at its rounded mean. Its latent stays there, and its gradient no
longer counts, not even in the norm that is clipped. The threshold falls along half a cosine, so that codes may search
at first. This memory takes 11 bytes a code, in the run's state too.

All this follows arXiv 2203.11086. 2302.02210 instead freezes the codes far from an edge while those near it train on;
of it, only the scales that are not parameters are here, as medians (`median_scales`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmcompress.recipe.sections import Freezing
from llmcompress.weight.trainable.relax import RelaxedModule, RelaxedWeight
from llmcompress.weight.trainable.straight_through import nearest_codes


@dataclass(frozen=True, eq=False)
class Habits:
    """The memory of codes: tensors of the shape of their latents."""

    codes: Tensor  # uint8
    direction: Tensor  # int8: of the last change, -1 or 1; 0 before there was one
    frequency: Tensor  # float32
    mean: Tensor  # float32
    frozen: Tensor  # bool

    @staticmethod
    def of(latents: Tensor, codes: Tensor) -> Habits:
        """Start the memory of codes that have not changed yet; sharded if `latents` are. `codes`: this process's."""
        found = Habits(
            torch.zeros_like(latents, dtype=torch.uint8),
            torch.zeros_like(latents, dtype=torch.int8),
            torch.zeros_like(latents),
            torch.zeros_like(latents),
            torch.zeros_like(latents, dtype=torch.bool),
        )
        _here(found.codes).copy_(codes)
        _here(found.mean).copy_(codes)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def here(self) -> Habits:
        """Return the part of this process, in the same memory."""
        return Habits(*map(_here, self.tensors().values()))

    def take(self, after: Habits) -> None:
        """Overwrite this process's part with `after`."""
        for name, value in after.tensors().items():
            _here(getattr(self, name)).copy_(value)


def after_step(before: Habits, codes: Tensor, momentum: float, threshold: float) -> tuple[Habits, Tensor]:
    """Return the habits of codes that are now `codes` (whole numbers, float32), and which of them turned, bool.

    Frozen codes keep their value, whatever they are now; newly frozen ones take their rounded mean.
    """
    codes = torch.where(before.frozen, before.codes.float(), codes)
    change = (codes - before.codes.float()).sign().to(torch.int8)
    turned = change * before.direction < 0
    frequency = before.frequency.lerp(turned.float(), momentum)
    mean = before.mean.lerp(codes, momentum)
    settled = before.frozen | (frequency > threshold)
    codes = torch.where(settled & ~before.frozen, (mean + 0.5).floor(), codes)
    direction = torch.where(change == 0, before.direction, change)
    return Habits(codes.to(torch.uint8), direction, frequency, mean, settled), turned


@dataclass(frozen=True, eq=False)
class Watched:
    """The codes of one parameter of a student, `name`, which is `key` in its layer."""

    name: str
    relaxed: RelaxedWeight
    key: str
    habits: Habits

    def hold(self) -> None:
        """Remove the gradients of frozen codes."""
        gradient = self.relaxed.get_parameter(self.key).grad
        if gradient is not None:
            _here(gradient).masked_fill_(_here(self.habits.frozen), 0.0)

    def watch(self, momentum: float, threshold: float) -> Tensor:
        """Update the habits after a step, and freeze; return how many codes changed, turned and are frozen, int64
        `[3]`."""
        latents, before = _here(self.relaxed.get_parameter(self.key)), self.habits.here()
        after, turned = after_step(before, _codes(self.relaxed, self.key), momentum, threshold)
        counts = torch.stack([(after.codes != before.codes).sum(), turned.sum(), after.frozen.sum()])
        latents.copy_(torch.where(after.frozen, after.codes.to(latents.dtype), latents))
        self.habits.take(after)
        return counts


@dataclass(frozen=True, eq=False)
class Freezer:
    """Watches all codes of a student that train, and freezes those that oscillate; without `asked`, none."""

    asked: Freezing | None
    watched: tuple[Watched, ...]

    @staticmethod
    @torch.no_grad()
    def of(asked: Freezing | None, layers: Mapping[str, RelaxedModule]) -> Freezer:
        """Watch the layers of a student, by name, as its process holds them: whole, or in shares."""
        if asked is None:
            return Freezer(None, ())
        keys = [(name, layer.relaxed, key) for name, layer in layers.items() for key in layer.relaxed.levels]
        return Freezer(
            asked,
            tuple(
                Watched(
                    f"{name}.relaxed.{key}",
                    relaxed,
                    key,
                    Habits.of(relaxed.get_parameter(key).detach(), _codes(relaxed, key)),
                )
                for name, relaxed, key in keys
            ),
        )

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the memory by the name of the parameter, to be saved and restored in place."""
        return {each.name: each.habits.tensors() for each in self.watched}

    @torch.no_grad()
    def hold(self) -> None:
        """Remove the gradients of frozen codes; call this before gradients are clipped."""
        for each in self.watched:
            each.hold()

    @torch.no_grad()
    def watch(self, done: float) -> Tensor:
        """Update the habits after a step, when a share `done` of all steps is done, and freeze oscillating codes.

        Returns how many of this process's codes changed, how many of these turned, and how many are frozen, int64
        `[3]`, on the codes' device.
        """
        if self.asked is None or not self.watched:
            return torch.zeros(3, dtype=torch.int64)
        threshold = self.asked.threshold_at(done)
        return torch.stack([each.watch(self.asked.momentum, threshold) for each in self.watched]).sum(0)

    def frozen(self) -> int:
        """Return the number of this process's codes that are frozen."""
        return sum(int(_here(each.habits.frozen).sum()) for each in self.watched)


def _codes(relaxed: RelaxedWeight, key: str) -> Tensor:
    """Return the codes of this process's latents, float32."""
    latents = _here(relaxed.get_parameter(key).detach())
    return nearest_codes(latents, relaxed.levels[key], relaxed.relaxation.estimator)


def _here(value: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, in the same memory."""
    return value.to_local() if isinstance(value, DTensor) else value
