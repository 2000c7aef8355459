"""Sharded models (FSDP2): every process has a share of each parameter, of the student, of the frozen teacher, and of
the optimizer's state.

Decoder blocks are gathered one at a time while they run. Parameters outside of blocks (tables, last norms, heads) are
gathered for the length of a forward and its backward, so that heads can be used in any way. Buffers are not shared out:
the packed numbers of a relaxed layer that do not train are in every process, at the bits they are stored with, and so
is a compressed head, decoded.

The first process alone reads whole models, into the host's memory, and gives the others their shares. These need names,
shapes and dtypes, and the packed numbers of one layer at a time. So they map the files in the stored dtype, which
copies nothing, and replace a relaxed layer's values by a zero at once. Before models are sharded, memory that nobody
writes to stands for every value. Accelerate tells parameters apart by their addresses, which rules out the device meta,
and its own way to load in one process (`fsdp_cpu_ram_efficient_loading`) leaves out buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from llmcompress.data.batch import Batch
from llmcompress.distillation.parallel.launch import receives_shares
from llmcompress.distillation.parallel.strategy import Root, Strategy, full_tensor
from llmcompress.distillation.student.model import PROJECTIONS
from llmcompress.models.dense.experts import experts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


class ShardedStrategy(Strategy):
    """A student whose models are sharded. Sharding replaces their parameters, and those of the optimizer."""

    def wrap(self, teacher: PreTrainedModel) -> None:
        """See `Strategy.wrap`."""
        self.root = Root(self.objective, teacher)
        whole = take_whole(self.accelerator, self.root)
        self.accelerator.prepare(self.root, self.optimizer)
        if experts_of(self.student.model):  # or a gradient would be added to that of another process's expert
            cast(FSDPModule, self.root).set_reduce_scatter_unused_params(True)
        share_out(self.accelerator, self.root, whole)
        self.student.rebind_parameters()

    def evaluate(self, run: Callable[[], T]) -> T:
        """See `Strategy.evaluate`."""
        with torch.no_grad():
            result: T = self.root(run)
        cast(FSDPModule, self.root).reshard()
        return result

    def measure(self, batch: Batch, weights: list[float]) -> tuple[Tensor, Tensor]:
        """See `Strategy.measure`."""
        return cast(tuple[Tensor, Tensor], self.root(lambda: self.objective(batch, weights)))

    def no_sync(self, last: bool) -> AbstractContextManager[None]:
        """See `Strategy.no_sync`."""
        cast(FSDPModule, self.root).set_requires_gradient_sync(last)
        return nullcontext()

    def sum_counts(self, counts: Tensor) -> Tensor:
        """See `Strategy.sum_counts`."""
        total: Tensor = self.accelerator.reduce(counts.to(self.accelerator.device), "sum")
        return total

    def gather(self) -> None:
        """See `Strategy.gather`: in the host's memory of the first process, and zeros elsewhere.

        Sharded models cannot run any more afterwards.
        """
        student = self.student
        trained = [name for kind, values in student.trained.items() if kind != PROJECTIONS for name in values]
        inside = tuple(f"{name}." for name in student.relaxed)
        frozen = [name for name, _ in student.model.named_parameters() if name.startswith(inside)]
        for name in dict.fromkeys([*trained, *frozen]):
            value = full_tensor(student.model.get_parameter(name).detach())
            holder, _, leaf = name.rpartition(".")
            empty = receives_shares(self.accelerator)
            whole = torch.zeros(value.shape, dtype=value.dtype) if empty else value.cpu()
            parameter = nn.Parameter(whole, requires_grad=False)
            student.model.get_submodule(holder).register_parameter(leaf, parameter)
        for module in student.relaxed.values():
            module.cpu()
        student.rebind_parameters()


def drop_values(module: nn.Module) -> None:
    """Replace the values of all parameters and buffers of `module` by one zero for each, repeated in its shape."""
    for value in (*module.parameters(), *module.buffers()):
        value.data = torch.zeros((), dtype=value.dtype).expand(value.shape)


def take_whole(accelerator: Accelerator, root: nn.Module) -> dict[str, Tensor]:
    """Return in the first process the parameters of `root` by name, whole, before they are sharded.

    Elsewhere, make all values empty memory, in the dtypes of the first process, and return nothing.
    """
    values = {**dict(root.named_parameters()), **dict(root.named_buffers())}
    [dtypes] = broadcast_object_list([{name: value.dtype for name, value in values.items()}])
    if accelerator.is_main_process:
        return {name: value.detach() for name, value in root.named_parameters()}
    for name, value in values.items():
        value.data = torch.empty(value.shape, dtype=dtypes[name])
    return {}


@torch.no_grad()
def share_out(accelerator: Accelerator, root: nn.Module, whole: dict[str, Tensor]) -> None:
    """Give every process its shares of the `whole` parameters, which the first one has and this empties, and all
    buffers."""
    for name, value in root.named_parameters():
        if isinstance(value, DTensor) and value.numel():
            device = value.device_mesh.device_type
            given = whole.pop(name) if whole else torch.empty(value.shape, dtype=value.dtype, device=device)
            value.copy_(distribute_tensor(given.to(device), value.device_mesh, value.placements, src_data_rank=0))
    for buffer in root.buffers():
        if buffer.numel():
            buffer.copy_(broadcast(buffer.clone()))
