"""Text files: plain text, JSON lines and Parquet, row by row."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmcompress.errors import InputError, first_line
from llmcompress.recipe.calibration import FILE_KINDS


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with newlines as its line ends. Raises InputError when it cannot be read as such."""
    try:
        return Path(os.path.expanduser(path)).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); give the path of a text file") from error


def file_rows(path: Path) -> Iterator[Any]:
    """Yield the rows of a text file: one for plain text. Raises InputError where it cannot be read."""
    if not os.path.isfile(path):
        raise InputError(f"there is no file {path}; calibration text is a .txt, .jsonl or .parquet file")
    match path.suffix.lower():
        case ".txt":
            yield read_text(path)
        case ".jsonl":
            yield from _json_rows(path)
        case ".parquet":
            yield from _parquet_rows(path)
        case other:
            raise InputError(f"{path}: text is read from {', '.join(FILE_KINDS)} files, not from {other or 'this one'}")


def _json_rows(path: Path) -> Iterator[Any]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number} is not JSON ({error}); write one object per line") from error


def _parquet_rows(path: Path) -> Iterator[Any]:
    import datasets

    try:
        yield from datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable parquet file ({first_line(error)})") from error
