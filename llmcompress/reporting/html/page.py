"""The report of a checkpoint as one HTML document that carries its style and its pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llmcompress.errors import InputError
from llmcompress.models.files import file_names
from llmcompress.models.files.checkpoint import add_file
from llmcompress.models.files.output import check_new_file, write_new_file
from llmcompress.models.files.reading import MENDING
from llmcompress.reporting import report as reports
from llmcompress.reporting.html import charts
from llmcompress.reporting.html.context import CheckpointFiles, Generations, page_context
from llmcompress.runtime.json_values import JsonRecord

TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class WrittenPage(JsonRecord):
    """A page on the disk. `missing`: a sentence for each section that the checkpoint has no numbers for."""

    output: str
    bytes: int
    missing: tuple[str, ...]


def write_page(folder: str | Path, output: str | Path, generations: Generations | None = None) -> WrittenPage:
    """Write the report of a compressed or distilled checkpoint as one self-contained HTML file.

    The page names what the checkpoint's files lack. The same files give the same page.

    Args:
        folder: a checkpoint of `compress` or `distill`.
        output: a new file that ends in .html, outside of `folder`, whose files are listed in its manifest.
        generations: {prompt: {model: continuation}} to show side by side; by default those in the folder.

    Returns:
        The path, the size in bytes, and what is missing.

    Raises:
        RecipeError: `output` does not end in .html.
        DiskError: `output` exists, lies inside `folder`, or cannot be written.
        InputError: `folder` was not written by llmcompress, or a file in it is damaged.
    """
    folder, output = Path(folder), Path(output)
    check_new_file(output, (".html",), "a report")
    context = page_context(_read_files(folder, generations))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # of everything that comes from a file
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template(TEMPLATE).render(context, charts=charts)
    write_new_file(output, text)
    return WrittenPage(str(output), len(text.encode()), context["missing"])


def _read_files(folder: Path, generations: Generations | None) -> CheckpointFiles:
    """Read the files of `compress`, `distill` and `eval --save`; `generations` replace those in the folder.

    Raises InputError for a folder of neither of the first two, and for a damaged file.
    """
    if not any((folder / name).is_file() for name in (file_names.REPORT, file_names.DISTILLATION)):
        raise InputError(
            f"{folder} holds neither {file_names.REPORT} nor {file_names.DISTILLATION}, so llmcompress did not write "
            f"it; give a folder that compress or distill wrote"
        )
    if generations is not None:
        generations = _check_generations(generations, "generations")
    elif (folder / file_names.GENERATIONS).is_file():
        generations = read_generations(folder / file_names.GENERATIONS)
    return CheckpointFiles(
        folder=folder,
        report=reports.read(folder) if (folder / file_names.REPORT).is_file() else None,
        scores=reports.read_optional(folder / file_names.SCORES),
        allocation=reports.read_allocation(folder),
        distillation=reports.read_distillation(folder),
        recipe=_read_text(folder / file_names.RECIPE),
        distillation_recipe=_read_text(folder / file_names.DISTILLATION_RECIPE),
        generations=generations,
    )


def read_generations(path: Path) -> Generations:
    """Read a JSON file {prompt: {model: continuation}}. Raises InputError for a file of another form."""
    return _check_generations(reports.read_optional(path), str(path))


def add_generations(folder: Path, generations: Generations) -> None:
    """Add continuations of prompts to a finished checkpoint, for its page. Raises InputError or DiskError."""
    text = json.dumps(_check_generations(generations, "generations"), indent=2, ensure_ascii=False)
    add_file(folder, file_names.GENERATIONS, text)


def _check_generations(value: Any, name: str) -> Generations:
    """Return `value` if it maps prompts to maps from models to texts. Raises InputError with `name` if not."""
    models = list(value.values()) if isinstance(value, Mapping) else [None]
    if not all(
        isinstance(texts, Mapping) and all(isinstance(text, str) for text in texts.values()) for texts in models
    ):
        raise InputError(f'{name} must be {{"prompt": {{"model": "continuation"}}}} in JSON; write it in that form')
    return dict(value)


def _read_text(path: Path) -> str | None:
    """Return the text of a file; None without one. Raises InputError for a damaged file."""
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {error}); {MENDING}") from error
