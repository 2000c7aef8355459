"""The state of a run that is under way: what moves, the optimizer's moments, the step. Safetensors and JSON, replaced
as a whole, so that a run which is cut goes on from its last state, to the bit.

The JSON file names the file of tensors that belongs to it, and is the last to be written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmcompress.errors import DiskError, InputError
from llmcompress.models.checkpoint import read_json, replace_text, sync

STATE = "state.json"
FILES = ("even.safetensors", "odd.safetensors")  # the state names one, the next one's tensors go to the other
METRICS = "metrics.jsonl"  # grows beside the state


@dataclass
class Progress:
    """How far a run is. `targets`: tokens predicted so far; `losses`: the state of each loss that has one; `shares`
    and `cursors`: of each domain, its part of a step and how many of its sequences were read; `history`: what was
    measured on the way; `frozen`: how many codes are, where those that oscillate are frozen."""

    step: int = 0
    targets: int = 0
    seconds: float = 0.0
    losses: list[dict[str, float] | None] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    cursors: list[int] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    frozen: int | None = None


class Keeper:
    """Keeps the state of one run in a folder. `run` identifies it: another recipe, other data or models are refused."""

    def __init__(self, folder: Path, run: str) -> None:
        self.folder, self.run = folder, run

    def save(self, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        """Replaces the state: at every moment the old one or the new one is there, whole, even if the power fails.

        Raises DiskError where it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            before = self._named()
            name = next(name for name in FILES if name != before)
            save_file(dict(tensors), self.folder / name)
            for written in (self.folder / name, self.folder):
                sync(written)
            replace_text(self.folder / STATE, json.dumps({"run": self.run, "tensors": name, **vars(progress)}))
            sync(self.folder)
            if before is not None:
                (self.folder / before).unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            raise DiskError(f"{self.folder} cannot be written ({error}); free some space and start again") from error

    def load(self) -> tuple[Progress, dict[str, Tensor]]:
        """The last state and its tensors, or a new `Progress`. Raises InputError for another run's, or damage."""
        if not (self.folder / STATE).is_file():
            return Progress(), {}
        try:
            entries = read_json(self.folder / STATE)
            tensors = load_file(self.folder / entries.pop("tensors"))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InputError(f"{self.folder} cannot be read ({error}); remove it to start again") from error
        if entries.pop("run", None) != self.run:
            raise InputError(
                f"{self.folder} was left by a run with another recipe, other data or other models; remove it, or "
                f"choose another output folder"
            )
        return Progress(**entries), tensors

    def remove(self) -> None:
        """Forgets the state of a run that has ended."""
        (self.folder / STATE).unlink(missing_ok=True)  # first: it must not name what is gone
        shutil.rmtree(self.folder, ignore_errors=True)

    def _named(self) -> str | None:
        """The file of tensors that the state at hand names."""
        try:
            return str(read_json(self.folder / STATE)["tensors"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
