"""Checks and writes of a new file of results."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from llmcompress.errors import DiskError, RecipeError
from llmcompress.models.files.output import check_name, replace_bytes


def check_new_file(output: Path, kinds: Sequence[str], what: str) -> None:
    """Raise RecipeError if `output` is of none of the `kinds` (".md"), DiskError if it exists or its folder does not.

    `what` names its content.
    """
    if output.suffix not in kinds:
        raise RecipeError(f"{what} is written as {' or '.join(kinds)}, not as {output.name}; rename the output file")
    check_name(output)
    if output.exists():
        raise DiskError(f"{output} exists already; remove it or choose another output file")
    if not output.absolute().parent.is_dir():
        raise DiskError(f"there is no folder {output.absolute().parent}; make it or choose another output file")
    if not os.access(output.absolute().parent, os.W_OK):
        raise DiskError(f"{output.absolute().parent} cannot be written to; choose another output file")


def write_new_file(output: Path, content: str | bytes) -> None:
    """Write all of `content`, a text in UTF-8, or nothing. Raises DiskError."""
    try:
        replace_bytes(output, content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise DiskError(f"{output} cannot be written ({error.strerror}); choose another output file") from error
