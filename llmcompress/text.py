"""Where text comes from: files, `datasets`, this package and the Python standard library, one document at a time.

A document is a string, or a chat: a list of `{"role": ..., "content": ...}` messages. Nothing here tokenizes.
"""

import ast
import functools
import hashlib
import itertools
import json
import platform
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from llmcompress.errors import InputError, RecipeError
from llmcompress.recipe.calibration import FILE_KINDS, is_file

Message = dict[str, str]
Document = str | list[Message]

SHUFFLE_BUFFER = 4096  # documents held while shuffling; a smaller source is shuffled completely
CHAT_COLUMNS = ("messages", "conversation", "conversations")

# Parts of the standard library that distributions leave out, or that hold code or tables rather than prose.
SKIPPED_MODULES = frozenset(
    {"distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "tkinter", "turtle", "turtledemo"}
)
TEST_EVERY = 6  # one document in six of the standard library is evaluation text
TEXTS = Path(__file__).with_name("texts")
BETWEEN = "\n%%%\n"  # documents in a file of these


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
        rows = _file_rows(Path(dataset).expanduser())
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


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with newlines as its line ends. Raises InputError when it cannot be read as such."""
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); give the path of a text file") from error


# --- text that this package ships -------------------------------------------------------------------------------


@functools.cache
def builtin_documents() -> tuple[str, ...]:
    """Text of many kinds, for who has none: articles, news, fiction, textbooks, dialogues, letters and code written
    for this package (`texts/`), and as many characters of the standard library's "train" documents.

    None of it is evaluation text of any benchmark. Statistics of one kind of text suit that kind alone (LOG.md).
    """
    own = tuple(text for path in sorted(TEXTS.glob("*.txt")) for text in read_text(path).strip().split(BETWEEN))
    left, beside = sum(map(len, own)), []
    for _, text in stdlib_documents("train"):
        beside.append(text[:left])
        left -= len(beside[-1])
        if not left:
            break
    return (*own, *beside)


# --- the standard library ---------------------------------------------------------------------------------------


def stdlib_text(split: str) -> str:
    """One text out of all documents of `stdlib_documents(split)`, blank lines between them."""
    return "\n\n".join(text for _, text in stdlib_documents(split))


def stdlib_source() -> str:
    """What to write in a report for text from the standard library: it differs between Python versions."""
    return f"stdlib (Python {platform.python_version()} documentation)"


def stdlib_documents(split: str) -> tuple[tuple[str, str], ...]:
    """(name, text) of the language reference topics and module docstrings that this Python ships: about 1.7 MB.

    `split` is "train" or "test". Documents are split by a hash of their name, and a paragraph that occurs twice is
    kept once, so no paragraph of the evaluation text can be met in calibration. The hash also orders them, which
    mixes reference and modules. Sources are parsed, never imported.
    """
    if split not in ("train", "test"):
        raise RecipeError(f"the standard library's text has no split {split!r}; use 'train' or 'test'")
    wanted = split == "test"
    chosen = tuple(document for document in _stdlib_paragraphs_once() if _is_test(document[0]) == wanted)
    if not chosen:
        raise InputError("this Python ships no documentation in source form; give a text file or a data set instead")
    return chosen


def _name_hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _is_test(name: str) -> bool:
    return _name_hash(name)[-1] % TEST_EVERY == 0


@functools.cache
def _stdlib_paragraphs_once() -> tuple[tuple[str, str], ...]:
    """All documents of the standard library without the paragraphs that an earlier document already has."""
    seen: set[str] = set()
    documents = []
    for name, text in itertools.chain(_topics(), _docstrings()):
        fresh = []
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                fresh.append(paragraph.strip("\n"))
        if fresh:
            documents.append((name, "\n\n".join(fresh)))
    return tuple(sorted(documents, key=lambda document: _name_hash(document[0])))


def _topics() -> Iterator[tuple[str, str]]:
    """The language reference as `help()` shows it: pydoc_data/topics.py is one dictionary of texts."""
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    if not path.is_file():
        return
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            for name, text in sorted(ast.literal_eval(node.value).items()):
                yield f"topic {name}", text


def _docstrings() -> Iterator[tuple[str, str]]:
    """All docstrings of one module after the other, in the order of its source."""
    library = Path(sysconfig.get_path("stdlib"))
    for module in sorted(sys.stdlib_module_names - SKIPPED_MODULES):
        paths = [library / f"{module}.py", *sorted((library / module).rglob("*.py"))]
        for path in paths:
            inner = path.relative_to(library)
            if not path.is_file() or {"test", "tests"} & set(inner.parts):
                continue
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
            found = (_docstring(node) for node in ast.walk(tree))
            yield inner.as_posix(), "\n\n".join(text for text in found if text)


def _docstring(node: ast.AST) -> str | None:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return ast.get_docstring(node)
    return None


# --- files ------------------------------------------------------------------------------------------------------


def _file_rows(path: Path) -> Iterator[Any]:
    if not path.is_file():
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
        raise InputError(f"{path} is not a readable parquet file ({_first_line(error)})") from error


# --- data sets --------------------------------------------------------------------------------------------------


def _hub_rows(name: str, subset: str | None, revision: str | None, split: str, streaming: bool) -> Iterator[Any]:
    import datasets

    where = f"data set {name!r}" + (f", subset {subset!r}" if subset else "") + f", split {split!r}"
    try:
        rows = datasets.load_dataset(name, subset, split=split, revision=revision, streaming=streaming)
        yield from rows
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise InputError(
            f"{where} cannot be read ({_first_line(error)}); check its name, subset, split and revision, "
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


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
