"""Measure float32 products by oneDNN and bfloat16 products on this machine's CPU, beside torch's own float32.

    python research/products.py [--rounds 5]

Products of `[rows, inner]` and `[inner, columns]` as SmolLM2-135M has them (512 tokens by its linears and its head, the
Gram matrix of 4,096 tokens), small ones of error feedback and one vector, then its perplexity on two windows of 1024.
All ways in turn, the best of the rounds. What `products.py` takes on this CPU is said before; it should be the fastest.
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
from llmcompress.evaluation.perplexity import evaluation_windows, perplexity
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import Place
from llmcompress.models.dense.model import resolve
from llmcompress.runtime.precision import by_onednn, fast_float32, product_dtype, products

CPU = torch.device("cpu")
WAYS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "torch's float32": nullcontext,
    "oneDNN's": by_onednn,
    "bfloat16": partial(products, CPU, torch.bfloat16),
}
LINEARS = ((512, 576, 1536), (512, 1536, 576), (512, 576, 49152))
SHAPES = (*LINEARS, (1536, 4096, 1536), (576, 64, 1536), (64, 64, 64), (1, 576, 1536))


def main() -> None:
    """Prints what is taken on this CPU, a line for every product, and one for the perplexity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {taken()}")
    print(f"| | {' | '.join(f'{name}, ms' for name in WAYS)} | {' | '.join('error' for _ in WAYS)} |")
    print("|---" * (1 + 2 * len(WAYS)) + "|")
    for rows, inner, columns in SHAPES:
        left, right = torch.randn(rows, inner), torch.randn(inner, columns)
        exact = left.double() @ right.double()
        repeats = max(1, 10**9 // (rows * inner * columns))
        report(f"{rows} x {inner} x {columns}", partial(torch.mm, left, right), exact, rounds, repeats)
    source = resolve("smollm2")
    model = load_model(Place(source.name, source.folder))
    windows = evaluation_windows(source.tokenizer(), lc.Protocol(windows=2), source.config)
    report("perplexity", lambda: torch.tensor(perplexity(model, windows).nll), None, rounds, 1)


def taken() -> str:
    """Return in words the products that calibration and scoring compute with."""
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]  # made when torch is imported
    with fast_float32():
        changed = torch.backends.mkldnn.matmul.fp32_precision != before  # type: ignore[attr-defined]
    library = "oneDNN" if changed else "torch's choice"
    return f"compute: auto is {str(product_dtype('auto', CPU)).removeprefix('torch.')}, float32 is by {library}"


def report(name: str, compute: Callable[[], Tensor], exact: Tensor | None, rounds: int, repeats: int) -> None:
    """One line; errors are relative to `exact`, or where there is none values are given."""
    best, found = dict.fromkeys(WAYS, float("inf")), {}
    for _ in range(rounds):
        for way, setting in WAYS.items():
            with setting():
                found[way] = compute()
                started = time.perf_counter()
                for _ in range(repeats):
                    compute()
                best[way] = min(best[way], (time.perf_counter() - started) / repeats)
    errors = [
        f"{float(one):.7f}" if exact is None else f"{float((one - exact).norm() / exact.norm()):.1e}"
        for one in found.values()
    ]
    print(f"| {name} | {' | '.join(f'{1e3 * seconds:.3f}' for seconds in best.values())} | {' | '.join(errors)} |")


if __name__ == "__main__":
    main()
