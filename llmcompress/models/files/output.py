"""Outputs that are complete or absent: files replaced in one step, and folders made beside their place, under a lock.

A folder `OUT.partial` of unfinished work carries a mark that says that it is ours, and is removed when it is done.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from llmcompress.errors import DiskError, LockedError, RecipeError, format_bytes
from llmcompress.models.files.file_names import CONFIG, MANIFEST, REPORT
from llmcompress.models.files.reading import is_text

STAGING = "partial"  # the suffix of a folder or file of unfinished work
MARK = ".llmcompress"  # a file in a folder of unfinished work, which says that it is ours
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, on Linux's file systems
BESIDE = 24  # bytes that names beside an output have more than its own, such as ".training.partial.lock"
MOUNTED = "is where a disk is mounted, whose place no finished folder can take; choose a new folder inside it"


@contextmanager
def disk_errors(path: Path, way_out: str = "free some space and start again") -> Iterator[None]:
    """Raise DiskError, which ends with `way_out`, for an OSError inside the context."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"{path} cannot be written ({error.strerror or error}); {way_out}") from error


def replace_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 as `replace_bytes` does."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file so that the disk has the old one or the whole new one, even if the power fails. Raises OSError."""
    with replace_file(path) as staged:
        staged.write_bytes(content)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`; its file replaces that of `path`, on the disk, when the context ends well.

    Its permissions follow the umask: libraries make files that only their owner can read.
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


def check_writable(output: Path, needed: int, beside: Sequence[Path] = ()) -> None:
    """Raise DiskError unless a folder with `needed` bytes can be made at `output`, which must not exist yet.

    Bytes in `<output>.partial` and in the folders `beside` count as free: they will be resumed from or deleted.
    """
    check_output_name(output)
    if output.is_symlink():
        raise DiskError(f"{output} is a link; give the folder itself, or choose another output folder")
    if os.path.ismount(output):
        raise DiskError(f"{output} {MOUNTED}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DiskError(f"{output} exists already; remove it or choose another output folder")
    parent = _parent(output)
    staging = staging_of(output)
    is_ours(staging)
    unfinished = (path for folder in (staging, *beside) for path in folder.rglob("*"))
    free = shutil.disk_usage(parent).free + sum(path.stat().st_size for path in unfinished)
    if free < needed:
        raise DiskError(
            f"{output} needs {format_bytes(needed)} and its disk has {format_bytes(free)} free; choose another"
        )


def check_outside(output: Path) -> None:
    """Raise DiskError for an output inside a checkpoint that llmcompress wrote, which has all its files."""
    for folder in output.absolute().resolve().parents:
        if (folder / MANIFEST).is_file() and any((folder / name).is_file() for name in (REPORT, CONFIG)):
            raise DiskError(
                f"{output} is inside the checkpoint {folder}, where only its own files may be; write it elsewhere"
            )


def _parent(output: Path) -> Path:
    """Return the deepest folder above `output` that exists. Raises DiskError if nothing can be written there."""
    check_outside(output)
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise DiskError(f"{parent} is not a folder that can be written to; choose another output folder")
    return parent


def staging_of(output: Path) -> Path:
    """Return the folder or file that will become `output`. Raises what `check_name` raises."""
    check_name(output)
    return output.with_name(f"{output.name}.{STAGING}")


@contextmanager
def lock_output(output: Path, kind: str, stage: str = STAGING) -> Iterator[Path]:
    """Keep other processes from writing `output`, and yield its staging path; `kind`: "output folder" or "file".

    `stage`: the part of the work; other parts have locks of their own. Raises LockedError while another process writes
    there, DiskError for a place that cannot be written to.
    """
    check_name(output)
    staging = output.with_name(f"{output.name}.{stage}")
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


@contextmanager
def lock_work(output: Path | None) -> Iterator[None]:
    """Keep other processes from the work before `output` is written, which has a lock of its own; None: from nothing.

    Raises what `lock_output` raises.
    """
    with nullcontext() if output is None else lock_output(output, "output folder", "change"):
        yield


def claim_folder(staging: Path) -> None:
    """Make the folder `staging`, and mark it as ours. Raises DiskError for one that somebody else made."""
    with disk_errors(staging, "free some space, or choose another output folder"):
        if not is_ours(staging):
            staging.mkdir()
            (staging / MARK).write_text("unfinished work of llmcompress; it may be removed\n", encoding="utf-8")
            sync(staging)


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


def clear_folder(staging: Path, mark: str = MARK) -> None:
    """Remove everything from a folder of ours, except the file that marks it."""
    for path in staging.iterdir():
        if path.name != mark:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_folder(staging: Path, mark: str = MARK) -> None:
    """Remove a folder of ours, its mark last, so that it is ours until it is gone."""
    clear_folder(staging, mark)
    (staging / mark).unlink(missing_ok=True)
    staging.rmdir()


def merge_mark(staging: Path) -> Path:
    """Return the file in `staging` that says that merging of the checkpoint's parts has begun."""
    return staging / "merging"


def check_name(output: Path) -> None:
    """Raise DiskError for an output whose name, with a suffix for the files beside it, no file can have."""
    if not output.name:
        raise DiskError(f"'{output}' is no name of a new folder or file; choose another output")
    names = [len(os.fsencode(part)) for part in output.parts]
    if max(names, default=0) > LONGEST_NAME or (names and names[-1] > LONGEST_NAME - BESIDE):
        raise DiskError(
            f"{output} is too long a name: an output's has at most {LONGEST_NAME - BESIDE} bytes, that of a folder "
            f"{LONGEST_NAME}; choose a shorter one"
        )
    if os.path.expanduser(output) != str(output):  # a folder of that name would be removed by `rm -r ~`
        raise DiskError(f"{output} begins with ~, which stands for a home folder in a shell; write that folder in full")
    if len(os.fsencode(output)) > LONGEST_PATH or "\0" in str(output):
        raise DiskError(f"{str(output)[:LONGEST_NAME]!r} is no path that a file can have; choose another output")


def check_output_name(output: Path) -> None:
    """Raise DiskError as `check_name` does, and for a folder that safetensors could not write to."""
    check_name(output)
    if not is_text(output):
        raise DiskError(f"{str(output)!r} is not UTF-8, which safetensors requires of paths; choose another output")


def check_new_file(output: Path, kinds: Sequence[str], what: str) -> None:
    """Raise RecipeError if `output` is of none of the `kinds` (".md"), DiskError if it exists or its folder does not.

    `what` names its content.
    """
    check_name(output)
    if output.suffix not in kinds:
        raise RecipeError(f"{what} is written as {' or '.join(kinds)}, not as {output.name}; rename the output file")
    if output.exists():
        raise DiskError(f"{output} exists already; remove it or choose another output file")
    if not output.absolute().parent.is_dir():
        raise DiskError(f"there is no folder {output.absolute().parent}; make it or choose another output file")
    check_outside(output)
    if not os.access(output.absolute().parent, os.W_OK):
        raise DiskError(f"{output.absolute().parent} cannot be written to; choose another output file")


def write_new_file(output: Path, content: str | bytes) -> None:
    """Write all of `content`, a text in UTF-8, or nothing. Raises DiskError."""
    try:
        replace_bytes(output, content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise DiskError(f"{output} cannot be written ({error.strerror}); choose another output file") from error
