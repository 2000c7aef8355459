"""Text of each kind that a calibration is a mixture of: of `builtin`, or of a list of files, each of which is a kind.

What is read here are documents that the calibration sequences do not have, so nothing was fitted to them.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from itertools import islice

from torch import Tensor

from llmcompress.data.builtin import BUILTIN_KINDS, builtin_kinds
from llmcompress.data.columns import Document
from llmcompress.data.packing import count_all, pack_documents
from llmcompress.data.text import read_documents, shuffle
from llmcompress.errors import InputError
from llmcompress.recipe.calibration import Calibration
from llmcompress.recipe.text_files import hide_folder, is_file, list_files

KIND_WINDOWS = 2  # windows of each kind

Encode = Callable[[Document], Iterable[list[int]]]


def count_kinds(config: Calibration) -> int:
    """Return the number of kinds of a text, without reading it."""
    return len(BUILTIN_KINDS) if config.dataset == "builtin" else len(list_files(config.dataset))


def documents_by_kind(config: Calibration) -> Mapping[str, Iterable[Document]]:
    """Return the documents of each kind by its name. Raises InputError for text that is not of several kinds."""
    if config.dataset == "builtin":
        return builtin_kinds()
    files = list_files(config.dataset) if is_file(config.dataset) else []
    names = [path.name.split(".")[0] for path in files]
    if len(files) < 2:
        raise InputError(
            f"target.worst compares kinds of text, and {config.dataset} is one; use builtin, or several files"
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            f"target.worst calls kinds of text by their files, and two of {hide_folder(config.dataset)} are named "
            f"{twice[0]!r}; rename one"
        )
    return {
        name: read_documents(str(path), column=config.column) for name, path in sorted(zip(names, files, strict=True))
    }


def kind_windows(
    config: Calibration, encode: Encode, bos: int | None, length: int, read: Container[str]
) -> dict[str, Tensor]:
    """Return at most KIND_WINDOWS windows of each kind of text, int64 [windows, length], by the kind's name.

    Each document gives its first tokens, so windows are of several. `encode`: a document's tokens, piece by piece;
    `read`: `name_document` of those that calibration has. Raises InputError for a kind of which no window is left.
    """
    windows = {}
    for kind, documents in documents_by_kind(config).items():
        order = shuffle(documents, config.seed) if config.shuffle else documents
        others = (document for document in order if name_document(document) not in read)
        beginnings = (count_all(_begin(encode(document), length)) for document in others)
        windows[kind] = pack_documents(beginnings, bos, length, KIND_WINDOWS).sequences.ids
        if not len(windows[kind]):
            raise InputError(
                f"target.worst needs a window of {length} tokens of {kind} beside the calibration sequences, and the "
                f"text has none left; give more documents of it, or lower calibration.samples"
            )
    return windows


def name_document(document: Document) -> str:
    """Return what tells a document from others."""
    return document if isinstance(document, str) else repr(document)


def _begin(pieces: Iterable[list[int]], length: int) -> Iterator[list[int]]:
    """Yield the first `length` tokens of a document."""
    tokens = (token for piece in pieces for token in piece)
    yield list(islice(tokens, length))
