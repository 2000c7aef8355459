"""Replacing files so that the old one or the whole new one is there, on the disk, even if the power fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """`replace_bytes` of a text in UTF-8."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file so that the old one or the new one is there, on the disk, never half of it. Raises OSError."""
    with replacing(path) as staged:
        staged.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to, which takes its place, on the disk, when the context ends well.

    Its permissions follow the umask, whoever writes it: libraries make files that only their owner can read.
    """
    staged = path.with_name(f".{path.name}.partial")
    try:
        staged.touch()
        mode = staged.stat().st_mode
        yield staged
        staged.chmod(mode)
        sync(staged)
        staged.rename(path)
        sync(path.parent)
    finally:
        staged.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
