"""The process of one model: it loads it, and answers requests, a line of JSON for each, until there are no more.

What it prints otherwise goes to standard error, so that the answers are alone on standard output.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from llmcompress.benchmark.resident import resident_memory, restart_peak
from llmcompress.benchmark.runners import load, prepare
from llmcompress.errors import LLMCompressError, MemoryLimitError, is_out_of_memory
from llmcompress.runtime.memory import peak_memory


def answers(requests: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield an answer to each request: first to load a model, then for turns, and for the memory that they took.

    After an error, which is the last answer, there is nothing left to ask for.
    """
    waiting = iter(requests)
    try:
        asked = next(waiting)
        prepare(asked)
        gc.collect()
        empty = resident_memory()
        engine, seconds = load(asked)
        loading = peak_memory()
        restarted = restart_peak()
        held = {"empty": empty, "resident": resident_memory(), "peak_loading": loading}
        yield {"load_seconds": seconds, "dtype": getattr(engine, "dtype", None), **held}
        for asked in waiting:
            if asked["ask"] == "turn":
                yield engine.turn(asked["threads"], asked["prompt"], asked["tokens"])
            else:
                yield {"peak": peak_memory(), "peak_of_generation": restarted}
    except LLMCompressError as error:
        yield {"error": type(error).__name__, "message": str(error)}
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        yield {"error": MemoryLimitError.__name__, "message": f"there is not enough memory for {asked['name']}"}


def main() -> None:
    """Answer standard input on what was standard output; end at once, since llama.cpp waits for itself otherwise."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    for answer in answers(map(json.loads, sys.stdin)):
        output.write(json.dumps(answer) + "\n")
        output.flush()
    os._exit(0)
