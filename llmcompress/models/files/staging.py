"""The folder `OUT.partial` in which an output is made: locked, marked as ours, and removed when it is done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from llmcompress.errors import DiskError, LockedError
from llmcompress.models.files.atomic_write import sync
from llmcompress.models.files.file_names import check_output_name

MARK = ".llmcompress"  # a file in a folder of unfinished work, which says that it is ours


def check_output(output: Path, needed: int) -> None:
    """Raise DiskError unless a folder with `needed` bytes can be made at `output`, which must not exist yet.

    Bytes in `<output>.partial` count as free: they will be resumed from or deleted.
    """
    check_output_name(output)
    if output.is_symlink():
        raise DiskError(f"{output} is a link; give the folder itself, or choose another output folder")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DiskError(f"{output} exists already; remove it or choose another output folder")
    parent = _parent(output)
    staging = staging_of(output)
    is_ours(staging)
    free = shutil.disk_usage(parent).free + sum(path.stat().st_size for path in staging.rglob("*"))
    if free < needed:
        raise DiskError(f"{output} needs {megabytes(needed)} and its disk has {megabytes(free)} free; choose another")


def _parent(output: Path) -> Path:
    """Return the deepest folder above `output` that exists. Raises DiskError if nothing can be written there."""
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise DiskError(f"{parent} is not a folder that can be written to; choose another output folder")
    return parent


def staging_of(output: Path) -> Path:
    """Return the folder or file that will become `output`."""
    return output.with_name(output.name + ".partial")


def megabytes(count: int) -> str:
    """A byte count for people."""
    return f"{count / 1e6:.1f} MB"


@contextmanager
def locked(output: Path, kind: str) -> Iterator[Path]:
    """Keep other processes from writing `output`, a "folder" or "file", while it lasts; give the path beside it where
    what becomes it is made.

    Raises LockedError while another process writes there, DiskError where nothing can be written.
    """
    staging = staging_of(output)
    lock = FileLock(staging.with_name(staging.name + ".lock"), timeout=0)
    _parent(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise LockedError(f"{output} is being written by another process; wait, or choose another {kind}") from error
    except OSError as error:
        raise DiskError(f"{output} cannot be written ({error.strerror}); choose another {kind}") from error
    try:
        yield staging
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def claim(staging: Path) -> None:
    """Make the folder `staging`, and mark it as one of ours. Raises DiskError for one that somebody else made."""
    try:
        if not is_ours(staging):
            staging.mkdir()
            (staging / MARK).write_text("unfinished work of llmcompress; it may be removed\n", encoding="utf-8")
            sync(staging)
    except OSError as error:
        raise DiskError(
            f"{staging} cannot be written ({error.strerror}); free some space, or choose another output folder"
        ) from error


def is_ours(staging: Path) -> bool:
    """True if `staging` is a folder that llmcompress left, False if there is nothing.

    Raises DiskError for a file, a link or a folder that somebody else made.
    """
    if staging.is_dir() and not staging.is_symlink():
        if (staging / MARK).is_file():
            return True
        if not any(staging.iterdir()):  # the end came before the mark
            staging.rmdir()
            return False
    elif not os.path.lexists(staging):
        return False
    raise DiskError(f"{staging} is in the way and was not made by llmcompress; move it, or choose another output")


def clear(staging: Path) -> None:
    """Remove everything from a folder of ours, except its mark."""
    for path in staging.iterdir():
        if path.name != MARK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove(staging: Path) -> None:
    """Remove a folder of ours, its mark last, so that it is ours until it is gone."""
    clear(staging)
    (staging / MARK).unlink(missing_ok=True)
    staging.rmdir()


def merge_mark(staging: Path) -> Path:
    """Return the file in `staging` that says that the parts of the checkpoint there are being merged, or are."""
    return staging / "merging"
