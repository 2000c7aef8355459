"""The engines that run a model for a measurement, transformers and llama.cpp, and the loop of the first.

Only workers load them: each has a process to itself.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from llmcompress.benchmark.protocol import BandwidthMeter
from llmcompress.errors import InputError, first_line
from llmcompress.models.dense.config import load_config
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import Place
from llmcompress.models.dense.skeleton import folder_skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRUST = "trust_remote_code"  # an entry of a request
PADDING = 256  # llama.cpp's context is a multiple of so many positions


@dataclass(frozen=True)
class TurnTimes:
    """Seconds of one turn. `first_token`: from the prompt to the first token chosen; `decode`: of `tokens` more."""

    threads: int  # that the engine says it used
    prompt: int  # tokens
    tokens: int
    prefill: float
    first_token: float
    decode: float


class TimedEngine(Protocol):
    """A loaded model that generates in turns."""

    def turn(self, threads: int, prompt: list[int], tokens: int) -> dict[str, Any]:
        """Return the seconds of one turn, or bytes/s, and the threads that it used."""


class TransformersEngine:
    """A folder, loaded by `from_pretrained`, in the dtype of the request or, for None, of its config."""

    def __init__(self, request: dict[str, Any]) -> None:
        place = Place(request["name"], Path(request["path"]), trust_remote_code=request.get(TRUST, False))
        own = load_config(place.folder, place.trust_remote_code).dtype
        name = request["dtype"] or str(own or torch.float32).removeprefix("torch.")
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
    """A GGUF file in llama.cpp, which sets its threads as it loads."""

    def __init__(self, request: dict[str, Any]) -> None:
        llama: Any = import_module("xllamacpp")
        settings = llama.CommonParams()
        settings.model.path = request["path"]
        settings.n_ctx = -(-request["context"] // PADDING) * PADDING
        settings.n_parallel, settings.n_gpu_layers, settings.cache_ram_mib = 1, 0, 0
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = self.threads = request["threads"]
        settings.warmup = settings.fit_params = settings.ui = False
        settings.verbosity = 1  # errors
        try:
            self.server = llama.Server(settings)
        except RuntimeError as error:
            raise InputError(
                f"llama.cpp does not load {request['name']} ({first_line(error)}); write it again, or with a newer tool"
            ) from error

    def turn(self, threads: int, prompt: list[int], tokens: int) -> dict[str, Any]:
        """Return the fields of `TurnTimes`, by llama.cpp's own clock."""
        choice = {"n_predict": tokens + 1, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True}
        answer = self.server.handle_completions(
            {"prompt": prompt, "max_tokens": tokens + 1, "cache_prompt": False} | choice
        )
        return vars(llama_times(answer["timings"], self.threads))


def llama_times(timings: dict[str, Any], threads: int) -> TurnTimes:
    """Return llama.cpp's times of a turn; its `predicted_ms` start after the first token, which the prompt gives."""
    prefill = timings["prompt_ms"] / 1000
    decode = timings["predicted_ms"] / 1000
    return TurnTimes(threads, timings["prompt_n"], timings["predicted_n"] - 1, prefill, prefill, decode)


ENGINES: dict[str, Callable[[dict[str, Any]], TimedEngine]] = {
    "memory": lambda request: BandwidthMeter(request["bytes"]),
    "transformers": TransformersEngine,
    "llama.cpp": LlamaEngine,
}


def prepare_files(request: dict[str, Any]) -> None:
    """Import the engine's packages and read the model's files once, so that loading is timed without either."""
    match request["engine"]:
        case "transformers":
            folder = Path(request["path"])
            folder_skeleton(folder, trust_remote_code=request.get(TRUST, False))
            files = sorted(folder.glob("[!.]*.safetensors"))
        case "llama.cpp":
            import_module("xllamacpp")
            files = [Path(request["path"])]
        case _:
            files = []
    for path in files:
        with path.open("rb") as file:
            while file.read(2**24):
                pass


def load_engine(request: dict[str, Any]) -> tuple[TimedEngine, float]:
    """Return the engine of a request, loaded, and the seconds that it took."""
    start = time.perf_counter()
    engine = ENGINES[request["engine"]](request)
    return engine, time.perf_counter() - start


@torch.inference_mode()
def generate(
    model: PreTrainedModel, prompt: Sequence[int], tokens: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[list[int], TurnTimes]:
    """Return the likeliest `tokens` + 1 tokens after a prompt, chosen one by one, and the seconds of the parts.

    Runs one sequence with transformers' DynamicCache, and computes logits of the last position only where the model
    can. End tokens do not stop it.
    """
    from transformers import DynamicCache

    last_only: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        last_only = {"logits_to_keep": 1}
    ids = torch.tensor([list(prompt)], device=model.device)
    cache = DynamicCache(config=model.config)
    start = clock()
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, **last_only).logits
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)  # kernels still run; later, reading each token waits for them
    prefilled = clock()
    token = logits[:, -1:].argmax(-1)
    chosen = [int(token)]
    first = clock()
    for _ in range(tokens):
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        chosen.append(int(token))
    end = clock()
    times = TurnTimes(torch.get_num_threads(), len(prompt), tokens, prefilled - start, first - start, end - first)
    return chosen, times
