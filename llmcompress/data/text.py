"""The sources of text: files, `datasets`, this package and the Python standard library, one document at a time.

A document is a string, or a chat: a list of `{"role": ..., "content": ...}` messages. Nothing here tokenizes.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from llmcompress.data.builtin import builtin_documents, stdlib_documents
from llmcompress.data.chat_template import HALVES
from llmcompress.data.files import DATASET_ERRORS, file_rows
from llmcompress.errors import InputError, first_line
from llmcompress.recipe.calibration import is_file
from llmcompress.recipe.user_file import expanded
from llmcompress.recipe.yaml import shortened

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
    """The documents of `dataset`: "builtin", "stdlib", a local .txt/.jsonl/.parquet file, or a name that `datasets`
    knows.

    A .txt file is one document. Blank documents are left out. Raises InputError where something cannot be read.
    """
    if dataset == "builtin":
        rows: Iterable[Any] = builtin_documents()
    elif dataset == "stdlib":
        rows = (text for _, text in stdlib_documents(split or "train"))
    elif is_file(dataset):
        rows = file_rows(expanded(dataset))
    else:
        rows = _hub_rows(dataset, subset, revision, split or "train", streaming)
    for number, row in enumerate(rows, start=1):
        document = _document(row, column, where=f"{dataset}, row {number}")
        if document and not (isinstance(document, str) and document.isspace()):
            yield document


def shuffled(documents: Iterable[Document], seed: int, buffer: int = SHUFFLE_BUFFER) -> Iterator[Document]:
    """The same documents in another order, holding at most `buffer` of them, and hardly more than HELD_CHARACTERS.

    The order follows from `seed` alone.
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

    where = f"data set {shortened(name, 200)!r}" + (f", subset {subset!r}" if subset else "") + f", split {split!r}"
    try:
        rows = datasets.load_dataset(name, subset, split=split, revision=revision, streaming=streaming)
        yield from rows
    except (datasets.exceptions.DatasetsError, *DATASET_ERRORS) as error:
        raise InputError(
            f"{where} cannot be read ({shortened(first_line(error), 300)}); check its name, subset, split and "
            "revision, or give a local .txt, .jsonl or .parquet file"
        ) from error


def _columns(row: dict[Any, Any]) -> str:
    return shortened(sorted(map(str, row)), 200)


def _document(row: Any, column: str | None, where: str) -> Document:
    """The text, or the chat, of one row. A row is a string or a dictionary of columns."""
    if isinstance(row, str):
        return _checked(row, where)
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
        return _checked(value, where)
    if isinstance(value, list) and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value):
        return [
            {"role": _content(turn["role"], f"{where}, role {number}"), "content": _content(turn["content"], place)}
            for number, turn in enumerate(value, start=1)
            for place in (f"{where}, message {number}",)
        ]
    raise InputError(f"{where}: column {column!r} holds neither text nor messages with a role and a content")


def _content(value: Any, where: str) -> str:
    """The text of a message: a string, nothing, or a list of parts, of which those of text are joined."""
    if value is None:
        return ""
    if isinstance(value, str):
        return _checked(value, where)
    if isinstance(value, list):
        return "".join(_part(part, where) for part in value)
    raise InputError(f"{where} holds {type(value).__name__}, not text; write a string, or a list of parts of text")


def _part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
    if not isinstance(text, str):
        kind = part.get("type", "no type") if isinstance(part, dict) else type(part).__name__
        raise InputError(f"{where} has a part that is no text ({shortened(kind)}); leave such chats out")
    return _checked(text, where)


def _checked(text: str, where: str) -> str:
    """The same text. Raises InputError for half a character, which no tokenizer reads."""
    if not text.isascii() and (found := HALVES.search(text)):
        raise InputError(f"{where} has {found[0]!a}, half of a character, at {found.start()}; correct the text")
    return text
