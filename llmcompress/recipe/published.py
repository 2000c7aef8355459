"""Recipes as outputs tell them: texts in files by name and digest, without the folders of the machine."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from llmcompress.recipe.calibration import Calibration, is_file

S = TypeVar("S", bound=BaseModel)


def published(recipe: S) -> S:
    """Return a recipe for a file that others will read: every path in it is the last part of itself.

    A text in a file also gets the SHA-256 of its content, so the recipe still says which text it was, and runs where a
    file of that name and content lies.
    """
    changes: dict[str, Any] = {}
    for name in type(recipe).model_fields:
        value = getattr(recipe, name)
        if isinstance(value, BaseModel):
            changes[name] = published(value)
        elif isinstance(value, tuple):
            changes[name] = tuple(published(one) if isinstance(one, BaseModel) else one for one in value)
        elif name == "folder" and isinstance(value, str):
            changes[name] = local_name(value)
    if isinstance(recipe, Calibration):
        changes |= _text(recipe)
    return recipe.model_copy(update={name: value for name, value in changes.items() if value != getattr(recipe, name)})


def _text(config: Calibration) -> dict[str, Any]:
    if not is_file(config.dataset):
        return {"dataset": dataset_name(config.dataset)}
    path = Path(config.dataset).expanduser()
    return {"dataset": path.name, "sha256": file_sha256(path) if path.is_file() else config.sha256}


def dataset_name(dataset: str) -> str:
    """Return the name of a text without folders of this machine: a Hub id as it is, a path's last part."""
    local = is_file(dataset) or dataset.startswith(("/", ".", "~")) or Path(dataset).is_dir()
    return local_name(dataset) if local else dataset


def local_name(path: str) -> str:
    """Return the last part of a path, that of the folder itself for `.` and `..`."""
    name = Path(path).name
    return Path(path).resolve().name or "root" if name in ("", "..") else name


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
