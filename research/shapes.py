"""Time decoding with random weights in the shape of a model of a billion: kernels beside dense bfloat16, in turns.

    python research/shapes.py [--threads 1 2] [--rounds 5] [--tokens 8] [--llama TYPE ...] [--jsonl FILE]

The shape is 16 blocks of 2,048 with an FFN of 8,192, 32 heads with 8 of keys and values, and 49,152 tokens.
Speed does not depend on values, so codes are random. Arms: dense bfloat16, trellises of 2 bits (both codes, rotated),
a grid of 4 bits, partial binarization (10 % of the columns at 8 bits, the rest signs), all with a head of 4 bits; and
by `--llama`, llama.cpp with all linears of one type, whose codes are zeros, and a table of Q4_0. Each arm generates
some tokens in each round, and rounds repeat; the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import gguf
import numpy as np
import torch
from records import Record, append, provenance
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

import llmcompress as lc
from llmcompress.benchmark.worker import Worker
from llmcompress.formats.gguf.head import FileOrigin, read_head
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.tokenizer import load_tokenizer
from llmcompress.weight.hadamard import SYLVESTER
from llmcompress.weight.modules import CompressedLinear, put
from llmcompress.weight.nodes import Columns, Grid, RotatedInputs, TrellisCodes, Weight, Where
from llmcompress.weight.trellis import Code, Trellis

Make = Callable[[int, int], Weight]
Speed = Callable[[int], float]  # tokens a second, of so many tokens
VOCABULARY = 49152  # of SmolLM2's tokenizer
PROMPT = 16  # tokens


def main() -> None:
    """Measure the arms and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--mode", default="auto", help="of lc.accelerate")
    parser.add_argument("--jsonl", type=Path, help="collects a record of each arm and number of threads")
    parser.add_argument("--llama", nargs="*", default=[], metavar="TYPE", help="GGUF types for llama.cpp, as Q2_K")
    options = parser.parse_args()
    models = {"dense bfloat16": dense(), **{name: compressed(make, options.mode) for name, make in ARMS.items()}}
    print("| arm | threads | tokens/s | to dense |\n|---|---|---|---|")
    for threads in options.threads:
        torch.set_num_threads(threads)
        with ExitStack() as stack:
            arms: dict[str, Speed] = {name: functools.partial(speed, model) for name, model in models.items()}
            arms |= {f"llama.cpp {kind}": llama_speed(stack, kind, threads) for kind in options.llama}
            for arm in arms.values():
                arm(2)
            rounds = [{name: arm(options.tokens) for name, arm in arms.items()} for _ in range(options.rounds)]
        medians = {name: statistics.median(each[name] for each in rounds) for name in arms}
        for name, median in medians.items():
            ratio = median / medians["dense bfloat16"]
            print(f"| {name} | {threads} | {median:.2f} | {ratio:.2f} |", flush=True)
            if options.jsonl:
                append(options.jsonl, record(name, threads, rounds, options))


def shape(tied: bool) -> LlamaConfig:
    """Return the model's sizes."""
    return LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        tie_word_embeddings=tied,
    )


def write(config: LlamaConfig, folder: Path) -> PreTrainedTokenizerBase:
    """Write a model of random weights in bfloat16 with the tokenizer of SmolLM2, which is returned."""
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer = load_tokenizer(locate("smollm2").folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def dense() -> nn.Module:
    """Return the model with random weights."""
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(shape(tied=True))
    return model.to(torch.bfloat16).eval()


def compressed(make: Make, mode: str) -> nn.Module:
    """Return the model with random codes in every linear, and a head of 4 bits."""
    with torch.device("meta"):
        model = LlamaForCausalLM(shape(tied=False))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            size = module.out_features, module.in_features
            put(model, name, CompressedLinear.of(grid(*size) if name == "lm_head" else make(*size)))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            value = nn.Parameter(torch.rand(parameter.shape, dtype=torch.bfloat16), requires_grad=False)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, value)
    rotary = type(model.model.rotary_emb)(model.config)
    model.model.rotary_emb = rotary
    lc.accelerate(model, mode)
    return model.eval()


def codes(levels: int, *size: int) -> Tensor:
    """Return random codes."""
    return torch.randint(0, levels, size, dtype=torch.uint8)


