"""What a compression gives back: the checkpoint on disk and its report."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.evaluate.report import Report
from llmcompress.models.checkpoint import copy_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(eq=False)
class Result:
    """A compressed checkpoint on disk and its report. A result without an `output` lives in a temporary folder.

    `distillation`: what `distill` reported, None where the recipe asked for none; `allocation`: how a target was met,
    None where there was none.
    """

    folder: Path
    report: Report
    _temporary: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)
    distillation: dict[str, Any] | None = field(default=None, repr=False)
    allocation: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def model(self) -> PreTrainedModel:
        """The compressed model, loaded anew at every call."""
        from transformers import AutoModelForCausalLM

        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.folder)
        return loaded

    def save(self, path: str | Path) -> Path:
        """Copies the checkpoint to `path`, which must not exist. Raises DiskError otherwise."""
        copy_folder(self.folder, Path(path))
        return Path(path)
