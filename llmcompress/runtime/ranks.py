"""The processes that a launcher started for one command: the number of this one, and exchanges between all of them.

Torchrun and `accelerate launch` describe them in environment variables. Processes exchange values through the host's
memory (gloo), on GPUs too: the values are small, and the end of a process closes its connections, which is noticed at
once. A single process never uses `torch.distributed`.
"""

from __future__ import annotations

import io
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.serialization import default_restore_location

from llmcompress.errors import EndedError, LLMCompressError, RecipeError, list_names
from llmcompress.runtime.devices import kind_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")

PATIENCE = timedelta(weeks=52)  # some shares take hours longer; the end of a process is noticed without a limit
GATHERING = timedelta(minutes=10)  # for all processes to start
GRACE = 2.0  # seconds for the first process to report an error, before a launcher sees that others have ended
NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # variables that launchers set beside WORLD_SIZE
_MEETINGS = itertools.count()  # of this process: every process has the same ones in the same order


@dataclass(frozen=True)
class Ranks:
    """Number `rank` of `count` processes, `here` of which share its machine; it computes on `device`.

    All processes have to call the methods in the same order.
    """

    device: str = "cpu"
    rank: int = 0
    count: int = 1
    here: int = 1
    group: ProcessGroup | None = field(default=None, repr=False)  # None: the default group

    @property
    def requested_device(self) -> str:
        """The device of the command: a kind, of which each of several processes has its own device."""
        return self.device if self.count == 1 else torch.device(self.device).type

    def share(self, items: Tensor) -> Tensor:
        """Return this process's rows `[at most n, ...]` of `items [n, ...]`."""
        return items.tensor_split(self.count)[self.rank]

    def gather(self, value: T) -> list[T]:
        """Return the value of each process, by rank; tensors on the device of this one, or on the host as they were.

        Raises EndedError if another process has ended.
        """
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        packed: list[Any] = [None] * self.count
        with noticing_ends():
            dist.all_gather_object(packed, _pack(value), group=self.group)
        return [value if rank == self.rank else self._unpack(other) for rank, other in enumerate(packed)]

    def gather_items(self, values: list[T]) -> list[T]:
        """Return the values of all processes in the order of the items that `share` gave them."""
        return [value for part in self.gather(values) for value in part]

    def first(self, find: Callable[[], T]) -> T:
        """Return the result of `find` in the first process, the only one to call it; all raise its error."""
        if self.count == 1:
            return find()
        with self.agree_on_errors():
            own = find() if self.rank == 0 else None
        result: T = self.broadcast(own)
        return result

    def broadcast(self, value: Any) -> Any:
        """Return the `value` of the first process."""
        import torch.distributed as dist

        parcel: list[Any] = [_pack(value) if self.rank == 0 else None]
        with noticing_ends():
            dist.broadcast_object_list(parcel, group_src=0, group=self.group)
        return value if self.rank == 0 else self._unpack(parcel[0])

    def add(self, sums: Tensor) -> None:
        """Replace `sums` by the sum over all processes, the same bits in each of them."""
        if self.count == 1:
            return
        import torch.distributed as dist

        on_host = sums.cpu().contiguous()
        with noticing_ends():
            dist.all_reduce(on_host, group=self.group)
        if on_host is not sums:
            sums.copy_(on_host)

    @contextmanager
    def agree_on_errors(self) -> Iterator[None]:
        """Raise in every process the first error that any of them raised inside."""
        if self.count == 1:
            yield
            return
        own: LLMCompressError | None = None
        try:
            yield
        except EndedError:
            raise
        except LLMCompressError as error:
            own = error
        for failure in self.gather(own):
            if failure is not None:
                failure.reported_elsewhere = self.rank > 0
                raise failure

    def compare(self, values: Mapping[str, Any]) -> None:
        """Raise RecipeError, naming the differences, unless `values` are equal in all processes."""
        everyone = self.gather(dict(values))
        with self.agree_on_errors():
            for rank, other in enumerate(everyone):
                if unlike := [name for name, value in everyone[0].items() if other.get(name) != value]:
                    raise RecipeError(
                        f"process {rank} of {self.count} was started with other {list_names(unlike)} than process 0; "
                        f"start all with the same command, on copies of the same files and with the same versions"
                    )

    def _unpack(self, packed: bytes) -> Any:
        # not only weights: the processes of one command trust each other, as those of every launcher do
        def place(storage: Any, location: str) -> Any:  # what is on the host stays there
            return storage if location == "cpu" else default_restore_location(storage, self.device)

        return torch.load(io.BytesIO(packed), map_location=place, weights_only=False)


ALONE = Ranks()


def process_count() -> int:
    """Return the number of processes that a launcher started for this command; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_count() -> int:
    """Return the number of those processes that share this machine, and its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Connect the processes that a launcher started, each with its own device of the kind of `device`.

    Without a launcher this process is alone. Raises RecipeError if there is no such device, or not one for each
    process, or if not all processes start.
    """
    count = process_count()
    if count == 1:
        yield Ranks(device)
        return
    own = _own_device(device, count)
    if missing := [name for name in NEEDED if name not in os.environ]:
        raise RecipeError(
            f"WORLD_SIZE is {count} but {list_names(missing)} is not set; start the processes by torchrun or "
            f"accelerate launch, or unset WORLD_SIZE"
        )
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    store = _await_all(rank, count)
    joined = dist.is_initialized()
    if joined:
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
    else:
        with noticing_ends():
            dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=PATIENCE)
        group = None
    try:
        yield Ranks(own, rank, count, local_count(), group)
    except LLMCompressError as error:
        if error.reported_elsewhere:
            time.sleep(GRACE)
        raise
    finally:
        dist.destroy_process_group(group)


def _await_all(rank: int, count: int) -> Any:
    """Wait until every process has started, and return their shared store. Raises RecipeError if one does not."""
    from torch.distributed import DistError, PrefixStore, rendezvous

    try:
        shared, _, _ = next(iter(rendezvous("env://", timeout=GATHERING)))
        store = PrefixStore(f"llmcompress/{next(_MEETINGS)}", shared)
        store.set(f"here/{rank}", "")
        store.wait([f"here/{other}" for other in range(count)], GATHERING)
    except (DistError, RuntimeError) as error:
        raise RecipeError(
            f"not all of the {count} processes came within {GATHERING.seconds} seconds; every process that the "
            f"launcher starts has to run the same command"
        ) from error
    return store


def _own_device(name: str, count: int) -> str:
    """Return the device of this process. Raises RecipeError if the machine does not have one for each."""
    kind, local = kind_of(name, count), int(os.environ.get("LOCAL_RANK", "0"))
    if kind.type == "cpu":
        return "cpu"
    devices = getattr(torch, kind.type).device_count()
    if local >= devices:
        raise RecipeError(
            f"process {local} of this machine has no {kind.type} device, of which torch finds {devices}; start one "
            f"process for each"
        )
    return f"{kind.type}:{local}"


@contextmanager
def noticing_ends() -> Iterator[None]:
    """Raise EndedError if a connection to another process fails."""
    try:
        yield
    except RuntimeError as error:  # gloo has no type of its own
        raise EndedError(
            "another process of this run has ended, and so does this one; if it said why, mend that, and run the same "
            "command again"
        ) from error


def _pack(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