def grid(rows: int, width: int, levels: int = 16) -> Grid:
    """Return random integers in groups of 64."""
    return Grid(codes(levels, rows, width), torch.full((rows, width // 64), 0.01).half(), None, levels, 64)


def trellis(rows: int, width: int, code: Code = "linear") -> Weight:
    """Return a rotated trellis of 2 bits."""
    scale = torch.full((rows, 1), 0.02).half()
    coded = TrellisCodes(codes(4, rows * width), scale, Trellis(2, 1, 12, code), 256)
    return RotatedInputs(coded, torch.rand(width) < 0.5, len(SYLVESTER) * (width // len(SYLVESTER)))


def partial(rows: int, width: int) -> Weight:
    """Return 10 % of the columns at 8 bits and the rest as signs."""
    salient = Grid(codes(256, rows, width), torch.full((rows, 1), 0.001).half(), None, 256, width)
    return Where(Columns(torch.rand(width) < 0.1), salient, grid(rows, width, 2))


ARMS: dict[str, Make] = {
    "2-bit trellis": trellis,
    "2-bit trellis, code table": functools.partial(trellis, code="table"),
    "4-bit grid": grid,
    "partial binarization 10 %": partial,
}


def llama_speed(stack: ExitStack, kind: str, threads: int) -> Speed:
    """Return what times llama.cpp with linears of a type, as `speed` times the others; `stack` ends its process."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    worker = stack.enter_context(Worker(kind))
    file = str(write_gguf(shape(tied=True), folder, kind))
    worker.ask({"ask": "load", "engine": "llama.cpp", "name": kind, "path": file, "context": 256, "threads": threads})

    def measure(tokens: int) -> float:
        turn = {"ask": "turn", "threads": threads, "prompt": [*range(PROMPT)], "tokens": tokens}
        return tokens / float(worker.ask(turn)["decode"])

    return measure


def write_gguf(config: LlamaConfig, folder: Path, kind: str) -> Path:
    """Write a GGUF file with linears of the type `kind` and a table of Q4_0, all zeros, and norms of one."""
    load_tokenizer(locate("smollm2").folder).save_pretrained(folder)
    head = read_head(folder, config.to_dict(), FileOrigin(folder.name, None, None))
    model, vocabulary = head.model, head.vocabulary
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, model.architecture)
    model.describe(writer, len(vocabulary.tokens))
    vocabulary.describe(writer)
    with torch.device("meta"):
        parameters = LlamaForCausalLM(config).named_parameters()
    for name, parameter in parameters:
        if parameter.ndim == 1:
            writer.add_tensor(model.name(name), np.ones(parameter.shape, np.float32))
            continue
        quantization = gguf.GGMLQuantizationType["Q4_0" if "embed_tokens" in name else kind]
        size = gguf.quant_shape_to_byte_shape(tuple(parameter.shape), quantization)
        writer.add_tensor(model.name(name), np.zeros(size, np.uint8), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
def speed(model: nn.Module, tokens: int) -> float:
    """Return tokens a second of greedy decoding behind the prompt."""
    out = model(input_ids=torch.arange(PROMPT)[None], use_cache=True)
    token = out.logits[:, -1:].argmax(-1)
    began = time.perf_counter()
    for _ in range(tokens):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    return tokens / (time.perf_counter() - began)


def record(name: str, threads: int, rounds: list[dict[str, float]], options: argparse.Namespace) -> Record:
    """Return what was measured of an arm."""
    speeds = [each[name] for each in rounds]
    said = f"--threads {threads} --rounds {options.rounds} --tokens {options.tokens} --mode {options.mode}"
    said += f" --llama {' '.join(options.llama)}" if options.llama else ""
    numbers = {
        "tokens_per_second": statistics.median(speeds),
        "lowest": min(speeds),
        "highest": max(speeds),
        "ratio": statistics.median(each[name] / each["dense bfloat16"] for each in rounds),
    }
    where = {
        "table": "shapes",
        "arm": f"{name}, {threads} thread{'s' * (threads > 1)}",
        "threads": threads,
        "model": "random, 16 blocks of 2048",
        "text": None,
    }
    return where | {
        "command": f"python research/shapes.py {said}",
        "calibration": None,
        **provenance(),
        "numbers": numbers,
    }


if __name__ == "__main__":
    main()
