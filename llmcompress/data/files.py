"""The rows of text files: plain text, JSON, CSV, Parquet and Arrow, a row in memory at a time.

JSON and CSV are read here, not by `datasets`, which reads a list and an endless line whole, and takes "007" and "NA" in
a table for a number and for nothing. Files may be damaged, or made to do damage: each is read within limits, or refused
in a sentence.
"""

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from llmcompress.errors import InputError, first_line, list_names
from llmcompress.models.files.reading import check_whole
from llmcompress.recipe.text_files import FILE_KINDS, PACKED_KINDS, file_kind
from llmcompress.recipe.yaml import shorten

LONGEST_TEXT = 1 << 28  # bytes of a document of plain text; a longer file is read as several
LONGEST_LINE = 1 << 28  # bytes of a JSON line, and of one in a list
LONGEST_RECORD = 1 << 24  # bytes of a row of CSV: Python holds it as cells, which takes many times as much
DATASET_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError)  # and Arrow's
CHUNK = 1 << 20  # characters of a list in JSON that are read at once
DELIMITERS = ",;|\t"  # of tables
SAVED_ROWS = 1000  # rows of a saved data set, or of a Parquet file, that are read at once
GAP = re.compile(r"\s*(,?)\s*")  # between entries of a list
LINE_ENDS, SPACES = re.compile(rb".*\n", re.DOTALL), re.compile(rb".*[ \t]", re.DOTALL)
NEAR = 1 << 20  # bytes before the end of a document in which a line, or a word, is to end


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, its lines ended by newlines. Raises InputError for any other file."""
    path = Path(os.path.expanduser(path))
    check_whole(path)
    try:
        return _decode(path.read_bytes(), path)
    except (OSError, ValueError) as error:  # ValueError: no path can have this name
        raise _unreadable(path, error) from error


def file_rows(path: Path, longest: int = LONGEST_TEXT) -> Iterator[Any]:
    """Yield the rows of a text file, or of a folder that `save_to_disk` of `datasets` wrote; one row for plain text.

    longest: bytes of a row of plain text; a longer file has several.

    Raises InputError for one that cannot be read.
    """
    if not os.path.isfile(path) and not is_saved(path):
        kind = "this is a folder, a pipe or a device:" if os.path.exists(path) else "there is no file"
        raise InputError(f"{kind} {shorten(path, 300)}; calibration text is a file of {', '.join(FILE_KINDS)}")
    check_whole(path)
    try:
        match file_kind(path.name):
            case ".txt":
                yield from _texts(path, longest)
            case ".jsonl":
                yield from _json_rows(path)
            case ".json":
                yield from _json_entries(path)
            case ".csv" | ".tsv" as kind:
                yield from _table_rows(path, DELIMITERS if kind == ".csv" else DELIMITERS[::-1])
            case ".parquet" | ".arrow" as kind if path.suffix.lower() == kind:
                yield from arrow_rows(path)
            case _ if path.is_dir():
                yield from arrow_rows(path)
            case _:
                kind = "".join(path.suffixes[-2:]) or "this one"
                known = f"{', '.join(FILE_KINDS)} files, and from those packed as {' or '.join(PACKED_KINDS)}"
                raise InputError(f"{path}: text is read from {known}, not from {kind}")
    except (OSError, EOFError, zlib.error) as error:  # the last two: of gzip
        raise _unreadable(path, error) from error


def parse_line(line: bytes | str, where: str, advice: str = "write one object per line") -> Any:
    """Return the value of a JSON line. Raises InputError, naming `where`, for a line that is none."""
    try:
        return json.loads(line)
    except RecursionError as error:
        raise InputError(f"{where} is nested too deeply; write an object with a text or messages") from error
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error}); {advice}") from error


def _texts(path: Path, longest: int) -> Iterator[str]:
    """Yield a text: whole, or cut behind a line, a word, or at least a character near every `longest` bytes."""
    with _open(path) as file:
        start, rest = 0, b""
        while data := rest + file.read(longest - len(rest)):
            end = len(data) if len(data) < longest else _end(data)
            yield _decode(data[:end], path, start)
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


def _decode(data: bytes, path: Path | str, start: int = 0) -> str:
    """Return the text of UTF-8 bytes without a byte-order mark; the first is byte `start` of `path`."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {start + error.start}); convert it to UTF-8") from error
    text = text.removeprefix("" if start else "\ufeff")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _open(path: Path) -> io.BufferedReader:
    """Open the bytes of a file, unpacked as they are read."""
    match path.suffix.lower():
        case ".gz":
            return io.BufferedReader(gzip.open(path))
        case ".zst":
            import pyarrow

            return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
        case _:
            return path.open("rb")


