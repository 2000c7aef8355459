"""Text files: plain text, JSON lines and Parquet, row by row, holding no more of a file than one document."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmcompress.errors import InputError, first_line
from llmcompress.recipe.calibration import FILE_KINDS
from llmcompress.recipe.user_file import is_regular, open_file, read_file
from llmcompress.recipe.yaml import shortened

LONGEST_TEXT = 1 << 28  # bytes of a document of plain text; a longer file is read as several
LONGEST_LINE = 1 << 28  # bytes of a JSON line
MOST_READ = 1 << 30  # bytes of a text that is read as a whole
DATASET_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError)  # of `datasets` and Arrow
LINE_ENDS, SPACES = re.compile(rb".*\n", re.DOTALL), re.compile(rb".*[ \t]", re.DOTALL)
NEAR = 1 << 20  # bytes before the end of a document in which a line, or a word, is to end


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with newlines as its line ends. Raises InputError when it cannot be read as such."""
    try:
        return _decoded(read_file(path, MOST_READ), path)
    except OSError as error:
        raise _unreadable(path, error) from error


def file_rows(path: Path) -> Iterator[Any]:
    """Yield the rows of a text file: one for plain text. Raises InputError where it cannot be read."""
    if not is_regular(path):
        there = path.is_dir() or path.is_fifo() or path.is_char_device()
        kind = "this is a folder, a pipe or a device:" if there else "there is no file"
        raise InputError(f"{kind} {shortened(path, 300)}; calibration text is a .txt, .jsonl or .parquet file")
    try:
        match path.suffix.lower():
            case ".txt":
                yield from _texts(path)
            case ".jsonl":
                yield from _json_rows(path)
            case ".parquet":
                yield from _parquet_rows(path)
            case other:
                raise InputError(
                    f"{path}: text is read from {', '.join(FILE_KINDS)} files, not from {other or 'this one'}"
                )
    except OSError as error:
        raise _unreadable(path, error) from error


def file_notes(path: Path) -> tuple[str, ...]:
    """Return what a report says about reading a text file: that it is too long for one document."""
    if path.suffix.lower() != ".txt" or not is_regular(path) or path.stat().st_size <= LONGEST_TEXT:
        return ()
    return (f"{path} has {path.stat().st_size:,} bytes and is read as documents of at most {LONGEST_TEXT:,} bytes",)


def parse_line(line: bytes | str, where: str) -> Any:
    """Return the value of a JSON line. Raises InputError, naming `where`, for a line that is none."""
    try:
        return json.loads(line)
    except RecursionError as error:
        raise InputError(f"{where} is nested too deeply; write one object with a text or messages per line") from error
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error}); write one object per line") from error


def _texts(path: Path) -> Iterator[str]:
    """Yield a text: whole, or cut behind a line, a word, or at least a character near every LONGEST_TEXT bytes."""
    with open_file(path) as file:
        start, rest = 0, b""
        while data := rest + file.read(LONGEST_TEXT - len(rest)):
            end = len(data) if len(data) < LONGEST_TEXT else _end(data)
            yield _decoded(data[:end], path, start)
            start, rest = start + end, data[end:]


def _end(data: bytes) -> int:
    """Return where to cut: the last end of a line or of a word near the end, else of a UTF-8 character."""
    first = max(0, len(data) - NEAR)
    for ends in (LINE_ENDS, SPACES):
        if found := ends.match(data, first):
            return found.end()
    last = len(data) - 1
    while last > len(data) - 4 and data[last] & 0xC0 == 0x80:  # inside a character
        last -= 1
    return last or len(data)


def _decoded(data: bytes, path: Path, start: int = 0) -> str:
    """The text of UTF-8 bytes, the first of which is byte `start` of `path`."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {start + error.start}); convert it to UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _json_rows(path: Path) -> Iterator[Any]:
    with open_file(path) as lines:
        number = 0
        while line := lines.readline(LONGEST_LINE + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > LONGEST_LINE:
                raise InputError(f"{where} has more than {LONGEST_LINE:,} bytes; write its text as several documents")
            if line.strip():
                yield parse_line(line, where)


def _parquet_rows(path: Path) -> Iterator[Any]:
    import datasets

    try:
        yield from datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    except (datasets.exceptions.DatasetsError, *DATASET_ERRORS) as error:
        raise InputError(f"{path} is not a readable parquet file ({shortened(first_line(error), 300)})") from error


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{shortened(path, 300)} cannot be read ({error.strerror or error}); give the path of a text file"
    )
