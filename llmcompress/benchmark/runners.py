"""The engines that a worker measures: transformers, llama.cpp, and memory itself, each loaded once and asked for turns.

Imported in workers only: each has a process to itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch

from llmcompress.benchmark.bandwidth import ReadBuffer
from llmcompress.benchmark.generation import TurnTimes, generate
from llmcompress.errors import InputError, first_line
from llmcompress.models.dense.locate import Place
from llmcompress.models.dense.model import load_model
from llmcompress.models.dense.remote_code import load_config
from llmcompress.models.dense.skeleton import described

TRUST = "trust_remote_code"  # an entry of what is asked for
PADDING = 256  # positions that llama.cpp's context is a multiple of


class TimedEngine(Protocol):
    """A loaded model, asked for one turn after the other."""

    def turn(self, threads: int, prompt: list[int], tokens: int) -> dict[str, Any]:
        """Return the seconds of one turn, or bytes/s, and the threads that it computed with."""


class BandwidthMeter:
    """Memory itself: a turn reads a buffer."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self.buffer = ReadBuffer(asked["bytes"])

    def turn(self, threads: int, prompt: list[int], tokens: int) -> dict[str, Any]:
        """Return the bandwidth in bytes/s."""
        torch.set_num_threads(threads)
        return {"threads": torch.get_num_threads(), "bandwidth": self.buffer.bandwidth()}


class TransformersEngine:
    """A folder, loaded by `from_pretrained`, in a dtype if one is asked for, else in that of its config."""

    def __init__(self, asked: dict[str, Any]) -> None:
        place = Place(asked["name"], Path(asked["path"]), trust_remote_code=asked.get(TRUST, False))
        own = load_config(place.folder, place.trust_remote_code).dtype
        name = asked["dtype"] or str(own or torch.float32).removeprefix("torch.")
        self.model = load_model(place, dtype=getattr(torch, name))

    @property
    def dtype(self) -> str:
        """The dtype of hidden states."""
        return str(self.model.dtype).removeprefix("torch.")

    def turn(self, threads: int, prompt: list[int], tokens: int) -> dict[str, Any]:
        """Return the fields of `TurnTimes`."""
        torch.set_num_threads(threads)
        return vars(generate(self.model, prompt, tokens)[1])


class LlamaEngine:
    """A GGUF file in llama.cpp, whose threads are set as it is loaded."""

    def __init__(self, asked: dict[str, Any]) -> None:
        llama: Any = import_module("xllamacpp")
        settings = llama.CommonParams()
        settings.model.path = asked["path"]
        settings.n_ctx = -(-asked["context"] // PADDING) * PADDING
        settings.n_parallel, settings.n_gpu_layers, settings.cache_ram_mib = 1, 0, 0
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = self.threads = asked["threads"]
        settings.warmup = settings.fit_params = settings.ui = False
        settings.verbosity = 1  # errors
        try:
            self.server = llama.Server(settings)
        except RuntimeError as error:
            raise InputError(
                f"llama.cpp does not load {asked['name']} ({first_line(error)}); write it again, or with a newer tool"
            ) from error

    def turn(self, threads: int, prompt: list[int], tokens: int) -> dict[str, Any]:
        """Return the fields of `TurnTimes`, by llama.cpp's own clock."""
        choice = {"n_predict": tokens + 1, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True}
        found = self.server.handle_completions(
            {"prompt": prompt, "max_tokens": tokens + 1, "cache_prompt": False} | choice
        )
        return vars(_llama_turn(found, self.threads))


def _llama_turn(found: dict[str, Any], threads: int) -> TurnTimes:
    """Return the turn in an answer; its `predicted_ms` begin after the first token, which the prompt's pass gives."""
    timings = found["timings"]
    read = timings["prompt_ms"] / 1000
    return TurnTimes(
        threads, timings["prompt_n"], timings["predicted_n"] - 1, read, read, timings["predicted_ms"] / 1000
    )


ENGINES: dict[str, Callable[[dict[str, Any]], TimedEngine]] = {
    "memory": BandwidthMeter,
    "transformers": TransformersEngine,
    "llama.cpp": LlamaEngine,
}


def prepare(asked: dict[str, Any]) -> None:
    """Import what the engine needs, and have the system read the files, so that loading is timed without either."""
    match asked["engine"]:
        case "transformers":
            folder = Path(asked["path"])
            described(folder, trust_remote_code=asked.get(TRUST, False))
            files = sorted(folder.glob("*.safetensors"))
        case "llama.cpp":
            import_module("xllamacpp")
            files = [Path(asked["path"])]
        case _:
            files = []
    for path in files:
        with path.open("rb") as file:
            while file.read(2**24):
                pass


def load(asked: dict[str, Any]) -> tuple[TimedEngine, float]:
    """Return the engine that is asked for, loaded, and the seconds that it took."""
    start = time.perf_counter()
    engine = ENGINES[asked["engine"]](asked)
    return engine, time.perf_counter() - start
