"""The optimizer's part of a training in shares, by DeepSpeed (ZeRO, arXiv 1910.02054, stages 1 and 2).

Every process has whole models, and of each parameter that trains one piece of its master and of what the optimizer
remembers of it; in stage 2 of its summed gradient too. A process steps its piece, and all then exchange the pieces.

Parameters train as float32, so a master is the piece of the parameter itself, copied: it can be confined or replaced in
the models, if masters then take up what stands there. Every parameter is an optimizer's group by itself, as
`Student.groups` makes them, so that each has a flat piece of its own.
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
    """A module under DeepSpeed and its optimizer, whose state is that of `pieces`."""

    accelerator: Accelerator
    engine: Any  # deepspeed.DeepSpeedEngine
    pieces: Mapping[nn.Parameter, nn.Parameter]  # of each parameter this process's, flat, padded at the end of the last

    @staticmethod
    def of(accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer) -> ZeroPartition:
        """Puts pieces of the parameters in their place in `optimizer`; `module`, which runs functions, holds them."""
        parameters = [group["params"][0] for group in optimizer.param_groups]
        engine, _ = accelerator.prepare(module, optimizer)
        pieces = [group["params"][0] for group in optimizer.param_groups]
        return ZeroPartition(accelerator, engine, dict(zip(parameters, pieces, strict=True)))

    def forward(self, run: Callable[[], T]) -> T:
        """What `run` returns, with gradient where that is on, in the precision at hand."""
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
        """Says whether the next backward is the last one before a step."""
        self.engine.set_gradient_accumulation_boundary(last)

    def backward(self, total: Tensor) -> None:
        """Adds the gradients of `total`, averaged over processes."""
        self.engine.backward(total, scale_wrt_gas=False)

    def step(self, most: float) -> float:
        """See `Engine.step`, which this is."""
        self.engine.optimizer.clip_grad = most
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def take_up(self) -> None:
        """Lets the masters be what stands in the module, in all processes the same."""
        self.engine.optimizer.refresh_fp32_params()

    def whole(self, piece: Tensor, parameter: nn.Parameter) -> Tensor:
        """From all processes' pieces of what belongs to `parameter`, flat: the whole, in its shape."""
        joined: Tensor = self.accelerator.gather(piece)
        return joined[: parameter.numel()].view_as(parameter)

    def piece(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        """The inverse of `whole`: what this process holds of it."""
        size = self.pieces[parameter].numel()
        padded = nn.functional.pad(whole.flatten(), (0, size * self.accelerator.num_processes - whole.numel()))
        return padded[size * self.accelerator.process_index :][:size]

    def end(self) -> None:
        """After the last step: DeepSpeed lets go of the parameters, and another training may begin."""
        self.accelerator.free_memory()
