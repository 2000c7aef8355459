"""A training whose optimizer state is partitioned by DeepSpeed (ZeRO, arXiv 1910.02054, stages 1 and 2).

Every process has whole models. Of each parameter that trains, it has one piece of the master weights and of the
optimizer's state; in stage 2, of the summed gradient too. A process steps its pieces, then all exchange them.

Parameters train as float32, so the master weights are a copy of a piece of the parameter itself. Parameters may be
clamped or replaced in the models, if the master weights are refreshed from them afterwards. Every parameter is a group
of the optimizer by itself, as `Student.groups` makes them, so that each has a flat piece of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from llmcompress.data.batch import Batch
from llmcompress.distillation.optimizers import moments, put_moments
from llmcompress.distillation.parallel.strategy import Root, Strategy
from llmcompress.distillation.resume import Progress
from llmcompress.models.files.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


class PartitionedStrategy(Strategy):
    """A student under DeepSpeed. Partitioning replaces the parameters of the optimizer by pieces.

    `engine`: deepspeed.DeepSpeedEngine; `pieces`: of each parameter, this process's, flat and padded at the end.
    """

    engine: Any
    pieces: dict[nn.Parameter, nn.Parameter]

    def wrap(self, teacher: PreTrainedModel) -> None:
        """See `Strategy.wrap`."""
        parameters = [group["params"][0] for group in self.optimizer.param_groups]
        self.engine, _ = self.accelerator.prepare(Root(self.objective), self.optimizer)
        pieces = [group["params"][0] for group in self.optimizer.param_groups]
        self.pieces = dict(zip(parameters, pieces, strict=True))

    def measure(self, batch: Batch, weights: list[float]) -> tuple[Tensor, Tensor]:
        """See `Strategy.measure`."""

        def run() -> tuple[Tensor, Tensor]:
            result: tuple[Tensor, Tensor] = self.objective(batch, weights)
            return result

        return run_in_precision(self.engine, self.accelerator.device, run) if torch.is_grad_enabled() else run()

    def backward(self, total: Tensor) -> None:
        """See `Strategy.backward`."""
        self.engine.backward(total * self.accelerator.num_processes, scale_wrt_gas=False)

    def no_sync(self, last: bool) -> AbstractContextManager[None]:
        """See `Strategy.no_sync`."""
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def step(self, most: float) -> float:
        """See `Strategy.step`."""
        self.engine.optimizer.clip_grad = most
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def update(self, done: float) -> dict[str, int]:
        """See `Strategy.update`."""
        counts = super().update(done)
        self.engine.optimizer.refresh_fp32_params()
        return counts

    def load(self, store: Store) -> Progress:
        """See `Strategy.load`."""
        progress = super().load(store)
        self.engine.optimizer.refresh_fp32_params()
        return progress

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """See `Strategy.moments`."""
        if parameter not in self.pieces:  # as scales that follow their latents
            return moments(self.optimizer, parameter)
        pieces = moments(self.optimizer, self.pieces[parameter]).items()
        return {key: gather_piece(self.accelerator, value, parameter) if value.ndim else value for key, value in pieces}

    def put_moments(self, parameter: nn.Parameter, saved: dict[str, Tensor]) -> None:
        """See `Strategy.put_moments`."""
        if parameter not in self.pieces:
            put_moments(self.optimizer, parameter, saved)
            return
        piece = self.pieces[parameter]
        pieces = {
            key: take_piece(self.accelerator, value, piece.numel()) if value.ndim else value
            for key, value in saved.items()
        }
        put_moments(self.optimizer, piece, pieces)

    def gather(self) -> None:
        """See `Strategy.gather`: DeepSpeed releases the parameters, so that another training may begin."""
        self.accelerator.free_memory()


def run_in_precision(engine: Callable[[Callable[[], T]], T], device: torch.device, run: Callable[[], T]) -> T:
    """Return the result of `run` by `engine`, which ends an autocast that it did not start, in the current
    precision."""
    on, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)

    def run_under_autocast() -> T:
        with torch.autocast(device.type, dtype, enabled=on):
            return run()

    return engine(run_under_autocast)


def gather_piece(accelerator: Accelerator, piece: Tensor, parameter: nn.Parameter) -> Tensor:
    """Gather the flat pieces of all processes into the whole, in the shape of `parameter`."""
    joined: Tensor = accelerator.gather(piece)
    return joined[: parameter.numel()].view_as(parameter)


def take_piece(accelerator: Accelerator, whole: Tensor, size: int) -> Tensor:
    """Return this process's piece, of `size` numbers, of a whole tensor: the inverse of `gather_piece`."""
    padded = nn.functional.pad(whole.flatten(), (0, size * accelerator.num_processes - whole.numel()))
    return padded[size * accelerator.process_index :][:size]
