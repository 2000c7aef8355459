"""The sources of text: files, `datasets`, this package and the Python standard library, one document at a time.

A document is a string, or a chat: a list of `{"role": ..., "content": ...}` messages. Nothing here tokenizes.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from llmcompress.data.builtin import builtin_documents, stdlib_documents
from llmcompress.errors import InputError, first_line
from llmcompress.recipe.calibration import FILE_KINDS, is_file
from llmcompress.recipe.yaml import shorten

HALVES = re.compile("[\ud800-\udfff]")  # surrogates, which JSON can spell and UTF-8 cannot
Message = dict[str, str]
Document = str | list[Message]
SHUFFLE_BUFFER = 4096  # documents held while shuffling; a smaller source is shuffled completely
HELD_CHARACTERS = 1 << 28  # of them; fewer documents are held where they are longer
CHAT_COLUMNS = ("messages", "conversation", "conversations")


def read_documents(
    dataset: str,
    *,
    subset: str | None = None,
    revision: str | None = None,
    split: str | None = None,
    column: str | None = None,
    streaming: bool = True,
) -> Iterator[Document]:
    """Yield the documents of "builtin", "stdlib", a local .txt/.jsonl/.parquet file, or a data set by name.

    A .txt file is one document. Blank documents are left out. Raises InputError for text that cannot be read.
    """
    if dataset == "builtin":
        rows: Iterable[Any] = builtin_documents()
    elif dataset == "stdlib":
        rows = (text for _, text in stdlib_documents(split or "train"))
    elif is_file(dataset):
        rows = file_rows(Path(os.path.expanduser(dataset)))
    else:
        rows = _hub_rows(dataset, subset, revision, split or "train", streaming)
    for number, row in enumerate(rows, start=1):
        document = _document(row, column, where=f"{dataset}, row {number}")
        if document and not (isinstance(document, str) and document.isspace()):
            yield document


def shuffle(documents: Iterable[Document], seed: int, buffer: int = SHUFFLE_BUFFER) -> Iterator[Document]:
    """Yield the documents in an order of `seed` alone.

    At most `buffer` documents are held, and hardly more than HELD_CHARACTERS.
    """
    generator = torch.Generator().manual_seed(seed)
    source = iter(documents)
    held: list[Document] = []
    room = HELD_CHARACTERS
    while len(held) < buffer and room > 0 and (document := next(source, None)) is not None:
        held.append(document)
        room -= len(document) if isinstance(document, str) else sum(len(turn["content"]) for turn in document)
    for document in source:
        place = int(torch.randint(len(held), (), generator=generator))
        held[place], document = document, held[place]
        yield document
    for place in torch.randperm(len(held), generator=generator).tolist():
        yield held[place]


def _hub_rows(name: str, subset: str | None, revision: str | None, split: str, streaming: bool) -> Iterator[Any]:
    import datasets

    where = f"data set {shorten(name, 200)!r}" + (f", subset {subset!r}" if subset else "") + f", split {split!r}"
    try:
        rows = datasets.load_dataset(name, subset, split=split, revision=revision, streaming=streaming)
        yield from rows
    except (datasets.exceptions.DatasetsError, *DATASET_ERRORS) as error:
        raise InputError(
            f"{where} cannot be read ({shorten(first_line(error), 300)}); check its name, subset, split and "
            "revision, or give a local .txt, .jsonl or .parquet file"
        ) from error


def _columns(row: dict[Any, Any]) -> str:
    return shorten(sorted(map(str, row)), 200)


def _document(row: Any, column: str | None, where: str) -> Document:
    """Return the text, or the chat, of one row: a string or a dictionary of columns."""
    if isinstance(row, str):
        return _check_characters(row, where)
    if not isinstance(row, dict):
        raise InputError(f"{where} is {type(row).__name__}, not an object with a text or messages column")
    if column is None:
        texts = [name for name, value in row.items() if isinstance(value, str)]
        known = [name for name in (*CHAT_COLUMNS, "text") if row.get(name) is not None]
        candidates = known[:1] or texts
        if len(candidates) != 1:
            raise InputError(f"{where} has the columns {_columns(row)}; name the one with the text as `column`")
        column = candidates[0]
    if column not in row:
        raise InputError(f"{where} has no column {column!r}; it has {_columns(row)}")
    value = row[column]
    if value is None:
        return ""
    if isinstance(value, str):
        return _check_characters(value, where)
    if isinstance(value, list) and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value):
        return [
            {"role": _content(turn["role"], f"{where}, role {number}"), "content": _content(turn["content"], place)}
            for number, turn in enumerate(value, start=1)
            for place in (f"{where}, message {number}",)
        ]
    raise InputError(f"{where}: column {column!r} holds neither text nor messages with a role and a content")


def _content(value: Any, where: str) -> str:
    """Return the text of a message: a string, nothing, or a list of parts of text, which are joined."""
    if value is None:
        return ""
    if isinstance(value, str):
        return _check_characters(value, where)
    if isinstance(value, list):
        return "".join(_part(part, where) for part in value)
    raise InputError(f"{where} holds {type(value).__name__}, not text; write a string, or a list of parts of text")


def _part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
    if not isinstance(text, str):
        kind = part.get("type", "no type") if isinstance(part, dict) else type(part).__name__
        raise InputError(f"{where} has a part that is no text ({shorten(kind)}); leave such chats out")
    return _check_characters(text, where)


def _check_characters(text: str, where: str) -> str:
    """Return the text. Raises InputError for half a character, which no tokenizer reads."""
    if not text.isascii() and (found := HALVES.search(text)):
        raise InputError(f"{where} has {found[0]!a}, half of a character, at {found.start()}; correct the text")
    return text


LONGEST_TEXT = 1 << 28  # bytes of a document of plain text; a longer file is read as several
LONGEST_LINE = 1 << 28  # bytes of a JSON line
DATASET_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError)  # of `datasets` and Arrow
LINE_ENDS, SPACES = re.compile(rb".*\n", re.DOTALL), re.compile(rb".*[ \t]", re.DOTALL)
NEAR = 1 << 20  # bytes before the end of a document in which a line, or a word, is to end


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, its lines ended by newlines. Raises InputError for any other file."""
    try:
        return _decode(Path(os.path.expanduser(path)).read_bytes(), path)
    except (OSError, ValueError) as error:  # ValueError: no path can have this name
        raise _unreadable(path, error) from error


