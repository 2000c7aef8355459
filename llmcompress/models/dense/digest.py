"""Digests of files: they identify a model by its content, whatever its folder is called and whenever it was written."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from hashlib import file_digest, sha256
from pathlib import Path

from llmcompress.models.dense.remote_code import code_files
from llmcompress.models.files.integrity import weight_files

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*", "merges.txt")
TOKENIZER_KINDS = ("*.model", "*.tiktoken")


def content_digest(files: Iterable[Path]) -> str:
    """Return one digest of the contents of `files`, in this order.

    A file is read once in a process, and again when its inode, its size or one of its times is another.
    """
    digest = sha256()
    for path in files:
        found = path.stat()
        digest.update(_digest(path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
    return digest.hexdigest()


@lru_cache(maxsize=4096)
def _digest(path: Path, *_state: int) -> bytes:
    with path.open("rb") as file:
        return file_digest(file, "sha256").digest()


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files in a model's folder that decide how it reads text, sorted."""
    found = {path for pattern in (*TOKENIZER, *TOKENIZER_KINDS) for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file())


def tokenizer_digest(folder: Path) -> str:
    """Return one digest of the names and contents of a model's tokenizer files."""
    files = tokenizer_files(folder)
    names = "\n".join(path.name for path in files)
    return sha256(f"{names}\n{content_digest(files)}".encode()).hexdigest()


def teacher_digest(folder: Path) -> str:
    """Return one digest of the files that decide what a model predicts: its config, its weights and its own code."""
    code = (folder / name for name in code_files(folder))
    return content_digest([folder / "config.json", *weight_files(folder), *code])
