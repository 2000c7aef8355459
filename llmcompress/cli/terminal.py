"""Output and end of a command: the result on standard output, all else on standard error, an exit code for its end.

With `--json`, standard output carries one JSON object and nothing else, whatever libraries print meanwhile.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

import typer

from llmcompress.cli.process import StopRequests, contain_others, writing_to
from llmcompress.cli.stages import SHORT, Stage, beating
from llmcompress.errors import (
    DiskError,
    LLMCompressError,
    MemoryLimitError,
    Termination,
    first_line,
    format_bytes,
    is_out_of_memory,
)
from llmcompress.reporting.tables import Row
from llmcompress.runtime.json_values import replace_nonfinite

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
WIDE = 160  # columns, where the output is not a terminal
IDLE = "at work"  # the name of a stage that nothing is known of
LOG = logging.getLogger("llmcompress")


class _MessageHandler(logging.Handler):
    """Shows warnings of the library, and what it logs as `progress`: (what is counted, done, in all).

    A record with a `note` is shown once, however often the library logs it.
    """

    def __init__(
        self,
        warn: Callable[[Iterable[str]], None],
        report: Callable[[str, int, int], None],
        announce: Callable[[str], None],
    ) -> None:
        super().__init__(logging.INFO)
        self._warn, self._report, self._announce = warn, report, announce
        self._notes: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        if (progress := getattr(record, "progress", None)) is not None:
            self._report(*progress)
        elif record.levelno >= logging.WARNING:
            self._warn([record.getMessage()])
        elif hasattr(record, "note") and (note := record.getMessage()) not in self._notes:
            self._notes.add(note)
            self._announce(note)


class Terminal:
    """The surroundings of one command, as a context.

    An error inside becomes one line on standard error, or `{"error": {"code", "message"}}` as the JSON object, and an
    exit code. An error that nobody foresaw keeps its traceback. Of several processes that a launcher started, the first
    one prints. Errors are printed by all, unless the first one prints the same.
    """

    def __init__(self, as_json: bool = False, verbose: int = 0, quiet: bool = False) -> None:
        self.first = os.environ.get("RANK", "0") == "0"
        self.as_json, self.verbose, self.quiet = as_json, verbose, quiet or not self.first
        self._output: TextIO = sys.stdout
        self._descriptor: int | None = None
        self._errors: TextIO = sys.stderr
        self._messages = _MessageHandler(self.warn, partial(self._report, part=True), self._print_line)
        self._running = ExitStack()
        self._level = LOG.level
        self._stops = StopRequests()
        self._result: dict[str, Any] | None = None
        self._stage: Stage | None = None
        self._lock = threading.RLock()  # of the stage
        self._since = self._spoke = time.monotonic()  # when the next stage will have begun; the last line of stages

    def __enter__(self) -> Self:
        self._output, self._errors = sys.stdout, sys.stderr
        if self.as_json:
            sys.stdout.flush()
            self._descriptor = os.dup(1)
            os.dup2(2, 1)
            sys.stdout = sys.stderr
        self._stops.install()
        LOG.addHandler(self._messages)
        LOG.setLevel(logging.INFO)
        self._running.enter_context(contain_others(self.warn))
        if not self.quiet:
            self._running.enter_context(beating(self._beat))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        error = self._stops.decide(error)
        if error is None or isinstance(error, typer.Exit):
            try:
                self._print_json(self._result)
                return
            except DiskError as unwritten:
                error = unwritten
        ending = verdict(error)
        code, message = ending or (1, f"{type(error).__name__}: {error}")
        if self.as_json and not isinstance(error, BrokenPipeError):
            self._print_json((self._result or {}) | {"error": {"code": code, "message": message}})
        if ending is None:
            return
        if self.verbose > 1:
            typer.echo(printable("".join(traceback.format_exception(error))), err=True, nl=False)
        if not getattr(error, "reported_elsewhere", False):
            typer.echo(printable(f"[{code}] {message}").replace("\n", "\\n"), err=True)
        raise typer.Exit(code) from None

    def show(self, values: dict[str, Any], view: Callable[[dict[str, Any], bool], Iterable[RenderableType]]) -> None:
        """Print a result: `values` as JSON, or for people what `view(values, every)` yields; `every` if verbose."""
        self._running.close()  # no bar comes between the lines of the result
        self._end_stage()
        if self.as_json:
            self._result = values  # printed at the end, when no library can print any more
        elif not self.quiet:
            from rich.console import Console

            width = None if self._output.isatty() else WIDE
            console = Console(file=self._output, width=width, highlight=False, markup=False)
            with writing_to(self._output):
                for part in view(values, self.verbose > 0):
                    console.print(printable(part) if isinstance(part, str) else part)

    def say(self, line: str) -> None:
        """Print one more line below a result; not with `--json`."""
        if not self.as_json and not self.quiet:
            typer.echo(printable(line))

    def warn(self, sentences: Iterable[str]) -> None:
        """Print warnings on standard error."""
        for sentence in sentences:
            self._print_line(f"warning: {sentence}")

    def progress(self, done: int, total: int, tokens_per_second: float) -> None:
        """Report compressed blocks: a bar on a terminal, else a line at the end of the stage."""
        self._report("block", done, total, _speed(tokens_per_second))

    def pricing(self, done: int, total: int, tokens_per_second: float) -> None:
        """Report blocks whose options were tried."""
        self._report("priced block", done, total, _speed(tokens_per_second))

    def training(self, done: int, total: int, loss: float, tokens_per_second: float, kl: float) -> None:
        """Report optimizer steps, and the last held-out KL."""
        note = f"loss {loss:.4f} · held-out KL {kl:.4f} · {tokens_per_second:,.0f} tokens/s"
        self._report("step", done, total, note)

    def judging(self, done: int, total: int) -> None:
        """Report blocks of both models that were read for the gates."""
        self._report("block read for the gates", done, total)

    def scoring(self, counted: str, done: int, total: int) -> None:
        """Report what was scored; a `total` of 0 begins a stage that cannot be counted."""
        self._report(counted, done, total)

    def choosing(self, done: int) -> None:
        """Report models without some of their blocks that were tried, a line each time; their total is unknown."""
        self._print_line(f"{done:,} models without some of their blocks tried")

    def answering(self, done: int) -> None:
        """Report answered prompts, a line each time; their total is unknown."""
        self._print_line(f"{done:,} prompts")

    def stage(self, sentence: str) -> None:
        """End the current stage, and announce on standard error what comes next."""
        self._end_stage()
        self._print_line(sentence)

    def _print_line(self, line: str) -> None:
        if self.quiet:
            return
        with self._lock:
            if self._stage is not None:
                self._stage.close()  # its bar comes back below the line
            typer.echo(printable(line), file=self._errors)

    def _report(self, counted: str, done: int, total: int, note: str = "", part: bool = False) -> None:
        """Report a stage; `part`: True for what the library counts, which is a part of the stage if there is one."""
        self._stops.check()
        with self._lock:
            stage = self._stage
            if stage is None or (stage.name == IDLE if part else stage.name != counted or not stage.loud):
                self._begin_stage(counted, None if part else self._since, loud=not part)
            if self._stage is None or not total:
                return
            own = self._stage.name == counted
            self._stage.update(done, total, note, None if own else counted)
            if own and done >= total:
                self._end_stage()

    def _begin_stage(self, name: str, since: float | None, loud: bool) -> None:
        self._end_stage()
        if not self.quiet:
            self._stage = Stage(name, self._errors, since=since, loud=loud)
            self._stage.spoke = self._spoke

    def _beat(self) -> None:
        """Keep the stage alive; one without a name begins after some seconds of silence."""
        with self._lock:
            if self._stage is None and time.monotonic() - self._since >= SHORT:
                self._begin_stage(IDLE, self._since, loud=False)
            if self._stage is not None:
                self._stage.beat()

    def _end_stage(self) -> None:
        """Print the line of the stage that is over, unless it is not worth one; the next one begins here."""
        with self._lock:
            if self._stage is None:
                return
            if self._stage.name == IDLE:
                self._stage.close()
            elif (ended := self._stage.end()) is not None:
                self._since = ended
            self._spoke, self._stage = self._stage.spoke, None

    def _restore(self) -> None:
        self._running.close()
        LOG.removeHandler(self._messages)
        LOG.setLevel(self._level)
        if self._stage is not None:
            self._stage.close()
        self._stops.restore()
        if self._descriptor is not None:
            import ctypes

            ctypes.CDLL(None).fflush(None)  # what C libraries printed is still in their buffer
            os.dup2(self._descriptor, 1)
            os.close(self._descriptor)
            sys.stdout = self._output

    def _print_json(self, values: dict[str, Any] | None) -> None:
        if values is not None and self.first:
            with writing_to(self._output):
                self._output.write(json.dumps(replace_nonfinite(values), indent=2) + "\n")
                self._output.flush()


def verdict(error: BaseException) -> tuple[int, str] | None:
    """Return the exit code and the sentence of an error that a user can act on; None for any other."""
    match error:
        case LLMCompressError():
            code, sentence = error.exit_code, str(error)
        case KeyboardInterrupt():
            code, sentence = 130, f"stopped from the keyboard{_remains(error)}"
        case Termination():
            code, sentence = 143, f"stopped by a signal{_remains(error)}"
        case OSError() if error.errno in NO_SPACE:
            code = DiskError.exit_code
            sentence = f"the disk is full ({error.filename or 'no file named'}); free some space"
        case BrokenPipeError():  # the reader of the output has seen enough
            return None
        case OSError():
            name = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
            reason = error.strerror or first_line(error)
            code, sentence = DiskError.exit_code, f"{name}{reason}; choose another path, or add -vv to see what used it"
        case _ if is_out_of_memory(error):
            code = MemoryLimitError.exit_code
            sentence = "there is not enough memory; take a smaller model or fewer samples"
        case _:
            return None
    return code, "; ".join((sentence, *getattr(error, "__notes__", ())))


def _speed(tokens_per_second: float) -> str:
    """Return a speed as a note; none before anything is done."""
    return f"{tokens_per_second:,.0f} tokens/s" if tokens_per_second else ""


def _remains(error: BaseException) -> str:
    """Return the clause on the work that an interrupted run keeps, if it says so; notes may say it too."""
    return f"; {error.args[0]}" if error.args else ""


def printable(text: str) -> str:
    """Return a text, of a file perhaps, with escapes for the characters that steer a terminal."""
    return STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


def build_table(headings: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> Table:
    """Return a table without lines. The columns numbered in `right` are flush right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, heading in enumerate(headings):
        table.add_column(printable(heading), justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    return table


def next_line(words: Sequence[str], model: str, revision: str | None, trust_remote_code: bool) -> str:
    """Return the line with the next command: its `words`, then the dense model as a user named it."""
    from llmcompress.models.dense.locate import pinned_name

    pinned = model if "@" in model else pinned_name(model, "/".join(model.split("/")[:2]), revision)
    trust = ["--trust-remote-code"] * trust_remote_code
    return f"next    {shlex.join(['llmcompress', *words, pinned, *trust])}"


def size_change(result: Row) -> str:
    """Return the sizes before and after, such as "269.1 MB -> 39.9 MB"."""
    return f"{format_bytes(result['bytes_before'])} -> {format_bytes(result['bytes_after'])}"


def surgery_lines(result: Row) -> Iterator[str]:
    """Yield the sizes before and after a change of shape, and the text that it was chosen on."""
    written = f"of weights in {result['output']}" if result["output"] else "of weights; nothing was written"
    yield f"sizes   {size_change(result)} {written}"
    text = result["calibration"]
    judged = text["held_out"] * text["length"]
    yield f"data    {text['source']} · {text['tokens']:,} tokens, {judged:,} of them to judge on"