def file_rows(path: Path) -> Iterator[Any]:
    """Yield the rows of a text file: one for plain text. Raises InputError for one that cannot be read."""
    if not os.path.isfile(path):
        kind = "this is a folder, a pipe or a device:" if os.path.exists(path) else "there is no file"
        raise InputError(f"{kind} {shorten(path, 300)}; calibration text is a .txt, .jsonl or .parquet file")
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
    """Return the report's note on a text file that is too long for one document."""
    if path.suffix.lower() != ".txt" or not os.path.isfile(path) or path.stat().st_size <= LONGEST_TEXT:
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
    with path.open("rb") as file:
        start, rest = 0, b""
        while data := rest + file.read(LONGEST_TEXT - len(rest)):
            end = len(data) if len(data) < LONGEST_TEXT else _end(data)
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


def _decode(data: bytes, path: Path, start: int = 0) -> str:
    """Return the text of UTF-8 bytes; the first is byte `start` of `path`."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {start + error.start}); convert it to UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _json_rows(path: Path) -> Iterator[Any]:
    with path.open("rb") as lines:
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
        raise InputError(f"{path} is not a readable parquet file ({shorten(first_line(error), 300)})") from error


def _unreadable(path: Path, error: OSError | ValueError) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(f"{shorten(path, 300)} cannot be read ({reason}); give the path of a text file")
