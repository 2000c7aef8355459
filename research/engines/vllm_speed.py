"""Time models in vLLM's engine for CPUs, in turns, and the same by transformers with our kernels.

    .engines/vllm/bin/python research/engines/vllm_speed.py [--rounds 3] [--tokens 32] [--jsonl FILE] NAME=FOLDER ...

`research/engines/setup` makes that environment. The first model is the one that ratios are taken to. Each has a process
with one thread in each engine; vLLM runs 1 and 16 sequences at once, transformers 1. Greedy decoding behind a prompt of
16 tokens; the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from records import Record, append, provenance, require_engines

from llmcompress.benchmark.runners import ENGINES
from llmcompress.benchmark.worker import Worker
from llmcompress.benchmark.worker import main as answer

PROMPT = 16  # tokens
THREADS = 1
ARMS = {"vLLM": (1, 16), "transformers": (1,)}  # sequences at once, by engine
PROGRAM = f"import sys; sys.path.append({str(Path(__file__).parent)!r}); import vllm_speed; vllm_speed.serve()"
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": str(THREADS),
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class VLLMEngine:
    """A folder in vLLM's engine; it reads as many prompts at once as a request names as `threads`.

    A request may say the longest text it will ask for, in tokens, as `length`.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        from vllm import LLM

        length = request.get("length", 128)
        self.model = LLM(request["path"], enforce_eager=True, dtype="bfloat16", max_model_len=length, max_num_seqs=16)

    def turn(self, threads: int, prompt: list[int], tokens: int) -> dict[str, Any]:
        """Return the seconds of a token of each sequence, without those of the prompt."""
        first, whole = (self._seconds(threads, prompt, count) for count in (1, tokens + 1))
        return {"decode": whole - first}

    def _seconds(self, sequences: int, prompt: list[int], tokens: int) -> float:
        from vllm import SamplingParams

        wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": [token + number for token in prompt]} for number in range(sequences)]
        began = time.perf_counter()
        self.model.generate(prompts, wanted, use_tqdm=False)
        return time.perf_counter() - began


def serve() -> None:
    """Answer requests as a worker of `bench` does, with vLLM among the engines."""
    ENGINES["vLLM"] = VLLMEngine
    answer()


def main() -> None:
    """Measure the models and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--jsonl", type=Path, help="collects a record of each row")
    options = parser.parse_args()
    require_engines(parser, {"vllm"})
    models = dict(given.split("=", 1) for given in options.models)
    speeds: dict[tuple[str, str, int], list[float]] = {}
    with ExitStack() as stack:
        workers = {}
        for engine in ARMS:
            for name, folder in models.items():
                worker = workers[engine, name] = stack.enter_context(Worker(name, ENVIRONMENT, PROGRAM))
                worker.ask({"ask": "load", "engine": engine, "name": name, "path": folder, "dtype": "bfloat16"})
        for number in range(options.rounds + 1):
            for (engine, name), worker in workers.items():
                for count in ARMS[engine]:
                    tokens = options.tokens if number else 2
                    turn = {"ask": "turn", "threads": count, "prompt": [*range(100, 100 + PROMPT)], "tokens": tokens}
                    seconds = worker.ask(turn)["decode"]
                    if number:  # the first round warms up
                        speeds.setdefault((engine, name, count), []).append(count * tokens / seconds)
    print("| engine and model | sequences | tokens/s | to the first |\n|---|---|---|---|")
    for (engine, name, count), own in speeds.items():
        first = speeds[engine, next(iter(models)), count]
        ratio = statistics.median(mine / other for mine, other in zip(own, first, strict=True))
        numbers = {"tokens_per_second": statistics.median(own), "ratio": ratio, "sequences": count}
        print(f"| {engine}, {name} | {count} | {numbers['tokens_per_second']:.1f} | {ratio:.2f} |", flush=True)
        if options.jsonl:
            arm = f"{engine}, {name}, {count} sequence{'s' * (count > 1)}"
            append(options.jsonl, record(arm, numbers, options))


def record(arm: str, numbers: dict[str, float], options: argparse.Namespace) -> Record:
    """Return the record of a row."""
    said = f"--rounds {options.rounds} --tokens {options.tokens}"
    command = f"python research/engines/vllm_speed.py {said} NAME=FOLDER ..."
    where = {"table": "vllm-speed", "arm": arm, "model": "smollm2", "text": None}
    return where | {"command": command, "calibration": None, **provenance(), "numbers": numbers}


if __name__ == "__main__":
    main()
