"""Measure every engine's door on real models: size, KL of the engine's own logits, and speed, beside its own 4 bits.

    python research/engine_doors.py --data DATA [--work FOLDER] [--jsonl FILE] [--doors NAME ...]
        NAME=MODEL.gguf ...

A door is a command of ours, `compress --for ENGINE`, or the format that the engine's own tool makes without text. Its
file is loaded by the engine, which reads windows of WikiText-2's test split and continues a prompt greedily, in one
thread. The dense model runs in transformers, in float32. vLLM's doors need its own environment, which
`research/engines/setup` makes: `.engines/vllm/bin/python research/engine_doors.py`. `--jsonl` collects a record of each
row; what it has is not measured again, so rows whose seconds are to be compared belong in one run.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn

sys.path += [str(Path(__file__).parent / folder) for folder in ("peers", "engines")]

from llama_perplexity import decode, load, rewrite_matrices
from llama_quantizer import encode
from records import RESULTS, Record, append, provenance, read_records, require_engines
from three_models import run_command
from vllm_speed import ENVIRONMENT, VLLMEngine

from llmcompress.evaluation.distance import kl_divergence
from llmcompress.evaluation.perplexity import evaluation_windows
from llmcompress.evaluation.protocol import Protocol
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.tokenizer import load_tokenizer

TEXT = "wikitext2-test.raw"
PROMPT, TOKENS, ROUNDS = 16, 32, 3
PRICED = {"kl_predicted": "predicted_kl", "kl_probing": "measured_kl"}  # of the tokens that a target is priced on


@dataclass(frozen=True)
class Opened:
    """A model in an engine. `logits`: of a window [length] -> [length, vocabulary]; `extend`: of a prompt and a number
    of tokens -> the seconds that each token took after the prompt."""

    logits: Callable[[Tensor], Tensor]
    extend: Callable[[list[int], int], float]


@contextmanager
def open_llama(folder: Path, length: int) -> Iterator[Opened]:
    """Open the GGUF file of a folder in llama.cpp."""
    [file] = folder.glob("*.gguf")
    with load(file, length) as (library, context, vocabulary):

        def extend(prompt: list[int], tokens: int) -> float:
            logits, began = decode(library, context, prompt, vocabulary)[-1:], time.perf_counter()
            for place in range(len(prompt), len(prompt) + tokens):
                logits = decode_next(library, context, int(logits[-1].argmax()), place, vocabulary)
            return (time.perf_counter() - began) / tokens

        yield Opened(lambda ids: torch.from_numpy(decode(library, context, ids.tolist(), vocabulary)), extend)


def decode_next(library: ctypes.CDLL, context: ctypes.c_void_p, token: int, place: int, vocabulary: int) -> np.ndarray:
    """Return llama.cpp's logits [1, vocabulary] behind one more token of the text that it holds."""
    batch = library.llama_batch_init(ctypes.c_int32(1), ctypes.c_int32(0), ctypes.c_int32(1))
    batch.n_tokens, batch.token[0], batch.pos[0], batch.logits[0] = 1, token, place, 1
    batch.n_seq_id[0], batch.seq_id[0][0] = 1, 0
    if status := library.llama_decode(context, batch):
        raise RuntimeError(f"llama_decode answered {status}")
    logits = np.ctypeslib.as_array(library.llama_get_logits(context), (1, vocabulary)).copy()
    library.llama_batch_free(batch)
    return logits


