"""The files that a text is read from: their kinds, patterns and lists of them, and their names without folders."""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmcompress.errors import InputError

ROW_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
FILE_KINDS = (".txt", *ROW_KINDS)
PACKED_KINDS = (".gz", ".zst")  # follow those of text


def file_kind(name: str) -> str:
    """Return the kind of text that a file's name ends with, as ".jsonl" for `a.jsonl.gz`; another ending as it is."""
    path = Path(name)
    return Path(path.stem if path.suffix.lower() in PACKED_KINDS else name).suffix.lower()


def is_file(dataset: str) -> bool:
    """True if `dataset` stands for local files, not for the name of a data set."""
    names = split_names(dataset)
    is_known = file_kind(dataset) in FILE_KINDS or os.path.isfile(os.path.expanduser(dataset))
    return is_known or len(names) > 1 or glob.has_magic(dataset)


def holds_documents(dataset: str) -> bool:
    """True for local files of rows, packed files, patterns, lists and folders; False for one file of plain text."""
    path = os.path.expanduser(dataset)
    is_many = not os.path.exists(path) and (len(split_names(dataset)) > 1 or glob.has_magic(dataset))
    ends = file_kind(dataset) in ROW_KINDS or dataset.lower().endswith(PACKED_KINDS)
    return is_many or ends or os.path.isdir(path)


def split_names(dataset: str) -> list[str]:
    """Return the names of files in a text: one, or several with commas between them."""
    if os.path.exists(os.path.expanduser(dataset)):
        return [dataset]
    return [name.strip() for name in dataset.split(",") if name.strip()]


def list_files(dataset: str) -> list[Path]:
    """Return local files in the order of their names; a pattern such as `data/*.jsonl` that matches none as it is.

    Raises InputError for a file that is named twice.
    """
    files: list[Path] = []
    for name in map(os.path.expanduser, split_names(dataset)):
        matches = [] if os.path.exists(name) else sorted(filter(os.path.isfile, glob.iglob(name, recursive=True)))
        files += map(Path, matches or [name])
    for path, count in Counter(files).most_common(1):
        if count > 1:
            raise InputError(f"{path} is {count} times among the files of the text; name each file once")
    return files


def join_names(names: Any) -> Any:
    """Return a list of files as one text, with commas between them. Raises ValueError for a name with a comma."""
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) and name for name in names):
        return names
    if odd := [name for name in names if "," in name]:
        raise ValueError(f"dataset has {odd[0]!r} in its list, whose commas part names; rename that file")
    return ",".join(names)


def hide_folder(dataset: str) -> str:
    """Return the name of a text without the folders of this machine: a Hub id as it is, the last part of a path."""
    if len(names := split_names(dataset)) > 1:
        return ",".join(map(hide_folder, names))
    is_local = is_file(dataset) or dataset.startswith(("/", ".", "~")) or Path(dataset).is_dir()
    if glob.has_magic(dataset) and not os.path.exists(dataset):
        parts = Path(dataset).parts
        return str(Path(*parts[[glob.has_magic(part) for part in parts].index(True) :]))
    return last_part(dataset) if is_local else dataset


def last_part(path: str) -> str:
    """Return the last part of a path; for `.` and `..`, that of the folder itself."""
    name = Path(path).name
    return Path(path).resolve().name or "root" if name in ("", "..") else name


def files_sha256(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of the content of files, one behind the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
