"""Shares of sharded models, which the first process gives to all others: it alone has whole models in its memory.

The others need names, shapes and dtypes, and the packed numbers of one layer at a time. So they map the files in the
dtype that these are stored in, which copies nothing, and keep in the place of every value memory that nobody writes to,
which takes none. Accelerate tells parameters apart by their addresses, which rules out the device meta; and its own way
to load on one process (`fsdp_cpu_ram_efficient_loading`) knows no buffers, which hold the packed numbers.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def empty(module: nn.Module) -> None:
    """Replace all parameters and buffers of `module` by memory that was never written to."""
    for value in (*module.parameters(), *module.buffers()):
        value.data = torch.empty(value.shape, dtype=value.dtype)


def taken_whole(accelerator: Accelerator, root: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of `root` by name, whole, in the first process, before they are sharded.

    Elsewhere they become empty, in the dtypes that the first process has, and nothing is returned.
    """
    [dtypes] = broadcast_object_list([{name: value.dtype for name, value in root.named_parameters()}])
    if accelerator.is_main_process:
        return {name: value.detach() for name, value in root.named_parameters()}
    for name, value in root.named_parameters():
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
    for value in root.buffers():
        value.copy_(broadcast(value.clone()))
