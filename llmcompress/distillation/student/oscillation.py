"""Codes that oscillate while they train, and their freezing (arXiv 2203.11086, 2302.02210).

A latent whose best value lies near the edge of its cell is pushed over it and back, step after step. Its code changes
as long as training lasts, which is noise to all others, and its final value is left to chance. So each code has, after
every step of the optimizer:

    turned     it changed, and the other way than it did the last time
    frequency  moving average of having turned
    mean       moving average of the code

A code whose frequency is above a threshold is frozen at its rounded mean. Its latent stays there, and its gradient no
longer counts, not even in the norm that is clipped. The threshold falls along half a cosine, so that codes may search
at first. The history takes 11 bytes a code, in the run's state too.

All this follows arXiv 2203.11086. 2302.02210 instead freezes the codes far from an edge while those near it train on;
of it, `median_scales` has the scales that are not parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmcompress.recipe.sections import Freezing
from llmcompress.weight.trainable.relax import RelaxedModule, RelaxedWeight
from llmcompress.weight.trainable.straight_through import nearest_codes


@dataclass(frozen=True, eq=False)
class History:
    """The history of codes: tensors of the shape of their latents."""

    codes: Tensor  # uint8
    direction: Tensor  # int8: of the last change, -1 or 1; 0 before there was one
    frequency: Tensor  # float32
    mean: Tensor  # float32
    frozen: Tensor  # bool

    @staticmethod
    def of(latents: Tensor, codes: Tensor) -> History:
        """Start the history of codes that have not changed yet; sharded if `latents` are. `codes`: this process's."""
        history = History(
            torch.zeros_like(latents, dtype=torch.uint8),
            torch.zeros_like(latents, dtype=torch.int8),
            torch.zeros_like(latents),
            torch.zeros_like(latents),
            torch.zeros_like(latents, dtype=torch.bool),
        )
        _local(history.codes).copy_(codes)
        _local(history.mean).copy_(codes)
        return history

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def local(self) -> History:
        """Return the part of this process, in the same memory."""
        return History(*map(_local, self.tensors().values()))

    def take(self, after: History) -> None:
        """Overwrite this process's part with `after`."""
        for name, value in after.tensors().items():
            _local(getattr(self, name)).copy_(value)


def after_step(before: History, codes: Tensor, momentum: float, threshold: float) -> tuple[History, Tensor]:
    """Return the history of codes that are now `codes` (whole numbers, float32), and bool, True if the code turned.

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
    return History(codes.to(torch.uint8), direction, frequency, mean, settled), turned


@dataclass(frozen=True, eq=False)
class WatchedCodes:
    """The codes of one parameter of a student, `name`, which is `key` in its layer."""

    name: str
    relaxed: RelaxedWeight
    key: str
    history: History

    @property
    def parameter(self) -> nn.Parameter:
        """The latents."""
        return self.relaxed.get_parameter(self.key)


@dataclass(frozen=True, eq=False)
class Freezer:
    """Watches all codes of a student that train, and freezes those that oscillate; without `settings`, none."""

    settings: Freezing | None
    watched: tuple[WatchedCodes, ...]

    @staticmethod
    @torch.no_grad()
    def of(settings: Freezing | None, layers: Mapping[str, RelaxedModule]) -> Freezer:
        """Watch the layers of a student, by name, as its process holds them: whole, or in shares."""
        watched = []
        for name, layer in layers.items() if settings is not None else ():
            for key in layer.relaxed.levels:
                latents = layer.relaxed.get_parameter(key).detach()
                history = History.of(latents, _codes(layer.relaxed, key))
                watched.append(WatchedCodes(f"{name}.relaxed.{key}", layer.relaxed, key, history))
        return Freezer(settings, tuple(watched))

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the history by the name of the parameter, to be saved and restored in place."""
        return {each.name: each.history.tensors() for each in self.watched}

    @torch.no_grad()
    def hold(self) -> None:
        """Remove the gradients of frozen codes; call this before gradients are clipped."""
        for each in self.watched:
            if each.parameter.grad is not None:
                _local(each.parameter.grad).masked_fill_(_local(each.history.frozen), 0.0)

    @torch.no_grad()
    def watch(self, done: float) -> Tensor:
        """Update the history after a step, when a share `done` of all steps is done, and freeze oscillating codes.

        Returns how many of this process's codes changed, how many of these turned, and how many are frozen, int64
        `[3]`, on the codes' device.
        """
        if self.settings is None or not self.watched:
            return torch.zeros(3, dtype=torch.int64)
        threshold, counts = self.settings.threshold_at(done), []
        for each in self.watched:
            latents, before = _local(each.parameter), each.history.local()
            after, turned = after_step(before, _codes(each.relaxed, each.key), self.settings.momentum, threshold)
            counts.append(torch.stack([(after.codes != before.codes).sum(), turned.sum(), after.frozen.sum()]))
            latents.copy_(torch.where(after.frozen, after.codes.to(latents.dtype), latents))
            each.history.take(after)
        return torch.stack(counts).sum(0)

    def count_frozen(self) -> int:
        """Return the number of this process's codes that are frozen."""
        return sum(int(_local(each.history.frozen).sum()) for each in self.watched)


def _codes(relaxed: RelaxedWeight, key: str) -> Tensor:
    """Return the codes of this process's latents, float32."""
    latents = _local(relaxed.get_parameter(key).detach())
    return nearest_codes(latents, relaxed.levels[key], relaxed.relaxation.estimator)


def _local(value: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, in the same memory."""
    return value.to_local() if isinstance(value, DTensor) else value
