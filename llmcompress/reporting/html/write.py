"""The page as a file: one HTML document that carries its style and its pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llmcompress.errors import DiskError
from llmcompress.reporting.html import charts
from llmcompress.reporting.html.context import page_facts
from llmcompress.reporting.html.files import Generations, read_files
from llmcompress.reporting.output_file import check_new_file, write_new_file
from llmcompress.runtime.json_values import JsonRecord

TEMPLATE = "page.html.jinja"
KINDS = (".html",)


@dataclass(frozen=True)
class WrittenPage(JsonRecord):
    """A page on the disk. `missing`: a sentence for each section that the checkpoint has no numbers for."""

    output: str
    bytes: int
    missing: tuple[str, ...]


def write_page(folder: str | Path, output: str | Path, generations: Generations | None = None) -> WrittenPage:
    """Write the report of a compressed or distilled checkpoint as one self-contained HTML file.

    The page says what the checkpoint's files say and names what they lack; the same files give the same page.

    Args:
        folder: what `compress` or `distill` wrote.
        output: a new file that ends in .html, outside of `folder`, whose files are listed in its manifest.
        generations: {prompt: {model: continuation}} to show side by side; by default those kept in the folder.

    Returns:
        The path, the size in bytes, and what is missing.

    Raises:
        RecipeError: `output` does not end in .html.
        DiskError: `output` exists, lies inside `folder`, or cannot be written.
        InputError: `folder` was not written by llmcompress, or a file in it is damaged.
    """
    folder, output = Path(folder), Path(output)
    check_new_file(output, KINDS, "a report")
    if folder.resolve() in output.resolve().parents:
        raise DiskError(f"{output} is inside the checkpoint, where only its own files may be; write the page elsewhere")
    facts = page_facts(read_files(folder, generations))
    text = _environment().get_template(TEMPLATE).render(facts, charts=charts)
    write_new_file(output, text)
    return WrittenPage(str(output), len(text.encode()), facts["missing"])


def _environment() -> Environment:
    """Templates of this folder, with everything that comes from a file escaped."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
