"""Errors that a user can meet: one type per exit code, one sentence per error (fault, place, way out)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def list_names(names: Iterable[str], most: int = 3) -> str:
    """Return the first names for a sentence, and the number of the others; "none" without names."""
    names = list(names)
    return (", ".join(names[:most]) or "none") + (f" and {len(names) - most} more" if len(names) > most else "")


def format_bytes(count: float) -> str:
    """Return bytes as "39.9 MB" or "2.69 GB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message, or the name of the error if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """True if an error says that memory ran out, which torch raises as a RuntimeError."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in words for phrase in NO_MEMORY)
    )


class LLMCompressError(Exception):
    """The run failed, for the reason of the subclass; the command line exits with `exit_code`."""

    exit_code = 1
    reported_elsewhere = False  # True if another process of the run reports it


class RecipeError(LLMCompressError):
    """The recipe (or a command-line argument) asks for something impossible."""

    exit_code = 2


class NumericsError(LLMCompressError):
    """NaN, Inf, a matrix that cannot be factored, or a result outside the recipe's quality gates."""

    exit_code = 3


class GateError(NumericsError):
    """The finished model is further from the dense one than the recipe's gates allow; its checkpoint stays.

    `result`: what `compress` would have returned, also where it was given no output folder.
    """

    result: Any = None  # a `Result`, of a room above this


def check_several(values: object, name: str) -> None:
    """Raise RecipeError for one text or path where several are needed, which would be read letter by letter."""
    if isinstance(values, str | Path):
        raise RecipeError(f"{name} is one name, {str(values)!r}, where a list of them is needed; put it into a list")


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


class Termination(BaseException):
    """SIGTERM arrived; raised in the main thread, so that unfinished work is cleaned up."""
