"""Several processes that score one model together, as `accelerate launch` starts them: each does its share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from llmcompress.runtime.devices import check_each, kind_of

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among `count`, of which it is number `rank`, and the device that it computes on.

    `accelerator` is None for a process that is alone.
    """

    device: str = "cpu"
    accelerator: Accelerator | None = None

    @property
    def rank(self) -> int:
        """0 for the one that prints and saves."""
        return 0 if self.accelerator is None else int(self.accelerator.process_index)

    @property
    def count(self) -> int:
        """The number of processes."""
        return 1 if self.accelerator is None else int(self.accelerator.num_processes)

    def share(self, items: Tensor) -> Tensor:
        """Return the rows `[at most n, ...]` of `items [n, ...]` that are this process's to do."""
        return items.tensor_split(self.count)[self.rank]

    def gathered(self, values: list[T]) -> list[T]:
        """Return the findings of all processes in the order of the items; every process has to call this."""
        if self.accelerator is None:
            return values
        from accelerate.utils import gather_object

        together: list[T] = gather_object(values)
        return together


ALONE = Processes()


@contextmanager
def launched(device: str) -> Iterator[Processes]:
    """The processes that a launcher started, each with a device of the kind of `device`; without one, this process.

    Raises RecipeError where there is no such device, or not one for each of them.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(device)
        return
    place = kind_of(device, count)
    from accelerate import Accelerator, InitProcessGroupKwargs, PartialState

    patience = InitProcessGroupKwargs(timeout=timedelta(weeks=52))  # as lm-eval: some shares take hours longer
    accelerator = Accelerator(cpu=place.type == "cpu", kwargs_handlers=[patience])
    check_each(accelerator.num_processes, count, device)
    try:
        yield Processes(str(accelerator.device), accelerator)
    finally:
        PartialState().destroy_process_group()
