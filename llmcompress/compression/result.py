"""The result of a compression: the checkpoint on disk and its report."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.models.files.checkpoint import copy_folder
from llmcompress.reporting.report import Report
from llmcompress.runtime.precision import ONE_BUILDER

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(eq=False)
class Result:
    """A compressed checkpoint on disk and its report. A result without an `output` lives in a temporary folder.

    Attributes:
        folder: the checkpoint, which transformers loads.
        report: sizes, and the error and bits of every layer.
        distillation: the report of `distill`; None if the recipe has no `distill:`.
        allocation: how the target was met, predicted and measured; None if the recipe has no `target:`.
    """

    folder: Path
    report: Report
    _temporary: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)
    distillation: dict[str, Any] | None = field(default=None, repr=False)
    allocation: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def is_kept(self) -> bool:
        """True if the checkpoint stays when this object is gone."""
        return self._temporary is None

    @property
    def model(self) -> PreTrainedModel:
        """The compressed model, loaded from disk at every access."""
        import transformers

        loader = getattr(transformers, self.report.auto_class)
        with ONE_BUILDER:
            loaded: PreTrainedModel = loader.from_pretrained(
                self.folder, trust_remote_code=self.report.trust_remote_code
            )
        return loaded

    def save(self, path: str | Path) -> Path:
        """Copy the checkpoint to `path` and return that.

        Raises:
            DiskError: if `path` exists already or cannot be written.
        """
        copy_folder(self.folder, Path(path))
        return Path(path)
