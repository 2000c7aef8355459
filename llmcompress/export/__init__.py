"""Doors out: checkpoints of ours in the formats of other engines, one file each.

`export(folder, output, to)` writes; what it gives back says what was kept and what was changed.
"""

from collections.abc import Callable
from pathlib import Path

from llmcompress.errors import RecipeError
from llmcompress.export.dense import to_dense
from llmcompress.export.opened import Exported
from llmcompress.export.peft import to_peft

DOORS: dict[str, Callable[[Path, Path], Exported]] = {"dense": to_dense, "peft": to_peft}

__all__ = ["DOORS", "Exported", "export"]


def export(folder: str | Path, output: str | Path, to: str) -> Exported:
    """Writes the compressed checkpoint `folder` as the new folder `output`, in the format `to`.

    Raises RecipeError for an unknown format, InputError for a damaged checkpoint, DiskError as `compress` does.
    """
    if to not in DOORS:
        raise RecipeError(f"there is no export to {to!r}; choose one of {', '.join(DOORS)}")
    return DOORS[to](Path(folder), Path(output))
