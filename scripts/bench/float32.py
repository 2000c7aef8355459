"""What `products.fast_float32` is worth on this machine's CPU, and that it computes the same.

    python scripts/bench/float32.py [--rounds 5]

Products of `[rows, inner]` and `[inner, columns]` as SmolLM2-135M has them (512 tokens by its linears and its head, the
Gram matrix of 4,096 tokens), small ones of error feedback and one vector, then its perplexity on two windows of 1024.
Both ways in turn, the best of the rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

import llmcompress as lc
from llmcompress.evaluate import evaluation_windows, perplexity
from llmcompress.locate import Place
from llmcompress.products import fast_float32
from llmcompress.source import load_model, resolve

WAYS: tuple[Callable[[], AbstractContextManager[None]], ...] = (nullcontext, fast_float32)
LINEARS = ((512, 576, 1536), (512, 1536, 576), (512, 576, 49152))
SHAPES = (*LINEARS, (1536, 4096, 1536), (576, 64, 1536), (64, 64, 64), (1, 576, 1536))


def main() -> None:
    """Prints a line for every product, and one for the perplexity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| | as torch does it, ms | fast_float32, ms | ratio | error as torch does it | fast_float32 |")
    print("|---|---|---|---|---|---|")
    for rows, inner, columns in SHAPES:
        left, right = torch.randn(rows, inner), torch.randn(inner, columns)
        exact = left.double() @ right.double()
        repeats = max(1, 10**9 // (rows * inner * columns))
        report(f"{rows} x {inner} x {columns}", partial(torch.mm, left, right), exact, rounds, repeats)
    source = resolve("smollm2")
    model = load_model(Place(source.name, source.folder))
    windows = evaluation_windows(source.tokenizer(), lc.Protocol(windows=2), source.config)
    report("perplexity", lambda: torch.tensor(perplexity(model, windows).nll), None, rounds, 1)


def report(name: str, compute: Callable[[], Tensor], exact: Tensor | None, rounds: int, repeats: int) -> None:
    """One line; errors are relative to `exact`, or where there is none values are given."""
    best, found = [float("inf")] * 2, [torch.empty(0)] * 2
    for _ in range(rounds):
        for way, setting in enumerate(WAYS):
            with setting():
                found[way] = compute()
                started = time.perf_counter()
                for _ in range(repeats):
                    compute()
                best[way] = min(best[way], (time.perf_counter() - started) / repeats)
    shown = [f"{one:.7f}" if exact is None else f"{float((one - exact).norm() / exact.norm()):.1e}" for one in found]
    times = f"{1e3 * best[0]:.3f} | {1e3 * best[1]:.3f} | {best[0] / best[1]:.2f}"
    print(f"| {name} | {times} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