@contextmanager
def open_mlx(folder: Path, _: int) -> Iterator[Opened]:
    """Open a folder in MLX."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load as load_mlx

    model: Any = load_mlx(str(folder))[0]
    model.set_dtype(mx.float32)  # on a CPU float16 takes 34 times as long, and sums in it are 0.0035 nats from these

    def extend(prompt: list[int], tokens: int) -> float:
        cache = make_prompt_cache(model)
        token = model(mx.array([prompt]), cache=cache)[:, -1].argmax(-1)
        mx.eval(token)
        began = time.perf_counter()
        for _ in range(tokens):
            token = model(token[None], cache=cache)[:, -1].argmax(-1)
            mx.eval(token)
        return (time.perf_counter() - began) / tokens

    def logits(ids: Tensor) -> Tensor:
        return torch.from_numpy(np.array(model(mx.array([ids.tolist()]))[0].astype(mx.float32)))

    yield Opened(logits, extend)


@contextmanager
def open_vllm(folder: Path, length: int) -> Iterator[Opened]:
    """Open a folder in vLLM, in this process."""
    os.environ.update(ENVIRONMENT)
    from llvmlite.binding import ffi
    from vllm import SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    ffi.lib._fntab["__dict__"] = {}  # vLLM asks all that modules hold for it; llvmlite answers with a function
    engines = [VLLMEngine({"path": str(folder), "length": length + 1})]
    computed: list[Tensor] = []

    def keep_logits(module: Any) -> None:
        compute = module.compute_logits

        def compute_and_keep(states: Tensor) -> Tensor:
            logits: Tensor = compute(states)
            computed.append(logits)
            return logits

        module.compute_logits = compute_and_keep

    def logits(ids: Tensor) -> Tensor:
        computed.clear()
        wanted = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        engines[0].model.generate({"prompt_token_ids": ids.tolist()}, wanted, use_tqdm=False)
        behind, before = computed  # vLLM samples a token first, then scores the prompt
        return torch.cat([before, behind])

    def extend(prompt: list[int], tokens: int) -> float:
        seconds: float = engines[0].turn(1, prompt, tokens)["decode"]
        return seconds / tokens

    try:
        engines[0].model.apply_model(keep_logits)
        yield Opened(logits, extend)
    finally:
        engines.pop().model.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()  # collects the last of it, before another model needs its groups


def write_q4_0(model: str, folder: Path) -> None:
    """Write a GGUF file again as llama.cpp's Q4_0 by its own quantizer; the head has Q6_K, else Q8_0."""
    names = {tensor.name for tensor in gguf.GGUFReader(model).tensors}
    head = "output.weight" if "output.weight" in names else "token_embd.weight"

    def convert(name: str, values: np.ndarray) -> tuple[np.ndarray, Type]:
        kind = (Type.Q8_0 if values.shape[1] % 256 else Type.Q6_K) if name == head else Type.Q4_0
        return encode(torch.from_numpy(values), kind.name), kind

    rewrite_matrices(Path(model), folder / "model.gguf", convert)


def write_mlx(model: str, folder: Path, bits: int = 4) -> None:
    """Write a model as mlx-lm's own quantizer does, in groups of 64."""
    from mlx_lm import convert

    folder.rmdir()
    convert(str(locate(model).folder), str(folder), quantize=True, q_bits=bits, q_group_size=64)


ROUNDED = "rules[0].steps=[{method: rtn, bits: 4, group_size: 64, narrow_range: true}]"
WITHOUT_TEXT = ["--set", "calibration=null", "--set", "asymmetric=0", "--set", "token_weights=null"]
DOORS: dict[str, tuple[str, Callable[[Path, int], Any], list[str] | Callable[[str, Path], None]]] = {
    "llama.cpp, its own Q4_0": ("llama.cpp", open_llama, write_q4_0),
    "llama.cpp, --for llama.cpp": ("llama.cpp", open_llama, ["--for", "llama.cpp"]),
    "mlx, its own 4 bits": ("mlx", open_mlx, write_mlx),
    "mlx, --for mlx": ("mlx", open_mlx, ["--for", "mlx"]),
    "vllm, 4 bits, rounded to the nearest": (
        "vllm",
        open_vllm,
        ["vllm-4", "--for", "vllm", "--set", ROUNDED, *WITHOUT_TEXT],
    ),
    "vllm, --for vllm": ("vllm", open_vllm, ["--for", "vllm"]),
    "vllm, default, by the plug-in": ("vllm", open_vllm, ["default"]),
}


