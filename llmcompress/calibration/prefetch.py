"""A block's tensors, read from the disk by a thread while the block before it is compressed; never more than one ahead.

On a GPU, compressing leaves the host idle. They lie in pinned memory there, from which a GPU copies fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.models.dense.model import DenseModel

Read = Callable[[str], Tensor]


@dataclass(eq=False)
class Ahead:
    """The tensors of one block, being read or read. `pool`: of one thread, None to read nothing ahead."""

    source: DenseModel
    pool: ThreadPoolExecutor | None
    pinned: bool
    waiting: Future[dict[str, Tensor]] | None = None

    def start(self, names: Sequence[str]) -> None:
        """Read these tensors ahead. Raises ValueError where others wait to be taken."""
        if self.waiting is not None:
            raise ValueError("a block that was read ahead was not taken; take it first")
        if self.pool is not None:
            self.waiting = self.pool.submit(self._all, list(names))

    def take(self) -> Read:
        """Return a function that gives each tensor that was read ahead once, and reads all others. Raises what reading
        ahead has raised."""
        waiting, self.waiting = self.waiting, None
        found = {} if waiting is None else waiting.result()
        return lambda name: found.pop(name) if name in found else self.source.read(name)

    def _all(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self._kept(self.source.read(name)) for name in names}

    def _kept(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.pinned else tensor


@contextmanager
def reading_ahead(source: DenseModel, device: torch.device, wanted: bool | None = None) -> Iterator[Ahead]:
    """Yield what reads ahead while the context lasts; `wanted`: true to do so, None to do so for a CUDA device."""
    if not (device.type == "cuda" if wanted is None else wanted):
        yield Ahead(source, None, False)
        return
    with ThreadPoolExecutor(1) as pool:
        yield Ahead(source, pool, device.type == "cuda")
