"""The surroundings of the program: standard streams that are closed, full or of another encoding, and its folder."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from llmcompress.errors import DiskError, first_line

QUIET = {"-q", "--quiet"}
LIGHT = {"--help", "--version", "doctor", "inspect", "recipe", "recipes", "report"}  # need no temporary files


def guarded(program: Callable[[], object]) -> int:
    """Run a program that ends by `SystemExit`, and return its exit code.

    What it could not print is a sentence on standard error and code 4; closed pipes end it quietly.
    """
    there = _opened()
    if (wrong := _unusable()) is not None:
        if there and "--json" in sys.argv:
            sys.stdout.write(json.dumps({"error": {"code": DiskError.exit_code, "message": wrong}}, indent=2) + "\n")
        return _said(wrong)
    if not there and not QUIET & set(sys.argv):
        return _said("standard output is closed; send it to a file, or add --quiet to a command that needs none")
    code: int | str | None = 0
    try:
        program()
    except SystemExit as stop:
        code = stop.code
    except OSError as error:  # commands have sentences for theirs, so this one is about their help
        code = _said(unwritten(error))
    try:
        sys.stdout.flush()
    except OSError as error:
        silence(sys.stdout)
        if not code:
            code = 1 if error.errno == errno.EPIPE else _said(unwritten(error))
    return code if isinstance(code, int) else int(code is not None)


@contextmanager
def writing_to(stream: TextIO) -> Iterator[None]:
    """Raise DiskError where standard output, `stream`, cannot be written; a closed pipe stays what it is."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        silence(stream)
        raise DiskError(unwritten(error)) from error


def unwritten(error: OSError) -> str:
    """Return the sentence on standard output that cannot be written."""
    return f"standard output cannot be written ({error.strerror or first_line(error)}); send it to another place"


def silence(stream: TextIO) -> None:
    """Send what a stream still holds nowhere, so that Python does not fail on it once more at its end."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, io.UnsupportedOperation):
        pass


def _unusable() -> str | None:
    """Return what is wrong with the folders that a process has, without which torch cannot even be imported."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the working folder was removed; change into one that exists"
    if sys.argv[1:2] and sys.argv[1] not in LIGHT:
        try:
            tempfile.gettempdir()
        except FileNotFoundError:
            return "there is no folder for temporary files; set TMPDIR to one that can be written to"
    return None


def _opened() -> bool:
    """Put /dev/null where a standard stream is closed, or the next file that is opened, such as one of weights, takes
    its number and receives what is printed; False if standard output was closed.

    Characters that a stream's encoding lacks are escaped.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    there = sys.stdout is not None
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return there


def _said(sentence: str) -> int:
    """Print a sentence as a command ends with it, and return its exit code."""
    sys.stderr.write(f"[{DiskError.exit_code}] {sentence}\n")
    return DiskError.exit_code
