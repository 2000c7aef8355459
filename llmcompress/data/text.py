"""The sources of text: files, `datasets`, this package and the Python standard library, one document at a time.

Nothing here tokenizes. A `Reading` counts what was understood of a source, for people to see.
"""

import logging
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from llmcompress.data.builtin import builtin_documents, stdlib_documents
from llmcompress.data.columns import Document, count_unread, describe_absence, read_row
from llmcompress.data.files import DATASET_ERRORS, LONGEST_TEXT, arrow_rows, file_rows, is_saved
from llmcompress.errors import InputError, first_line, list_names
from llmcompress.recipe.calibration import OFFLINE, Calibration
from llmcompress.recipe.text_files import FILE_KINDS, file_kind, is_file, list_files
from llmcompress.recipe.yaml import shorten

LOG = logging.getLogger("llmcompress")
EXAMPLE = 100  # characters of the first document to show
TURNS = 32  # files that are read in turn; the next one begins when one ends
TURN = 1 << 14  # bytes of a document of plain text where several files are read in turn for their tokens
PATIENCE = 1000  # rows without the columns of a text before it is given up
SHUFFLE_BUFFER = 4096  # documents held while shuffling; a smaller source is shuffled completely
HELD_CHARACTERS = 1 << 28  # of them; fewer documents are held where they are longer


@dataclass
class Reading:
    """The understanding of a text so far.

    rows_by_place: number of rows read by the file, or data set, that has them; empty: number of rows without text;
    unread: number of messages by what was left out of them; kinds: number of documents by the columns that they were
    read from; cuts: notes on documents that were cut, and on files that were not read; absence: the sentence on the
    first row that lacks the columns.
    """

    rows_by_place: dict[str, int] = field(default_factory=dict)
    empty: int = 0
    unread: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    cuts: set[str] = field(default_factory=set)
    absence: str = ""

    @property
    def rows(self) -> int:
        """The number of rows read."""
        return sum(self.rows_by_place.values())

    def count(self, row: Any, document: Document, columns: tuple[str, ...]) -> None:
        """Count a row that is a document."""
        form = "text" if isinstance(document, str) else "chats"
        self.kinds[f"{form} from {shorten(', '.join(columns), 100)}" if columns else form] += 1
        self.unread += count_unread(row, columns)

    def check(self) -> None:
        """Raise InputError if rows lack the columns of a text, and all before have no text either."""
        if self.absence and not self.kinds:
            raise InputError(self.absence)

    def notes(self, source: str) -> list[str]:
        """Return the report's notes on the text `source`."""
        counts = [f"{count:,} as {kind}" for kind, count in self.kinds.most_common()]
        notes = {
            f"rows of {source} were read in several ways: {list_names(counts)}": len(counts) > 1,
            f"{self.empty:,} of {self.rows:,} rows of {source} have no text and were left out": self.empty,
        }
        if not all(self.rows_by_place.values()):
            names = [Path(place).name for place, rows in self.rows_by_place.items() if not rows]
            notes[f"{list_names(names)} of {source} gave no text: the others were enough, or these are empty"] = True
        unread = [f"{name} of {count:,} messages of {source} were left out" for name, count in self.unread.items()]
        return [*(note for note, holds in notes.items() if holds), *unread, *sorted(self.cuts)]

    def log_notes(self, source: str) -> None:
        """Log the notes on the text `source` where no report has them."""
        for note in self.notes(source):
            LOG.info("%s", note, extra={"note": True})


def read_documents(
    dataset: str,
    *,
    subset: str | None = None,
    revision: str | None = None,
    split: str | None = None,
    column: str | tuple[str, str] | None = None,
    streaming: bool = True,
    in_turn: int = 0,
    reading: Reading | None = None,
) -> Iterator[Document]:
    """Yield the documents of "builtin", "stdlib", local files as `list_files` names them, or a data set by name.

    A .txt file is one document of at most LONGEST_TEXT bytes; a longer one is several. `in_turn`: take a document of
    each of several files in turn, of at most so many bytes of a .txt file, so that none is left out where few are read;
    0: one file after the other. Blank documents are left out; `reading` counts them. How rows are understood is logged
    once, at INFO, as a record with a `note`. Raises InputError for text that cannot be read.
    """
    reading = Reading() if reading is None else reading
    files = list_files(dataset) if is_file(dataset) else []
    several = in_turn > 0 and len(files) > 1
    longest = in_turn if several else LONGEST_TEXT
    reading.rows_by_place.update(dict.fromkeys(map(str, files), 0))
    sources: Iterator[tuple[str, Iterable[Any]]]
    if files:
        sources = ((str(path), file_rows(path, longest)) for path in files)
    else:
        sources = iter([(dataset, _named_rows(dataset, subset, revision, split, streaming, reading.cuts))])
    for place, number, row in _take_turns(sources, TURNS if several else 1):
        reading.rows_by_place[place] = number
        where = f"{place}, row {number}"
        document, columns = read_row(row, column, where)
        if document is None:
            reading.absence = reading.absence or describe_absence(row, column, where)
        if not document or (isinstance(document, str) and document.isspace()):
            reading.empty += 1
            if reading.empty == PATIENCE:
                reading.check()
            continue
        reading.count(row, document, columns)
        if reading.kinds.total() == 1 and dataset not in OFFLINE:
            LOG.info("%s", _describe(dataset, reading, row, document, columns), extra={"note": True})
        if number == 2 and file_kind(place) == ".txt":
            what = "long .txt files are read in turn," if several else f"{Path(place).name} is read"
            reading.cuts.add(f"{what} as documents of at most {longest:,} bytes")
        yield document
    reading.check()


