"""The processes that score one model together, as `accelerate launch` starts them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from llmcompress.runtime.devices import check_each, kind_of
from llmcompress.runtime.ranks import Ranks, local_count, process_count

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Processes(Ranks):
    """Ranks, with the `accelerator` for lm-eval; None for a process that is alone."""

    accelerator: Accelerator | None = None


ALONE = Processes()


@contextmanager
def join_processes(device: str) -> Iterator[Processes]:
    """Yield the processes that a launcher started, each with a device of the kind of `device`; else this one alone.

    Raises RecipeError if there are fewer such devices than processes.
    """
    count = process_count()
    if count == 1:
        yield Processes(device)
        return
    place = kind_of(device, count)
    from accelerate import Accelerator, InitProcessGroupKwargs, PartialState

    patience = InitProcessGroupKwargs(timeout=timedelta(weeks=52))  # as lm-eval: some shares take hours longer
    accelerator = Accelerator(cpu=place.type == "cpu", kwargs_handlers=[patience])
    check_each(accelerator.num_processes, count, device)
    device = "cpu" if place.type == "cpu" else str(accelerator.device)  # accelerate numbers CPUs, torch.load knows none
    try:
        yield Processes(device, accelerator.process_index, count, local_count(), accelerator=accelerator)
    finally:
        PartialState().destroy_process_group()
