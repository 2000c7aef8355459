"""What a sweep leaves beside its checkpoints: each file as it was or as it is now, never half of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llmcompress.checkpoint import replace_bytes
from llmcompress.errors import DiskError


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Writes the files, by name, into `folder`, which is made if need be. Raises DiskError where that cannot be."""
    for name, content in contents.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_bytes(folder / name, content)
        except OSError as error:
            raise DiskError(
                f"{folder / name} cannot be written ({error.strerror}); free some space and start again"
            ) from error
