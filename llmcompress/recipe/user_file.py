"""Read what a user names as a file: a file, or a pipe that ends; never a device, and only up to a limit."""

from __future__ import annotations

import errno
import io
import os
import select
import stat
from pathlib import Path
from typing import BinaryIO

PATIENCE = 10.0  # seconds that a pipe may stay silent
CHUNK = 1 << 16  # bytes


def expanded(path: str | Path) -> Path:
    """Return a path with the home folder in place of `~`; as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def is_regular(path: str | Path) -> bool:
    """True if `path` names a file; False for a path that cannot be, such as one with a NUL character."""
    try:
        return expanded(path).is_file()
    except (OSError, ValueError):  # too long, or with NUL or half a character
        return False


def open_file(path: str | Path) -> BinaryIO:
    """Open a file, or a pipe, for reading. Raises OSError, whose `strerror` is a phrase, for anything else."""
    try:
        descriptor = os.open(expanded(path), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except ValueError as error:  # NUL, or half a character
        raise OSError(errno.EINVAL, f"no path can be so: {error}") from error
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISFIFO(kind):
        os.close(descriptor)
        raise OSError(errno.EINVAL, os.strerror(errno.EISDIR) if stat.S_ISDIR(kind) else "it is a device")
    os.set_blocking(descriptor, stat.S_ISREG(kind))
    return os.fdopen(descriptor, "rb", buffering=-1 if stat.S_ISREG(kind) else 0)


def read_file(path: str | Path, most: int) -> bytes:
    """Return the bytes of a file or pipe. Raises OSError where there are more than `most`, or none come for long."""
    with open_file(path) as file:
        found = file.read(most + 1) if isinstance(file, io.BufferedReader) else _drained(file, most)
    if len(found) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes")
    return found


def _drained(pipe: BinaryIO, most: int) -> bytes:
    """Return what comes out of a pipe until its writers close it; a little more than `most` at the most."""
    found = bytearray()
    while len(found) <= most:
        if not select.select([pipe], [], [], PATIENCE)[0]:
            raise OSError(errno.ETIMEDOUT, f"it is a pipe that has been silent for {PATIENCE:g} seconds")
        piece = pipe.read(CHUNK)
        if not piece:
            break
        found += piece
    return bytes(found)
