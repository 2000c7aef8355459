"""Trials in processes of their own: what came of each is one of a few outcomes, whatever happens inside.

The process that asks has imported everything and computed nothing, so that a fork of it starts in milliseconds.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmcompress.cli.terminal import verdict

SECONDS = 60.0  # what runs longer hangs
SILENT = "silent change"
BAD = (SILENT, "traceback", "crash", "hang", "over its memory")


@dataclass(frozen=True)
class Outcome:
    """The end of a trial. `kind`: "done", "refused" in a sentence, "killed", or one of BAD; `said`: what was returned
    or raised; `peak`: bytes of memory above those of the process that asked."""

    kind: str
    said: Any = None
    peak: int = 0


def tried(work: Callable[[], Any], seconds: float = SECONDS) -> Outcome:
    """Run `work` in a fork, and return what came of it; what it returns has to be plain values."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _work(work, write)
    os.close(write)
    text, ended = b"", time.monotonic() + seconds
    while (left := ended - time.monotonic()) > 0 and select.select([read], [], [], left)[0]:
        piece = os.read(read, 1 << 16)
        if not piece:
            break
        text += piece
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        return Outcome("hang", f"longer than {seconds:.0f} s")
    os.close(read)
    _, status, used = os.wait4(child, 0)
    peak = 1024 * (used.ru_maxrss - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return Outcome("killed" if number == signal.SIGKILL else "crash", signal.Signals(number).name, max(peak, 0))
    kind, said = json.loads(text)
    return Outcome(kind, said, max(peak, 0))


def _work(work: Callable[[], Any], write: int) -> None:
    """Run in the fork, and leave it; output of libraries goes to a file that nobody reads."""
    torch.set_num_threads(1)  # torch makes its threads again after a fork, which two of them must not do at once
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        try:
            found: tuple[str, Any] = ("done", work())
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the outcome
            known = verdict(error)
            found = (
                ("refused", known[1]) if known else ("traceback", "".join(traceback.format_exception(error))[-2000:])
            )
        os.write(write, json.dumps(found).encode()) if len(json.dumps(found)) < 60_000 else _long(write, found)
    os._exit(0)


def _long(write: int, found: tuple[str, Any]) -> None:
    with os.fdopen(write, "wb") as pipe:
        pipe.write(json.dumps(found).encode())


def contents(folder: Path, without: frozenset[str]) -> dict[str, str]:
    """Return the digest of each file of a folder by its name."""
    from llmcompress.models.files.identity import content_digest

    return {path.name: content_digest([path]) for path in sorted(folder.iterdir()) if path.name not in without}
