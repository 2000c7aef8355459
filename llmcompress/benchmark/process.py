"""A worker as its parent sees it: started, asked, and ended; its death is one sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llmcompress import errors
from llmcompress.errors import LLMCompressError, MemoryLimitError

ROOT = Path(__file__).resolve().parents[3]  # from where llmcompress is imported, installed or not
PROGRAM = "import sys; sys.path.append({root!r}); from llmcompress.benchmark.worker import main; main()"
FAST = "LLMCOMPRESS_FAST"  # 0: compressed models run without kernels
PATIENCE = 5.0  # seconds that an idle worker has to end by itself


class Worker:
    """A process that measures one model, as a context. `program`: Python source that answers requests."""

    def __init__(self, name: str, environment: Mapping[str, str] | None = None, program: str | None = None) -> None:
        self.name = name
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", program or PROGRAM.format(root=str(ROOT))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
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
            self._process.communicate(timeout=PATIENCE)  # the end of its input is the end of it
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._said.close()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request.

        Raises what the worker raised, if it is an error of ours; MemoryLimitError if the system killed it, and
        LLMCompressError if it died otherwise.
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
        self._said.seek(0)
        lines = [line.strip() for line in self._said if line.strip()]
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        why = f" ({lines[-1]})" if lines else ""
        return LLMCompressError(
            f"the process that measured {self.name} ended {how}{why}; measure it alone, or leave it out"
        )
