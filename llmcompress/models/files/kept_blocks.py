"""The blocks that a shortened model kept of its original, and their counterparts in a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmcompress.errors import RecipeError, list_names
from llmcompress.models.dense.families import block_stack
from llmcompress.models.dense.hidden_states import depth

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

KEPT = "llmcompress_kept_blocks"  # in config.json: numbers in the original model, ascending


def kept_blocks(config: PreTrainedConfig) -> tuple[int, ...] | None:
    """Return the numbers of the original model's blocks that a shortened one kept; None if its config has no list."""
    found: Sequence[int] | None = getattr(config, KEPT, None)
    return None if found is None else tuple(found)


def matched_blocks(student: PreTrainedModel, teacher: PreTrainedModel) -> dict[int, int]:
    """Return the teacher's block for each of the student's blocks. Raises RecipeError if that is not known."""
    few, many = depth(student), depth(teacher)
    theirs = kept_blocks(teacher.config) or tuple(range(many))
    mine = kept_blocks(student.config) or (theirs if few == many else None)
    if mine is None:
        raise RecipeError(
            f"the student has {few} blocks, the teacher {many}, and the student's config.json does not say which "
            f"blocks were kept; drop blocks with `llmcompress drop`, or add {KEPT} to config.json"
        )
    numbers = {original: number for number, original in enumerate(theirs)}
    strange = [str(original) for original in mine if original not in numbers]
    if len(mine) != few or strange:
        raise RecipeError(
            f"the student's {KEPT} has {len(mine)} blocks for its {few}, of which the teacher lacks "
            f"{list_names(strange)}; distil from the model that the student was made from"
        )
    return {number: numbers[original] for number, original in enumerate(mine)}


def original_name(student: PreTrainedModel, name: str, blocks: Mapping[int, int]) -> str:
    """Return the teacher's name of the student's module `name`; `blocks` comes from `matched_blocks`."""
    stack = block_stack(student.config, student)
    number, _, rest = name.removeprefix(f"{stack}.").partition(".")
    return f"{stack}.{blocks[int(number)]}.{rest}" if name.startswith(f"{stack}.") else name
