"""The processes that a launcher started for one command: who this one is, and what all of them agree on.

Torchrun and `accelerate launch` set the environment that says so. Processes talk through the host's memory (gloo), on
GPUs too: what they send is small next to what they compute, and a process that ends is noticed at once, since its
connections close. One process alone never comes near `torch.distributed`.
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

from llmcompress.errors import EndedError, LLMCompressError, RecipeError, listed
from llmcompress.runtime.devices import kind_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")

PATIENCE = timedelta(weeks=52)  # some shares take hours longer; a process that ends is noticed without a limit
GATHERING = timedelta(minutes=10)  # in which all processes have to come
GRACE = 2.0  # seconds that the first process gets to tell an error, before a launcher notices that others have ended
NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # variables that launchers set beside WORLD_SIZE
_MEETINGS = itertools.count()  # of this process: every process has the same ones in the same order


@dataclass(frozen=True)
class Ranks:
    """This process among `count`, of which it is number `rank`, and `here` of which share its machine.

    `device`: where it computes. What the methods below do, every process has to do, in the same order.
    """

    device: str = "cpu"
    rank: int = 0
    count: int = 1
    here: int = 1
    group: ProcessGroup | None = field(default=None, repr=False)  # None: the one that there is

    @property
    def asked(self) -> str:
        """The device that the command was asked for: a kind of which each of several processes has one."""
        return self.device if self.count == 1 else torch.device(self.device).type

    def share(self, items: Tensor) -> Tensor:
        """Return the rows `[at most n, ...]` of `items [n, ...]` that are this process's to do."""
        return items.tensor_split(self.count)[self.rank]

    def everyone(self, value: T) -> list[T]:
        """Return what each process has, by rank; tensors on the device of this one.

        Raises EndedError where another process has ended.
        """
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        with _noticing():
            dist.all_gather_object(found, _packed(value), group=self.group)
        return [value if rank == self.rank else self._unpacked(one) for rank, one in enumerate(found)]

    def gathered(self, values: list[T]) -> list[T]:
        """Return the findings of all processes in the order of the items that were shared out."""
        return [value for part in self.everyone(values) for value in part]

    def first(self, find: Callable[[], T]) -> T:
        """Return what `find` gives in the first process, the only one that calls it; an error there is one in all."""
        if self.count == 1:
            return find()
        with self.agreed():
            own = find() if self.rank == 0 else None
        found: T = self.sent(own)
        return found

    def sent(self, value: Any) -> Any:
        """Return the `value` that the first process has."""
        import torch.distributed as dist

        parcel: list[Any] = [_packed(value) if self.rank == 0 else None]
        with _noticing():
            dist.broadcast_object_list(parcel, group_src=0, group=self.group)
        return value if self.rank == 0 else self._unpacked(parcel[0])

    def add(self, sums: Tensor) -> None:
        """Put the sum over all processes into `sums`, the same bits in each of them."""
        if self.count == 1:
            return
        import torch.distributed as dist

        there = sums.cpu().contiguous()
        with _noticing():
            dist.all_reduce(there, group=self.group)
        if there is not sums:
            sums.copy_(there)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Raise in every process the error that one of them met inside, that of the first of these."""
        if self.count == 1:
            yield
            return
        met: LLMCompressError | None = None
        try:
            yield
        except EndedError:
            raise
        except LLMCompressError as error:
            met = error
        for found in self.everyone(met):
            if found is not None:
                found.told = self.rank > 0
                raise found

    def compare(self, what: Mapping[str, Any]) -> None:
        """Raise RecipeError, naming what is different, unless `what` is equal in all processes."""
        found = self.everyone(dict(what))
        with self.agreed():
            for rank, other in enumerate(found):
                if unlike := [name for name, value in found[0].items() if other.get(name) != value]:
                    raise RecipeError(
                        f"process {rank} of {self.count} was started with other {listed(unlike)} than process 0; start "
                        f"all with the same command, on copies of the same files and with the same versions"
                    )

    def _unpacked(self, packed: bytes) -> Any:
        # not only weights: the processes of one command trust each other, as those of every launcher do
        return torch.load(io.BytesIO(packed), map_location=self.device, weights_only=False)


ALONE = Ranks()


def launched_count() -> int:
    """Return how many processes a launcher has started for this command; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def launched(device: str) -> Iterator[Ranks]:
    """The processes that a launcher started, each with a device of the kind of `device`; without one, this process.

    Raises RecipeError where there is no such device, or not one for each of them, or where they do not all come.
    """
    count = launched_count()
    if count == 1:
        yield Ranks(device)
        return
    here, own = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), _own_device(device, count)
    if missing := [name for name in NEEDED if name not in os.environ]:
        raise RecipeError(
            f"WORLD_SIZE is {count} but {listed(missing)} is not set; start the processes by torchrun or accelerate "
            f"launch, or unset WORLD_SIZE"
        )
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    store = _met(rank, count)
    joined = dist.is_initialized()
    if joined:
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
    else:
        with _noticing():
            dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=PATIENCE)
        group = None
    try:
        yield Ranks(own, rank, count, here, group)
    except LLMCompressError as error:
        if error.told:
            time.sleep(GRACE)
        raise
    finally:
        dist.destroy_process_group(group)


def _met(rank: int, count: int) -> Any:
    """Wait until every process has come, and return the store that they share. Raises RecipeError if one does not."""
    from torch.distributed import DistError, PrefixStore, rendezvous

    try:
        found, _, _ = next(iter(rendezvous("env://", timeout=GATHERING)))
        store = PrefixStore(f"llmcompress/{next(_MEETINGS)}", found)
        store.set(f"here/{rank}", "")
        store.wait([f"here/{other}" for other in range(count)], GATHERING)
    except (DistError, RuntimeError) as error:
        raise RecipeError(
            f"not all of the {count} processes came within {GATHERING.seconds} seconds; every process that the "
            f"launcher starts has to run the same command"
        ) from error
    return store


def _own_device(name: str, count: int) -> str:
    """Return the device of this process. Raises RecipeError where the machine does not have one for each."""
    kind, local = kind_of(name, count), int(os.environ.get("LOCAL_RANK", "0"))
    if kind.type == "cpu":
        return "cpu"
    there = getattr(torch, kind.type).device_count()
    if local >= there:
        raise RecipeError(
            f"process {local} of this machine has no {kind.type} device, of which torch finds {there}; start one "
            f"process for each"
        )
    return f"{kind.type}:{local}"


@contextmanager
def _noticing() -> Iterator[None]:
    """Raise EndedError where a connection to another process fails."""
    try:
        yield
    except RuntimeError as error:  # gloo has no type of its own
        raise EndedError(
            "another process of this run has ended, and so does this one; if it said why, mend that, and run the same "
            "command again"
        ) from error


def _packed(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
