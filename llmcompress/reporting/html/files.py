"""The files of a checkpoint that its page is made from, read once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcompress.errors import InputError
from llmcompress.models.files import file_names
from llmcompress.models.files.checkpoint import add_file, read_json
from llmcompress.models.files.integrity import MENDING
from llmcompress.reporting import report as reports
from llmcompress.reporting.report import Report

Generations = Mapping[str, Mapping[str, str]]  # prompt -> model -> its continuation


@dataclass(frozen=True)
class Files:
    """The content of a checkpoint's files; None for one that is not there."""

    folder: Path
    report: Report | None
    scores: dict[str, Any] | None
    allocation: dict[str, Any] | None
    distillation: dict[str, Any] | None
    recipe: str | None
    distillation_recipe: str | None
    generations: Generations | None


def read_files(folder: Path, generations: Generations | None = None) -> Files:
    """Read what `compress`, `distill` and `eval --save` wrote; `generations` replace those in the folder.

    Raises InputError for a folder that neither of the first two wrote, and for a damaged file.
    """
    if not any((folder / name).is_file() for name in (file_names.REPORT, file_names.DISTILLATION)):
        raise InputError(
            f"{folder} holds neither {file_names.REPORT} nor {file_names.DISTILLATION}, so llmcompress did not write "
            f"it; give a folder that compress or distill wrote"
        )
    return Files(
        folder=folder,
        report=reports.read(folder) if (folder / file_names.REPORT).is_file() else None,
        scores=_json(folder / file_names.SCORES),
        allocation=_json(folder / file_names.ALLOCATION),
        distillation=_json(folder / file_names.DISTILLATION),
        recipe=_text(folder / file_names.RECIPE),
        distillation_recipe=_text(folder / file_names.DISTILLATION_RECIPE),
        generations=checked(generations, "generations") if generations is not None else _generations(folder),
    )


def read_generations(path: Path) -> Generations:
    """Read a JSON file {prompt: {model: continuation}}. Raises InputError for a file of another form."""
    return checked(_json(path) if path.is_file() else None, str(path))


def add_generations(folder: Path, generations: Generations) -> None:
    """Keep continuations of prompts in a finished checkpoint, for its page. Raises InputError or DiskError."""
    text = json.dumps(checked(generations, "generations"), indent=2, ensure_ascii=False)
    add_file(folder, file_names.GENERATIONS, text)


def checked(found: Any, name: str) -> Generations:
    """Return `found` if it maps prompts to maps from models to texts. Raises InputError with `name` if not."""
    texts = [text for models in found.values() for text in models.values()] if _is_nested(found) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f'{name} must be {{"prompt": {{"model": "continuation"}}}} in JSON; write it in that form')
    return dict(found)


def _is_nested(found: Any) -> bool:
    return isinstance(found, Mapping) and all(isinstance(models, Mapping) for models in found.values())


def _generations(folder: Path) -> Generations | None:
    path = folder / file_names.GENERATIONS
    return read_generations(path) if path.is_file() else None


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {error}); {MENDING}") from error


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {error}); {MENDING}") from error
