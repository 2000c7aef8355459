"""Where a block-wise phase keeps the blocks that are done: a file for each, there as a whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmcompress.errors import DiskError, InputError


class Shelf:
    """Blocks of one run in a folder. `run` identifies it: what another recipe, other data or models left is refused."""

    def __init__(self, folder: Path, run: str) -> None:
        self.folder, self.run = folder, run

    def put(self, block: int, tensors: Mapping[str, Tensor], found: Mapping[str, Any]) -> None:
        """Keeps a block's tensors by name, and what was found of it. Raises DiskError where that cannot be written."""
        path = self._path(block)
        staged = path.with_suffix(".partial")
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(stored, staged, metadata={"run": self.run, "found": json.dumps(dict(found))})
            staged.rename(path)
        except (OSError, SafetensorError) as error:
            raise DiskError(f"{path} cannot be written ({error}); free some space and start again") from error

    def get(self, block: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `put` kept; None for a block that is not done. Raises InputError for another run's, or damage."""
        path = self._path(block)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            found: dict[str, Any] = json.loads(metadata.get("found", "{}"))
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read ({error}); remove {self.folder} to start again") from error
        if metadata.get("run") != self.run:
            raise InputError(
                f"{self.folder} was left by a run with another recipe, other data or other models; remove it, or "
                f"choose another output folder"
            )
        return tensors, found

    def _path(self, block: int) -> Path:
        return self.folder / f"block-{block:05}.safetensors"
