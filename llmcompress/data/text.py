"""The sources of text: files, `datasets`, this package and the Python standard library, one document at a time.

A document is a string, or a chat: a list of `{"role": ..., "content": ...}` messages. Nothing here tokenizes.
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from llmcompress.data.builtin import builtin_documents, stdlib_documents
from llmcompress.data.files import file_rows
from llmcompress.errors import InputError, first_line
from llmcompress.recipe.calibration import is_file

Message = dict[str, str]
Document = str | list[Message]

SHUFFLE_BUFFER = 4096  # documents held while shuffling; a smaller source is shuffled completely
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
    """The documents of `dataset`: "builtin", "stdlib", a local .txt/.jsonl/.parquet file, or a name that `datasets`
    knows.

    A .txt file is one document. Blank documents are left out. Raises InputError where something cannot be read.
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


def shuffled(documents: Iterable[Document], seed: int, buffer: int = SHUFFLE_BUFFER) -> Iterator[Document]:
    """The same documents in another order, holding at most `buffer` of them; the order follows from `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    source = iter(documents)
    held = list(itertools.islice(source, buffer))
    for document in source:
        place = int(torch.randint(len(held), (), generator=generator))
        held[place], document = document, held[place]
        yield document
    for place in torch.randperm(len(held), generator=generator).tolist():
        yield held[place]


# --- text that this package ships -------------------------------------------------------------------------------


# --- the standard library ---------------------------------------------------------------------------------------


# --- files ------------------------------------------------------------------------------------------------------


# --- data sets --------------------------------------------------------------------------------------------------


def _hub_rows(name: str, subset: str | None, revision: str | None, split: str, streaming: bool) -> Iterator[Any]:
    import datasets

    where = f"data set {name!r}" + (f", subset {subset!r}" if subset else "") + f", split {split!r}"
    try:
        rows = datasets.load_dataset(name, subset, split=split, revision=revision, streaming=streaming)
        yield from rows
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise InputError(
            f"{where} cannot be read ({first_line(error)}); check its name, subset, split and revision, "
            "or give a local .txt, .jsonl or .parquet file"
        ) from error


def _document(row: Any, column: str | None, where: str) -> Document:
    """The text, or the chat, of one row. A row is a string or a dictionary of columns."""
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise InputError(f"{where} is {type(row).__name__}, not an object with a text or messages column")
    if column is None:
        texts = [name for name, value in row.items() if isinstance(value, str)]
        known = [name for name in (*CHAT_COLUMNS, "text") if row.get(name) is not None]
        candidates = known[:1] or texts
        if len(candidates) != 1:
            raise InputError(f"{where} has the columns {sorted(row)}; name the one with the text as `column`")
        column = candidates[0]
    if column not in row:
        raise InputError(f"{where} has no column {column!r}; it has {sorted(row)}")
    value = row[column]
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value):
        return [{"role": str(turn["role"]), "content": str(turn["content"] or "")} for turn in value]
    raise InputError(f"{where}: column {column!r} holds neither text nor messages with a role and a content")
