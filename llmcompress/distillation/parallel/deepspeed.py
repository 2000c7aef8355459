"""A training whose optimizer state is partitioned by DeepSpeed (ZeRO, arXiv 1910.02054, stages 1 and 2).

Every process has whole models. Of each parameter that trains, it has one piece of the master weights and of the
optimizer's state; in stage 2, of the summed gradient too. A process steps its piece, then all exchange their pieces.

Parameters train as float32, so the master weights are a copy of a piece of the parameter itself. The parameter can be
clamped or replaced in the models, if the master weights are refreshed from it afterwards. Every parameter is a group of
the optimizer by itself, as `Student.groups` makes them, so that each has a flat piece of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class ZeroPartition:
    """A module under DeepSpeed and its optimizer, which holds the state of `pieces`."""

    accelerator: Accelerator
    engine: Any  # deepspeed.DeepSpeedEngine
    pieces: Mapping[nn.Parameter, nn.Parameter]  # of each parameter this process's, flat, padded at the end of the last

    @staticmethod
    def of(accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer) -> ZeroPartition:
        """Replace the parameters in `optimizer` by pieces; `module`, which runs functions, holds the parameters."""
        parameters = [group["params"][0] for group in optimizer.param_groups]
        engine, _ = accelerator.prepare(module, optimizer)
        pieces = [group["params"][0] for group in optimizer.param_groups]
        return ZeroPartition(accelerator, engine, dict(zip(parameters, pieces, strict=True)))

    def forward(self, run: Callable[[], T]) -> T:
        """Return the result of `run`, with gradient if that is on, in the current precision."""
        if not torch.is_grad_enabled():
            return run()
        device = self.accelerator.device.type
        on, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

        def precisely() -> T:  # DeepSpeed ends an autocast that it was not told of
            with torch.autocast(device, dtype, enabled=on):
                return run()

        found: T = self.engine(precisely)
        return found

    def no_sync(self, last: bool) -> None:
        """Set whether the next backward is the last one before a step."""
        self.engine.set_gradient_accumulation_boundary(last)

    def backward(self, total: Tensor) -> None:
        """Add the gradients of `total`, averaged over processes."""
        self.engine.backward(total, scale_wrt_gas=False)

    def step(self, most: float) -> float:
        """Step the optimizer as `Engine.step` does."""
        self.engine.optimizer.clip_grad = most
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def take_up(self) -> None:
        """Refresh the master weights from the module, which is equal in all processes."""
        self.engine.optimizer.refresh_fp32_params()

    def whole(self, piece: Tensor, parameter: nn.Parameter) -> Tensor:
        """Gather the flat pieces of all processes into the whole, in the shape of `parameter`."""
        joined: Tensor = self.accelerator.gather(piece)
        return joined[: parameter.numel()].view_as(parameter)

    def piece(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        """Return this process's piece of a whole tensor: the inverse of `whole`."""
        size = self.pieces[parameter].numel()
        padded = nn.functional.pad(whole.flatten(), (0, size * self.accelerator.num_processes - whole.numel()))
        return padded[size * self.accelerator.process_index :][:size]

    def end(self) -> None:
        """Release the parameters from DeepSpeed after the last step, so that another training may begin."""
        self.accelerator.free_memory()
