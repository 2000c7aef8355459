"""Files of a model, opened so that none of them can hang a process or fill its memory.

Only regular files are opened: a pipe would wait for a writer for ever. JSON and the headers of weight files are read up
to a size that no model comes near.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from llmcompress.errors import InputError

MENDING = "download or write it again"
MOST_JSON = 2**26  # bytes; an index of 90,000 tensors has 9 MB
MOST_HEADER = 2**25  # bytes; about 300,000 tensors in one file
POINTER = b"version https://git-lfs.github.com/spec/"  # how a pointer of Git LFS begins
LONGEST_POINTER = 1024  # bytes, by its specification
PANIC = "PanicException"  # of the tokenizers library, which makes it no Exception


def check_regular(path: Path) -> None:
    """Raise InputError for a pipe, a device, a folder, and what Git leaves in the place of a large file.

    Links are followed; a missing file passes.
    """
    if not path.exists():
        return
    if not path.is_file():
        raise InputError(f"{path} is no regular file; put the file of the model in its place")
    check_whole(path)


def check_whole(path: Path) -> None:
    """Raise InputError for what Git leaves in the place of a large file. Whatever cannot be read passes."""
    try:
        is_pointer = path.is_file() and path.stat().st_size <= LONGEST_POINTER and path.read_bytes().startswith(POINTER)
    except (OSError, ValueError):  # whoever opens it says why
        return
    if is_pointer:
        raise InputError(f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull` in its folder")


def read_json(path: Path, way_out: str | None = None, most: int = MOST_JSON) -> dict[str, Any]:
    """Return the object in a JSON file of at most `most` bytes.

    Raises OSError or ValueError for any other file; with a `way_out`, InputError that ends with it.
    """
    try:
        check_regular(path)
        if path.stat().st_size > most:
            raise ValueError(f"it has more than {most >> 20} MiB")
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        if not isinstance(entries, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        if way_out is None:
            raise
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            fault = f"has no {path.name}" if path.parent.is_dir() else "is no folder"
            raise InputError(f"{path.parent} {fault}; {way_out}") from error
        raise InputError(f"{path} is not readable JSON ({error_text(error)}); {way_out}") from error
    return entries


@contextmanager
def open_tensors(path: Path, way_out: str | None = None) -> Iterator[Any]:
    """Open a safetensors file, as `safe_open` does and with its errors; with a `way_out`, InputError that ends with it.

    Raises InputError for any other file.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if size > MOST_HEADER:
            raise InputError(f"{path} is damaged (its header claims {size} bytes); download or write it again")
        with safe_open(path, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        if way_out is None:
            raise
        raise InputError(f"{path} is damaged ({error_text(error)}); {way_out}") from error


def error_text(error: BaseException, most: int = 200) -> str:
    """Return the message of a library's error on one line of at most `most` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= most else f"{text[:most]}...").rstrip(".")


def check_folder(folder: Path) -> None:
    """Raise InputError for a folder whose name safetensors cannot read."""
    if not is_text(folder):
        raise InputError(f"{str(folder)!r} is not UTF-8, which safetensors requires of paths; rename the folder")


def is_text(path: Path) -> bool:
    """True if a path is UTF-8; its other bytes would stand in it as lone surrogates."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


class TokenizerReading:
    """Turns errors of the tokenizers library into InputError: a plain Exception, or a panic, which is none."""

    def __init__(self, source: Path, advice: str = "put the model's tokenizer files beside its weights") -> None:
        self.source, self.advice = source, advice

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> Literal[False]:
        is_plain = isinstance(error, Exception) and not isinstance(error, MemoryError)
        if error is not None and (is_plain or type(error).__name__ == PANIC):
            raise InputError(
                f"{self.source} has no tokenizer that can be read ({error_text(error)}); {self.advice}"
            ) from error
        return False
