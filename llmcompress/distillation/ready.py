"""The requirements of a distillation: packages before it starts, memory while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llmcompress.distillation.metrics import check_trackers
from llmcompress.distillation.optimizers import check_optimizer
from llmcompress.distillation.packages import check_bitsandbytes
from llmcompress.errors import MemoryLimitError, is_out_of_memory
from llmcompress.recipe.distillation import Distillation


def check_ready(recipe: Distillation, device: str) -> None:
    """Raise RecipeError if the recipe requires something that is not installed or that `device` cannot do."""
    check_trackers(recipe.trackers)
    check_optimizer(recipe, torch.device(device))
    if recipe.teacher.bits is not None:
        check_bitsandbytes(f"teacher: {{bits: {recipe.teacher.bits}}}")


@contextmanager
def memory_advice(recipe: Distillation) -> Iterator[None]:
    """Turn an out-of-memory error into a MemoryLimitError that names the settings that help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        ways = [
            f"a micro_batch below {recipe.micro_batch}" if recipe.micro_batch > 1 else "",
            "" if recipe.checkpointing else "checkpointing: true",
            "a lower data.length",
        ]
        raise MemoryLimitError(
            f"there is not enough memory for this training; set {' or '.join(filter(None, ways))}, and rerun"
        ) from error