def main() -> None:
    """Measure the rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext2-test.raw")
    parser.add_argument("--work", type=Path, default=Path("engine-doors"))
    parser.add_argument("--jsonl", type=Path, default=RESULTS / "engine_doors.jsonl")
    here = [door for door, (engine, _, _) in DOORS.items() if engine != "vllm"]
    parser.add_argument("--doors", nargs="+", choices=DOORS, default=here, help="(default: all but vLLM's)")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("models", nargs="+", metavar="NAME=FILE")
    options = parser.parse_args()
    require_engines(parser, {DOORS[door][0] for door in options.doors})
    for name, _, model in (entry.partition("=") for entry in options.models):
        held = {record["arm"] for record in read_records(options.jsonl)}
        doors = [door for door in options.doors if f"{name}, {door}" not in held]
        for door, numbers in measure(model, doors, options).items():
            words = DOORS[door][2]
            command = f"python research/engine_doors.py --data DATA {name}={name}"
            if isinstance(words, list):
                command = " ".join(["llmcompress compress", name, *words])
            record: Record = {"table": "engine-doors", "arm": f"{name}, {door}", "model": name, "command": command}
            append(options.jsonl, record | {"calibration": None, "text": TEXT, **provenance(), "numbers": numbers})
            print(name, door, json.dumps(numbers), flush=True)


def measure(model: str, doors: list[str], options: argparse.Namespace) -> dict[str, Record]:
    """Return the numbers of each door; speeds are taken in turns."""
    place = locate(model)
    windows = evaluation_windows(
        load_tokenizer(place.folder), Protocol(options.data / TEXT, options.windows, options.length)
    )
    made = options.work / Path(model).stem / str(provenance()["commit"])  # another commit may write something else
    folders = {door: made / door.replace(" ", "_") for door in doors}
    numbers: dict[str, Record] = {door: write_door(model, DOORS[door][2], folders[door]) for door in doors}
    dense = load_model(place).eval()
    for door in doors:
        with DOORS[door][1](folders[door], options.length) as opened:
            numbers[door] |= {"kl": statistics.fmean(mean_kl(dense, opened, ids) for ids in windows)}
    del dense
    prompt, seconds = windows[0, :PROMPT].tolist(), {door: list[float]() for door in doors}
    for _ in range(ROUNDS):
        for door in doors:
            with DOORS[door][1](folders[door], PROMPT + TOKENS) as opened:
                opened.extend(prompt, 2)
                seconds[door].append(opened.extend(prompt, TOKENS))
    return {
        door: numbers[door] | {"engine": DOORS[door][0], "tokens_per_second": 1 / statistics.median(seconds[door])}
        for door in doors
    }


def write_door(model: str, words: list[str] | Callable[[str, Path], None], folder: Path) -> Record:
    """Write what the engine loads, unless it is there; return its bytes, its seconds, and KL by its prices."""
    note = folder.parent / f"{folder.name}.json"
    if not note.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        began = time.monotonic()
        priced: Record = {}
        if isinstance(words, list):
            report = run_command(["compress", model, *words, "-o", str(folder)])
            plan = report.get("allocation")
            priced = {name: plan[key] for name, key in PRICED.items()} if plan else {}
        else:
            words(model, folder)
        weights = [file for kind in ("*.gguf", "*.safetensors") for file in folder.glob(kind)]
        size = sum(file.stat().st_size for file in weights)
        note.write_text(json.dumps({"bytes": size, "seconds": time.monotonic() - began} | priced))
    sizes: Record = json.loads(note.read_text())
    return sizes


@torch.no_grad()
def mean_kl(dense: nn.Module, opened: Opened, ids: Tensor) -> float:
    """Return the mean KL of an engine's logits to the dense model's over the predicted tokens of a window [length]."""
    wanted = dense(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1)
    given = opened.logits(ids)[:-1].float().log_softmax(-1)
    return float(kl_divergence(wanted, given).double().mean())


if __name__ == "__main__":
    main()
