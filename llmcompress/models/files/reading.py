"""Files of a model, opened so that none of them can hang a process or fill its memory.

Only regular files are opened: a pipe would wait for a writer for ever. JSON and the headers of weight files are read up
to a size that no model comes near.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from llmcompress.errors import InputError

MOST_JSON = 2**26  # bytes; an index of 90,000 tensors has 9 MB
MOST_HEADER = 2**25  # bytes; about 300,000 tensors in one file


def check_regular(path: Path) -> None:
    """Raise InputError for a pipe, a device, a folder; links are followed. What is not there is left to the caller."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no regular file; put the file of the model in its place")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises OSError where it cannot be opened, ValueError for any other content."""
    check_regular(path)
    if path.stat().st_size > MOST_JSON:
        raise ValueError(f"it has more than {MOST_JSON >> 20} MiB")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("it holds no JSON object")
    return found


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file, as `safe_open` does and with its errors. Raises InputError for what is no such file."""
    check_regular(path)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MOST_HEADER:
        raise InputError(f"{path} is damaged (its header claims {size} bytes); download or write it again")
    with safe_open(path, framework="pt") as opened:
        yield opened


def check_folder(folder: Path) -> None:
    """Raise InputError for a folder whose name safetensors cannot read."""
    if not is_text(folder):
        raise InputError(f"{str(folder)!r} is not UTF-8, which safetensors requires of paths; rename the folder")


def is_text(path: Path) -> bool:
    """True if a path is UTF-8; bytes that are not stand in it as lone surrogates."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True
