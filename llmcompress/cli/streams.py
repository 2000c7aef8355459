"""The standard streams of the program: closed, full, or of an encoding that lacks a character."""

from __future__ import annotations

import atexit
import errno
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TextIO

from llmcompress.errors import DiskError, first_line

QUIET = {"-q", "--quiet"}


def run_program(program: Callable[[], object]) -> int:
    """Run a program that ends by `SystemExit`, and return its exit code.

    Output that cannot be written is a sentence on standard error, and code 4. A reader that closes the pipe early is no
    error.
    """
    has_output = _open_streams()
    try:
        os.getcwd()
    except FileNotFoundError:
        message = "the working folder was removed; change into one that exists"
        if has_output and "--json" in sys.argv:
            sys.stdout.write(json.dumps({"error": {"code": DiskError.exit_code, "message": message}}, indent=2) + "\n")
        return _print_error(message)
    if not has_output and not QUIET & set(sys.argv):
        return _print_error("standard output is closed; send it to a file, or add --quiet to a command that needs none")
    code: int | str | None = 0
    try:
        program()
    except SystemExit as stop:
        code = stop.code
    except OSError as error:  # commands handle their own; this one comes from help
        code = _print_error(_describe(error))
    try:
        sys.stdout.flush()
    except OSError as error:
        _discard(sys.stdout)
        if not code:
            code = 1 if error.errno == errno.EPIPE else _print_error(_describe(error))
    return code if isinstance(code, int) else int(code is not None)


def end_process(code: int) -> NoReturn:
    """End the program with an exit code, all of its output written.

    A process that a launcher started skips the end of the interpreter: there, threads of gloo that still hold a tensor
    abort the process now and then (PyTorch's pull request 179291), and the launcher calls a finished run a failed one.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def writing_to(stream: TextIO) -> Iterator[None]:
    """Raise DiskError if `stream`, standard output, cannot be written. A closed pipe stays a BrokenPipeError."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard(stream)
        raise DiskError(_describe(error)) from error


def _describe(error: OSError) -> str:
    return f"standard output cannot be written ({error.strerror or first_line(error)}); send it to another place"


def _discard(stream: TextIO) -> None:
    """Send what a stream still holds to /dev/null, since Python would fail to write it once more at exit."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, io.UnsupportedOperation):
        pass


def _open_streams() -> bool:
    """Open /dev/null for every standard stream that is closed, and let streams escape characters that they lack.

    Otherwise the next file that is opened, such as one of weights, would get the stream's number and receive what is
    printed. Returns False if standard output was closed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    has_output = sys.stdout is not None
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return has_output


def _print_error(sentence: str) -> int:
    """Print a sentence in the way that commands end, and return its exit code."""
    sys.stderr.write(f"[{DiskError.exit_code}] {sentence}\n")
    return DiskError.exit_code
