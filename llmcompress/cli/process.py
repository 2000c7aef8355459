"""The process of a command: its standard streams, the signals that stop it, and what other libraries print in it.

A stream may be closed, full, or of an encoding that lacks a character. A signal raises an exception wherever the
program is. A callback of a library may drop it, and a clean-up may turn it into another error. So the request is
remembered: the next report of progress raises it again, and it decides how the command ends. Bars of other libraries
become progress of ours, their warnings a line each.
"""

import atexit
import errno
import io
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, TextIO

from llmcompress.errors import DiskError, Termination, first_line

QUIET = {"-q", "--quiet"}
STOPS: dict[int, type[BaseException]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Termination}
EARLY = b"[130] stopped from the keyboard; nothing was left behind\n"
RETRY = 0.1  # seconds until a request that came during an import comes again
LOG, DEEPSPEED = logging.getLogger("llmcompress"), logging.getLogger("DeepSpeed")
FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


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


class StopRequests:
    """The requests to stop that a command has received, from `install` to `restore`."""

    def __init__(self) -> None:
        self._request: type[BaseException] | None = None
        self._previous: dict[int, Any] = {}
        self._imports = 0
        self._retry: threading.Timer | None = None

    def install(self) -> None:
        """Handle the signals, in the main thread; no other thread receives them."""
        if threading.current_thread() is threading.main_thread():
            self._imports = _count_imports(sys._getframe())
            self._previous = {number: signal.signal(number, self._stop) for number in STOPS}

    def restore(self) -> None:
        """Give the signals back to their handlers; `stop_early` stays off, so the command keeps its exit code."""
        self._cancel_retry()
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if handler is stop_early else handler)
        self._previous = {}

    def _cancel_retry(self) -> None:
        if self._retry is not None:
            self._retry.cancel()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._request = STOPS[number]
        if _count_imports(frame) > self._imports:  # C++ that an import starts may abort the process at an exception
            self._cancel_retry()
            self._retry = threading.Timer(RETRY, os.kill, (os.getpid(), number))
            self._retry.daemon = True
            self._retry.start()
            return
        raise self._request

    def check(self) -> None:
        """Raise a request whose exception was dropped."""
        if self._request is not None:
            raise self._request

    def decide(self, error: BaseException | None) -> BaseException | None:
        """Return the exception that a command ends with: the request if there was one and an error, else the error."""
        if error is None or self._request is None or isinstance(error, tuple(STOPS.values())):
            return error
        stop = self._request()
        for note in getattr(error, "__notes__", ()):
            stop.add_note(note)
        return stop


def _count_imports(frame: FrameType | None) -> int:
    """Count the frames of Python's import system that are being executed."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename.startswith("<frozen importlib")
        frame = frame.f_back
    return count


def stop_early(number: int, frame: FrameType | None) -> None:
    """End the program with one sentence while it still imports, before a command runs.

    At once: an exception in the middle of an import can be dropped, or turned into another one.
    """
    os.write(2, EARLY)
    os._exit(130)


@contextmanager
def contain_others(warn: Callable[[Iterable[str]], None]) -> Iterator[None]:
    """Log every bar of tqdm as our own progress, and pass each other warning once to `warn`, as one line.

    Among these are records of libraries that no handler takes, such as bitsandbytes' at every product. Warnings that
    are for developers alone are left out, and so are those of DeepSpeed, which at every import says that there is no
    GPU.
    """
    from tqdm.std import tqdm

    begin, display, show_warning = tqdm.__init__, tqdm.display, warnings.showwarning
    last_resort = logging.lastResort
    shown: set[str] = set()

    def begin_unseen(bar: Any, *args: Any, **settings: Any) -> None:
        settings |= {"file": io.StringIO(), "disable": bool(settings.get("disable"))}  # None: unless on a terminal
        begin(bar, *args, **settings)

    def log_bar(bar: Any, msg: str | None = None, pos: int | None = None) -> bool:
        name, done, total = (bar.desc or "step").strip(" :"), int(bar.n), int(bar.total or 0)
        if msg == "" or pos == 0:  # it is closed
            done = total = total or 1
        LOG.info("%s %d/%d", name, done, total, extra={"progress": (name, done, total)})
        return True

    def show_once(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        sentence = first_line(message) if isinstance(message, Warning) else message
        if not issubclass(category, FOR_DEVELOPERS) and sentence not in shown:
            shown.add(sentence)
            warn([sentence])

    def warn_once(record: logging.LogRecord) -> bool:
        show_once(Warning(record.getMessage()), Warning)
        return False

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    tqdm.__init__, tqdm.display, warnings.showwarning = begin_unseen, log_bar, show_once
    DEEPSPEED.addFilter(is_error)
    logging.lastResort = logging.StreamHandler()
    logging.lastResort.setLevel(logging.WARNING)
    logging.lastResort.addFilter(warn_once)
    try:
        yield
    finally:
        tqdm.__init__, tqdm.display, warnings.showwarning = begin, display, show_warning
        DEEPSPEED.removeFilter(is_error)
        logging.lastResort = last_resort
