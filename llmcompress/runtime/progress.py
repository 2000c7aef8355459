"""Progress of work deep in the library: logged, and shown by a command as a stage or as a part of one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

LOG = logging.getLogger("llmcompress")
PIECE = 1 << 24  # bytes of a file that are read at a time


def count_steps(counted: str, total: int) -> Callable[[], None]:
    """Return a function to be called after each of `total` steps; it logs how many are done, at INFO, 0 at once.

    `counted`: what is done in a step, such as "gradient". The record's `progress` is (counted, done, total). A total of
    1 is a stage of which no part can be counted.
    """
    done = -1

    def step() -> None:
        nonlocal done
        done += 1
        LOG.info("%s %d/%d", counted, done, total, extra={"progress": (counted, done, total)})

    step()
    return step


def count_each(items: Collection[T], counted: str) -> Iterator[T]:
    """Yield the items, and count each as a step once the caller is done with it."""
    step = count_steps(counted, len(items))
    for item in items:
        yield item
        step()


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal. Raises OSError."""
    digest = sha256()
    with path.open("rb") as file:
        step = count_steps(f"digest of {path.name}", -(-path.stat().st_size // PIECE))
        while piece := file.read(PIECE):
            digest.update(piece)
            step()
    return digest.hexdigest()
