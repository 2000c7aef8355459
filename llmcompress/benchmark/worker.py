"""The process that measures one model, from both ends: `Worker` for its parent, `answers` for itself.

They exchange lines of JSON: a request, then its answer. Other output of the process goes to standard error.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from llmcompress import errors
from llmcompress.benchmark.runners import load_engine, prepare_files
from llmcompress.errors import LLMCompressError, MemoryLimitError, is_out_of_memory
from llmcompress.runtime.memory import peak_memory

ROOT = Path(__file__).resolve().parents[2]  # from where llmcompress is imported, installed or not
PROGRAM = "import sys; sys.path.append({root!r}); from llmcompress.benchmark.worker import main; main()"
PATIENCE = 5.0  # seconds that an idle worker has to end by itself
CLEAR = Path("/proc/self/clear_refs")
PEAK = "5"  # written there, restarts the peak of resident memory


class Worker:
    """A process that measures one model, as a context. `program`: Python source that answers requests."""

    def __init__(self, name: str, environment: Mapping[str, str] | None = None, program: str | None = None) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", program or PROGRAM.format(root=str(ROOT))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | dict(environment or {}),
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._process.kill()
        try:
            self._process.communicate(timeout=PATIENCE)  # closes its standard input, which ends it
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._log.close()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request.

        Raises the worker's error if it is one of ours, MemoryLimitError if the system killed it, and LLMCompressError
        if it died otherwise.
        """
        if self._process.stdin is None or self._process.stdout is None:
            raise self._death()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._death()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise getattr(errors, answer["error"])(answer["message"])
        return answer

    def _death(self) -> LLMCompressError:
        """Return the error of a worker that ended without an answer."""
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return MemoryLimitError(
                f"the system killed the process that measured {self.name}, most likely for its memory; measure fewer "
                f"or smaller models at once"
            )
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        end = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        reason = f" ({lines[-1]})" if lines else ""
        return LLMCompressError(
            f"the process that measured {self.name} ended {end}{reason}; measure it alone, or leave it out"
        )


def answers(requests: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield an answer to each request: first to load a model, then for turns, and for the memory that they took.

    An error is the last answer.
    """
    waiting = iter(requests)
    try:
        order = next(waiting)
        prepare_files(order)
        gc.collect()
        empty = resident_memory()
        engine, seconds = load_engine(order)
        loading = peak_memory()
        restarted = restart_peak()
        memory = {"empty": empty, "resident": resident_memory(), "peak_loading": loading}
        yield {"load_seconds": seconds, "dtype": getattr(engine, "dtype", None), **memory}
        for request in waiting:
            if request["ask"] == "turn":
                yield engine.turn(request["threads"], request["prompt"], request["tokens"])
            else:
                yield {"peak": peak_memory(), "peak_of_generation": restarted}
    except LLMCompressError as error:
        yield {"error": type(error).__name__, "message": str(error)}
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        yield {"error": MemoryLimitError.__name__, "message": f"there is not enough memory for {order['name']}"}


def main() -> None:
    """Serve requests from standard input on the original standard output, then exit at once.

    A normal exit would wait for llama.cpp, which hangs.
    """
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    for answer in answers(map(json.loads, sys.stdin)):
        output.write(json.dumps(answer) + "\n")
        output.flush()
    os._exit(0)


def resident_memory() -> int:
    """Return the bytes that this process holds in memory, pages of files included."""
    return int(psutil.Process().memory_info().rss)


def restart_peak() -> bool:
    """Restart the peak memory of this process from the memory it holds now. False where the system cannot."""
    try:
        CLEAR.write_text(PEAK)
    except OSError:
        return False
    return peak_memory() <= 1.1 * resident_memory()  # else the kernel accepted the word and did nothing
