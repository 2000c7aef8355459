"""Programs that a model wrote, run in processes with limits. It is no sandbox: they can read files and the network."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 10  # of a program, on the clock and of the processor
MEMORY = 1 << 30  # bytes of address space
OUTPUT = 1 << 20  # bytes of any file that a program writes

_LIMITED = """\
import resource, runpy, sys
for name, value in dict(CPU={seconds}, AS={memory}, FSIZE={output}, CORE=0).items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
runpy.run_path(sys.argv[1], run_name="__main__")
print({token!r}, end="")
"""


def run_program(program: str, seconds: float = SECONDS) -> bool:
    """Run Python source in a process of its own, in an empty folder; True if it came to its end without an error.

    A program that ends the process, or prints what the end prints, did not come to its end.
    """
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="llmcompress-") as folder:
        source, printed = Path(folder, "program.py"), Path(folder, "printed")
        source.write_text(program, encoding="utf-8", errors="replace")
        runner = _LIMITED.format(seconds=round(seconds), memory=MEMORY, output=OUTPUT, token=token)
        with printed.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", runner, str(source)],
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                ended = process.wait(seconds) == 0
            except subprocess.TimeoutExpired:
                ended = False
            finally:
                _end_group(process)
        return ended and printed.read_bytes().endswith(token.encode())


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started, which stay in its group."""
    with contextlib.suppress(ProcessLookupError):  # all of them ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
