"""Text that is always there: the texts of this package, and the documentation that Python ships."""

import ast
import contextlib
import functools
import gc
import hashlib
import itertools
import platform
import sys
import sysconfig
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from llmcompress.errors import InputError, RecipeError

# Parts of the standard library that distributions leave out, or that hold code or tables rather than prose.
SKIPPED_MODULES = frozenset(
    {"distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "tkinter", "turtle", "turtledemo"}
)
TEST_EVERY = 6  # one document in six of the standard library is evaluation text
TEXTS = Path(__file__).with_name("texts")
DOCUMENTATION = 340_000  # characters of it in text of many kinds, a quarter
BETWEEN = "\n%%%\n"  # documents in a file of these


@functools.cache
def builtin_documents() -> tuple[str, ...]:
    """Return text of many kinds: that written for this package (`texts/`), and some of the "train" documentation.

    None of it is evaluation text of any benchmark. Statistics of one kind of text suit that kind alone (research/log).
    """
    own = tuple(
        text for path in sorted(TEXTS.glob("*.txt")) for text in path.read_text(encoding="utf-8").strip().split(BETWEEN)
    )
    left, beside = DOCUMENTATION, []
    for _, text in stdlib_documents("train"):
        beside.append(text[:left])
        left -= len(beside[-1])
        if not left:
            break
    return (*own, *beside)


def stdlib_text(split: str) -> str:
    """Return all documents of `stdlib_documents(split)` as one text, blank lines between them."""
    return "\n\n".join(text for _, text in stdlib_documents(split))


def stdlib_source() -> str:
    """Return the report's name for text of the standard library, which differs between Python versions."""
    return f"stdlib (Python {platform.python_version()} documentation)"


def stdlib_documents(split: str) -> tuple[tuple[str, str], ...]:
    """Return (name, text) of the language reference topics and module docstrings that this Python ships: 1.7 MB.

    `split`: "train" or "test", by a hash of the name, which also orders the documents. No paragraph is in both.
    Sources are parsed, never imported.
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
    """Return all documents of the standard library, each paragraph once."""
    seen: set[str] = set()
    documents = []
    with _without_collector():
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


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Pause the garbage collector: syntax trees have no cycles, and looking for some takes longer than parsing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _topics() -> Iterator[tuple[str, str]]:
    """Yield the language reference as `help()` shows it: pydoc_data/topics.py is one dictionary of texts."""
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    if not path.is_file():
        return
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            for name, text in sorted(ast.literal_eval(node.value).items()):
                yield f"topic {name}", text


def _docstrings() -> Iterator[tuple[str, str]]:
    """Yield all docstrings of one module after the other, in the order of its source."""
    library = Path(sysconfig.get_path("stdlib"))
    for module in sorted(sys.stdlib_module_names - SKIPPED_MODULES):
        paths = [library / f"{module}.py", *sorted((library / module).rglob("*.py"))]
        for path in paths:
            inner = path.relative_to(library)
            if not path.is_file() or {"test", "tests"} & set(inner.parts):
                continue
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
            found = map(ast.get_docstring, _docstring_nodes(tree))
            yield inner.as_posix(), "\n\n".join(text for text in found if text)


def _docstring_nodes(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield statements that may have a docstring, in the order of `ast.walk`, without looking into expressions."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        for part in ("body", "handlers", "orelse", "finalbody", "cases"):
            waiting.extend(getattr(node, part, ()))
