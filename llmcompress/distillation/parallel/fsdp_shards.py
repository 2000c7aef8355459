"""Shares of sharded models, which the first process gives to all others: it alone has whole models in its memory.

The others need names, shapes and dtypes, and the packed numbers of one layer at a time. So they map the files in the
dtype that these are stored in, which copies nothing. What they make of a layer shrinks to a zero at once, and before
models are sharded, memory that nobody writes to stands for every value, and takes none. Accelerate tells parameters
apart by their addresses, which rules out the device meta; and its own way to load in one process
(`fsdp_cpu_ram_efficient_loading`) knows no buffers, which hold the packed numbers.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def shrink(module: nn.Module) -> None:
    """Replace the values of all parameters and buffers of `module` by one zero for each, repeated in its shape."""
    for value in (*module.parameters(), *module.buffers()):
        value.data = torch.zeros((), dtype=value.dtype).expand(value.shape)


def taken_whole(accelerator: Accelerator, root: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of `root` by name, whole, in the first process, before they are sharded.

    Elsewhere all values become empty memory, in the dtypes that the first process has, and nothing is returned.
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
    """Give every process its shares of the `whole` parameters, which only the first one has, and all buffers.

    Takes them out of `whole` one by one.
    """
    for name, value in root.named_parameters():
        if isinstance(value, DTensor) and value.numel():
            device = value.device_mesh.device_type
            given = whole.pop(name) if whole else torch.empty(value.shape, dtype=value.dtype, device=device)
            value.copy_(distribute_tensor(given.to(device), value.device_mesh, value.placements, src_data_rank=0))
    for buffer in root.buffers():
        if buffer.numel():
            buffer.copy_(broadcast(buffer.clone()))
