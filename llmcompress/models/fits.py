"""The check that models fit into a machine's memory, before they are loaded."""

from __future__ import annotations

from collections.abc import Sequence

from llmcompress.errors import MemoryLimitError
from llmcompress.models.dense import check_outline
from llmcompress.models.locate import Place
from llmcompress.runtime.memory import total_memory

FLOAT32 = 4  # bytes of a weight


def check_fits(places: Sequence[Place], device: str, doing: str) -> None:
    """Raise MemoryLimitError if these models, whole and in float32, are more than the machine's memory.

    A compressed one counts its weights too: it is decoded while it is scored. `doing` is the beginning of the sentence.
    """
    if device != "cpu":
        return
    there = total_memory()
    sizes = {place.name: FLOAT32 * check_outline(place)[1] for place in places}
    if sum(sizes.values()) > there:
        held = " and ".join(f"{name} ({size / 1e9:.1f} GB)" for name, size in sizes.items())
        raise MemoryLimitError(
            f"{doing} holds {held} in float32, and this machine has {there / 1e9:.1f} GB; take a larger machine, or a "
            f"device with --device"
        )