def _json_rows(path: Path, advice: str = "write one object per line") -> Iterator[Any]:
    with _open(path) as lines:
        number = 0
        while line := lines.readline(LONGEST_LINE + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > LONGEST_LINE:
                raise InputError(f"{where} has more than {LONGEST_LINE:,} bytes; write its text as several documents")
            if line.strip():
                yield parse_line(_decode(line, where), where, advice)


def _json_entries(path: Path) -> Iterator[Any]:
    """Yield the entries of a list in JSON; of a file that begins otherwise, the objects of its lines."""
    advice = "write a list of objects, or one object per line"
    with _open(path) as data:
        text = io.TextIOWrapper(data, "utf-8-sig")
        try:
            begin = text.read(CHUNK).lstrip()
            if begin.startswith("["):
                yield from _list_entries(begin[1:], text, path, advice)
                return
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text ({error.reason}); convert it to UTF-8") from error
    yield from _json_rows(path, advice)


def _list_entries(buffer: str, text: io.TextIOBase, path: Path, advice: str) -> Iterator[Any]:
    """Yield the entries of a list one at a time; `buffer`: what was read behind its bracket, `text`: what follows."""
    decode, number, place = json.JSONDecoder().raw_decode, 0, 0
    while True:
        comma, start = _skip_gap(buffer, place)
        if buffer[start : start + 1] == "]" and not comma:
            if (buffer[start + 1 :] + text.read(CHUNK)).strip():
                raise InputError(f"{path} goes on behind its list; {advice}")
            return
        try:
            if start < len(buffer) and comma != (number > 0):
                raise ValueError("a comma is missing, or one too many")
            value, place = decode(buffer, start)
        except RecursionError as error:
            raise InputError(f"{path}, entry {number + 1} of its list is nested too deeply; {advice}") from error
        except ValueError as error:
            where, is_cut = f"{path}, entry {number + 1} of its list", _may_be_cut(error, buffer)
            size = len(buffer) - place
            if is_cut and size > LONGEST_LINE:
                advice = "write its text as several documents"
                raise InputError(f"{where} has more than {LONGEST_LINE:,} characters; {advice}") from error
            more = text.read(min(max(CHUNK, size), LONGEST_LINE + 1 - size)) if is_cut else ""
            if not more:
                raise InputError(f"{where} is not JSON ({getattr(error, 'msg', error)}); {advice}") from error
            buffer, place = buffer[place:] + more, 0
            continue
        number += 1
        yield value


def _skip_gap(buffer: str, place: int) -> tuple[bool, int]:
    """Return whether a comma follows `place`, between white space, and where it ends."""
    gap = GAP.match(buffer, place)
    return (False, place) if gap is None else (bool(gap[1]), gap.end())


def _may_be_cut(error: ValueError, buffer: str) -> bool:
    """True if a value may be unreadable because the text that was read ends within it."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.pos > len(buffer) - 16 or error.msg.startswith("Unterminated string")


def _table_rows(path: Path, delimiters: str) -> Iterator[dict[str, str]]:
    """Yield the rows of a table; its first row names the columns, with the first of the `delimiters` that it has."""
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_RECORD))
    number, size = 0, 0

    def read_lines(data: io.BufferedReader) -> Iterator[str]:
        nonlocal number, size
        while line := data.readline(LONGEST_RECORD + 1):
            number, size = number + 1, size + len(line)
            if size > LONGEST_RECORD:
                raise InputError(
                    f"{path}, line {number} is in a row of more than {LONGEST_RECORD:,} bytes; close its quotes, or "
                    "write its text as several rows"
                )
            yield _decode(line, f"{path}, line {number}")

    with _open(path) as data:
        lines = read_lines(data)
        first = next(lines, "")
        names = re.sub('"[^"]*"', "", first)
        delimiter = next((each for each in delimiters if each in names), delimiters[0])
        rows = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
        try:
            header = next(rows, [])
            if len(set(header)) < len(header):
                raise InputError(f"{path} names a column twice in its first row; give each a name of its own")
            for cells in rows:
                size = 0
                if cells and len(cells) != len(header):
                    raise InputError(
                        f"{path}, line {number} ends a row of {len(cells)} cells, and the first row names "
                        f"{len(header)} columns; put quotes around texts with {delimiter!r}"
                    )
                if cells:
                    yield dict(zip(header, cells))
        except csv.Error as error:
            raise InputError(f"{path}, line {number} is no row of a table ({error}); correct its quotes") from error


def is_saved(path: Path) -> bool:
    """True for a folder that `save_to_disk` of `datasets` wrote."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def arrow_rows(path: Path, split: str = "train") -> Iterator[Any]:
    """Yield the rows of a Parquet or Arrow file, or of a folder that `save_to_disk` wrote."""
    import datasets

    kind = "folder of a data set" if path.is_dir() else f"{path.suffix[1:].lower()} file"
    try:
        if not path.is_dir():
            builder = path.suffix[1:].lower()
            # By default the first group of a Parquet file says how many rows are read at once: all, or none.
            size = {"batch_size": SAVED_ROWS} if builder == "parquet" else {}
            yield from datasets.load_dataset(builder, data_files=str(path), split="train", streaming=True, **size)
            return
        saved = datasets.load_from_disk(str(path))
        splits = dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        if split not in splits:
            raise InputError(f"{path} has no split {split!r}; it has {list_names(splits)}")
        for table in splits[split].with_format("arrow").iter(SAVED_ROWS):
            table.validate(full=True)  # to read a damaged one would end the process
            yield from map(splits[split].features.decode_example, table.to_pylist())
    except (datasets.exceptions.DatasetsError, *DATASET_ERRORS) as error:
        raise InputError(f"{path} is not a readable {kind} ({shorten(first_line(error), 300)})") from error


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(f"{shorten(path, 300)} cannot be read ({reason}); give the path of a text file")
