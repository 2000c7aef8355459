"""llama.cpp by the package xllamacpp, in a process of its own: what a GGUF file of ours says there.

A process, because its server may wait for itself for ever when it is taken down, and so would the program around it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
import weakref
from pathlib import Path
from typing import Any


class LlamaEngine:
    """The GGUF files of an export, loaded: one thread, keys and values in float32. Raises RuntimeError where llama.cpp
    does not take them."""

    def __init__(self, folder: Path, context: int) -> None:
        command = [sys.executable, __file__, str(folder), str(context)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._end = weakref.finalize(self, _end, process)
        self.address = next((line.strip() for line in process.stdout or () if line.startswith("http://")), "")
        if not self.address:
            raise RuntimeError(f"llama.cpp did not load {folder}")
        self.letter = self.tokens("a")[-1]

    def likeliest(self, tokens: list[int], count: int) -> dict[int, float]:
        """The `count` likeliest tokens after `tokens`, with their log-probabilities.

        The server tells them with a token that it chose and that is whole text: so it is made to choose a letter.
        """
        choice = {"n_predict": 1, "temperature": 0, "logit_bias": [[self.letter, 1e4]]}
        asked = {"prompt": tokens, "n_probs": count, "cache_prompt": True} | choice
        found = self._answer("/completion", asked)["completion_probabilities"][0]["top_logprobs"]
        return {int(row["id"]): float(row["logprob"]) for row in found}

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """The `count` tokens that are each the likeliest next one."""
        asked = {"prompt": tokens, "n_predict": count, "temperature": 0, "return_tokens": True, "ignore_eos": True}
        found: list[int] = self._answer("/completion", asked)["tokens"]
        return found

    def answer_length(self, token: int, count: int) -> int:
        """The number of tokens that it writes, of at most `count`, where each is `token`: one if that ends a text."""
        asked = {"prompt": [self.letter], "n_predict": count, "temperature": 0, "logit_bias": [[token, 1e4]]}
        return int(self._answer("/completion", asked)["tokens_predicted"])

    def tokens(self, text: str) -> list[int]:
        """Return llama.cpp's tokens of a text, special ones recognized and put around it as the file says."""
        asked = {"content": text, "add_special": True, "parse_special": True}
        found: list[int] = self._answer("/tokenize", asked)["tokens"]
        return found

    def _answer(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        """Return the server's answer to a request. It listens to this machine only."""
        request = urllib.request.Request(
            self.address + path, json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def serve(folder: Path, context: int) -> None:
    """Loads the files and prints the server's address; ends with the program that asked for it."""
    import xllamacpp

    settings: Any = xllamacpp.CommonParams()
    settings.model.path = str(folder / "model.gguf")
    if (folder / "lora.gguf").is_file():
        lora: Any = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(folder / "lora.gguf"), 1.0
        settings.lora_adapters = [lora]
    settings.n_ctx = context
    settings.n_batch = settings.n_ubatch = context
    settings.n_parallel = 1
    settings.n_gpu_layers = 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.warmup = settings.fit_params = settings.ui = False
    settings.verbosity = 1  # errors
    server: Any = xllamacpp.Server(settings)
    print(server.listening_address, flush=True)
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)  # without taking the server down


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