def _take_turns(sources: Iterator[tuple[str, Iterable[Any]]], width: int) -> Iterator[tuple[str, int, Any]]:
    """Yield (place, number of the row, row): a row of each source in turn, of at most `width` of them at a time."""
    unfinished: deque[tuple[str, Iterator[tuple[int, Any]]]] = deque()
    while True:
        more = islice(sources, width - len(unfinished))
        unfinished.extend((place, enumerate(rows, start=1)) for place, rows in more)
        if not unfinished:
            return
        place, rows = unfinished.popleft()
        for number, row in islice(rows, 1):
            yield place, number, row
            unfinished.append((place, rows))


def preview_text(config: Calibration) -> None:
    """Log how local text is understood, by its first row. A fault in it is a warning, since only a run reads it."""
    dataset = config.dataset
    if dataset not in OFFLINE and (is_file(dataset) or os.path.isdir(os.path.expanduser(dataset))):
        try:
            next(read_documents(dataset, split=config.split, column=config.column), None)
        except InputError as error:
            LOG.warning("%s", error)


def _named_rows(
    dataset: str, subset: str | None, revision: str | None, split: str | None, streaming: bool, cuts: set[str]
) -> Iterable[Any]:
    """Return the rows of a text that is no file; `cuts` receives a note on files that are not read."""
    match dataset:
        case "builtin":
            return builtin_documents()
        case "stdlib":
            return (text for _, text in stdlib_documents(split or "train"))
    return _hub_rows(dataset, subset, revision, split or "train", streaming, cuts)


def _describe(dataset: str, reading: Reading, row: Any, document: Document, columns: tuple[str, ...]) -> str:
    """Return a line on how a text is understood, with its first document."""
    if isinstance(document, str):
        example = document[: 2 * EXAMPLE]
    else:
        example = " | ".join(f"{turn['role'][:EXAMPLE]}: {turn['content'][:EXAMPLE]}" for turn in document[:EXAMPLE])
    files = len(list_files(dataset)) if is_file(dataset) else 1
    source = shorten(dataset, 200) + (f" ({files:,} files)" if files > 1 else "")
    others = (
        [shorten(name or "one without a name") for name in row if name not in columns] if isinstance(row, dict) else []
    )
    unread = f", without {list_names(others)}" if others else ""
    seen = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in example)
    return f"{source} is read as {next(iter(reading.kinds))}{unread}; first: {shorten(seen, EXAMPLE)}"


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


def _hub_rows(
    name: str, subset: str | None, revision: str | None, split: str, streaming: bool, cuts: set[str]
) -> Iterator[Any]:
    """Yield the rows of a data set of the Hub, or of a folder; `cuts` receives a note on files that are not read."""
    import datasets

    where = f"data set {shorten(name, 200)!r}" + (f", subset {subset!r}" if subset else "") + f", split {split!r}"
    try:
        folder = Path(os.path.expanduser(name))
        if is_saved(folder):
            yield from arrow_rows(folder, split)
            return
        source = str(folder) if folder.is_dir() else name
        rows = datasets.load_dataset(source, subset, split=split, revision=revision, streaming=streaming)
        if folder.is_dir():
            cuts |= _unread_files(folder, datasets.load_dataset_builder(source, subset).config.data_files or {})
        yield from rows
    except (datasets.exceptions.DatasetsError, *DATASET_ERRORS) as error:
        raise InputError(
            f"{where} cannot be read ({shorten(first_line(error), 300)}); check its name, subset, split and "
            f"revision, or give a local file of {', '.join(FILE_KINDS)}"
        ) from error


def _unread_files(folder: Path, read: Mapping[str, Iterable[str]]) -> set[str]:
    """Return a note on the files of text in a folder that `datasets` leaves out."""
    taken = {os.path.realpath(path) for paths in read.values() for path in paths}
    texts = (path for path in sorted(folder.rglob("[!.]*")) if path.is_file() and file_kind(path.name) in FILE_KINDS)
    left = [path.name for path in texts if os.path.realpath(path) not in taken]
    if not left or not taken:
        return set()
    return {f"{list_names(left)} in {folder.name} not read, as datasets takes files of one kind"}
