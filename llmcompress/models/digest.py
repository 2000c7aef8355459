"""Digests that identify a model by what it predicts."""

from __future__ import annotations

from hashlib import file_digest, sha256
from pathlib import Path

from llmcompress.models.integrity import weight_files


def teacher_digest(folder: Path) -> str:
    """Return one digest of the files that decide what a model predicts: its config and its weights."""
    digest = sha256()
    for path in (folder / "config.json", *weight_files(folder)):
        with path.open("rb") as file:
            digest.update(file_digest(file, "sha256").digest())
    return digest.hexdigest()
