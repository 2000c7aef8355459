"""The fewest steps that show that a distillation works."""

from __future__ import annotations

import math
import os
from typing import Any

FEWEST = {"steps": 2, "batch": 4, "micro_batch": 2}


def fewest_steps(*parts: dict[str, Any]) -> dict[str, int]:
    """Return the fewest steps of a recipe, or of a phase and its recipe; a smaller micro_batch stays.

    The batch is one that the processes which a launcher started can share.
    """
    given = [value for part in parts if isinstance(value := part.get("micro_batch"), int)]
    micro_batch = min([FEWEST["micro_batch"], *given[:1]])
    shared = max(1, micro_batch * int(os.environ.get("WORLD_SIZE", "1")))
    return FEWEST | {"batch": shared * math.ceil(FEWEST["batch"] / shared), "micro_batch": micro_batch}
