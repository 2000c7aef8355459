"""Progress of work deep in the library: logged, and shown by a command as a stage of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable

LOG = logging.getLogger("llmcompress")


def count_steps(counted: str, total: int) -> Callable[[], None]:
    """Return a function to be called after each of `total` steps; it logs how many are done, at INFO.

    `counted`: what is done in a step, such as "gradient". The record's `progress` is (counted, done, total).
    """
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        LOG.info("%s %d/%d", counted, done, total, extra={"progress": (counted, done, total)})

    return step
