"""Errors that a user can meet: one type per exit code, one sentence per error (what, where, what to do)."""

from collections.abc import Iterable

NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def listed(names: Iterable[str], most: int = 3) -> str:
    """Return the first names for a sentence, and how many more there are; "none" for none."""
    names = list(names)
    return (", ".join(names[:most]) or "none") + (f" and {len(names) - most} more" if len(names) > most else "")


def first_line(error: BaseException) -> str:
    """Return the first line of what a library said, or the name of the error where it said nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """True if an error says that memory ran out; torch says it in a RuntimeError."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(known in words for known in NO_MEMORY)
    )


class LLMCompressError(Exception):
    """The run failed. Subclasses say why; the command line exits with `exit_code`."""

    exit_code = 1
    told = False  # True if another process of the same run says it


class RecipeError(LLMCompressError):
    """The recipe (or a command-line argument) asks for something impossible."""

    exit_code = 2


class NumericsError(LLMCompressError):
    """NaN, Inf, a matrix that cannot be factored, or a result outside the recipe's quality gates."""

    exit_code = 3


class GateError(NumericsError):
    """The finished model is further from the dense one than the recipe's gates allow; its checkpoint stays."""


class DiskError(LLMCompressError):
    """The output cannot be written: it exists, is not writable, or does not fit on its disk."""

    exit_code = 4


class InputError(LLMCompressError):
    """The model or the calibration data are missing, corrupt or of a kind that cannot be compressed."""

    exit_code = 5


class LockedError(LLMCompressError):
    """Another run is writing the same output."""

    exit_code = 6


class MemoryLimitError(LLMCompressError):
    """The machine has less memory than the run needs."""

    exit_code = 7


class HubError(LLMCompressError):
    """The Hub refused, or could not be reached."""


class EndedError(LLMCompressError):
    """Another process of the same run has ended."""


class Terminated(BaseException):
    """SIGTERM arrived; raised in the main thread, so that unfinished work is cleaned up."""
