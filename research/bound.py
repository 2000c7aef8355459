"""Time GPTQ beside the products that it cannot avoid, on four blocks in the shape of a Llama of 8 billion.

    python research/bound.py [--sequences 64] [--length 1024] [--threads 2] [--jsonl FILE]

The bound is the operations of two passes of every block (the inputs of its dense layers, the outputs of its compressed
ones) and of the second moments of every group's inputs, at the speed that this machine multiplies large matrices with
in bfloat16. Reading, attention, norms, solving, packing and writing come on top. Weights are random.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from records import Record, append, provenance
from shapes import VOCABULARY, write
from transformers import LlamaConfig

import llmcompress as lc

WIDTH, INNER, HEADS, KEYS, BLOCKS = 4096, 14336, 32, 8, 4
STEP = {"method": "gptq", "bits": 4, "group_size": 64, "symmetric": False}
SIDE = 4096  # of the matrices that tell the machine's speed


def main() -> None:
    """Measure the machine and one run, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--jsonl", type=Path, help="collects the record")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    text = {"dataset": "builtin", "samples": options.sequences, "length": options.length, "held_out": 0}
    ungated = {"kl": None, "perplexity_ratio": None}
    recipe = {"version": 1, "rules": [{"match": "*", "steps": [STEP]}], "calibration": text, "gates": ungated}
    before = speed()
    with tempfile.TemporaryDirectory() as place:
        write(shape(), Path(place) / "dense")
        began = time.perf_counter()
        lc.compress(Path(place) / "dense", recipe, Path(place) / "small")
        seconds = time.perf_counter() - began
    fastest = max(before, speed())
    bound = operations(options.sequences * options.length) / fastest
    numbers = {"seconds": seconds, "bound": bound, "ratio": seconds / bound, "gigaflops": fastest / 1e9}
    print("{seconds:.0f} s, bound {bound:.0f} s at {gigaflops:.0f} GFLOPS: {ratio:.2f}".format(**numbers))
    if options.jsonl:
        append(options.jsonl, record(numbers, text, options))


def shape() -> LlamaConfig:
    """Return the model's sizes."""
    return LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )


def operations(tokens: int) -> float:
    """Return the floating-point operations that a run on so many tokens cannot avoid."""
    keys = WIDTH * KEYS // HEADS
    weights = WIDTH * (2 * WIDTH + 2 * keys + 3 * INNER)
    moments = 3 * WIDTH**2 + INNER**2  # symmetric: half of the products
    return float(BLOCKS * tokens * (2 * 2 * weights + moments))


def speed() -> float:
    """Return the operations per second of the fastest of four large products in bfloat16."""
    a = torch.ones(SIDE, SIDE, dtype=torch.bfloat16)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return 2 * SIDE**3 / min(times)


def record(numbers: dict[str, float], text: Record, options: argparse.Namespace) -> Record:
    """Return the record of the run."""
    said = f"--sequences {options.sequences} --length {options.length} --threads {options.threads}"
    return {
        "table": "bound",
        "arm": f"{options.sequences}x{options.length} tokens, {options.threads} threads",
        "command": f"python research/bound.py {said}",
        "model": f"a Llama of {BLOCKS} blocks, width {WIDTH}, {INNER} inside, random weights",
        "text": None,
        "calibration": text,
        "numbers": numbers,
        **provenance(),
    }


if __name__ == "__main__":
    main()
