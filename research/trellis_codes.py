"""Find the seeds of the linear codes of trellises, and compare the codes on a Gaussian.

    python research/trellis_codes.py [--find] [--memory 12 ...] [--seeds 64]

Prints for every size the squared error on fresh numbers of a Gaussian, each at the best scale of its own: `table` and
`linear`. `--find` first tries that many seeds a size on other numbers, and prints the best, as
`llmcompress/weight/trellis.py` holds them.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from llmcompress.kernels.column_block import ColumnBlock, Numbers, whole_weights
from llmcompress.methods.solvers.block_search import choose_columns
from llmcompress.weight.trellis import Trellis, linear_code, table

STEPS = ((1, 1), (3, 2), (2, 1), (5, 2), (3, 1), (7, 2), (4, 1))  # (bits, values)
FINDING, FRESH = (98, 99), (11, 12, 13, 14)  # seeds of the numbers to find by, and to judge by


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--find", action="store_true", help="look for seeds")
    parser.add_argument("--memory", type=int, nargs="+", default=[12])
    parser.add_argument("--seeds", type=int, default=64)
    options = parser.parse_args()
    print("| bits a weight | memory | seed | table | linear | ratio |\n|---|---|---|---|---|---|")
    for memory in options.memory:
        for bits, values in STEPS:
            if memory >= 2 * bits:
                print(row(Trellis(bits, values, memory, "linear"), options.seeds if options.find else 0), flush=True)


def row(trellis: Trellis, seeds: int) -> str:
    """Return one line of the table; `seeds`: how many to try, 0 for the one that the code has."""
    sizes = trellis.bits, trellis.values, trellis.memory
    states = torch.arange(1 << trellis.memory)
    tried = {seed: linear_code(*sizes, seed).table(states).numpy() for seed in range(seeds)}
    best = min(tried, key=lambda seed: error(trellis, tried[seed], FINDING), default=None)
    linear = error(trellis, table(trellis).numpy() if best is None else tried[best], FRESH)
    before = error(trellis, table(replace(trellis, code="table")).numpy(), FRESH)
    found = "as it is" if best is None else str(best)
    cells = f"{trellis.rate:g}", str(trellis.memory), found, f"{before:.5f}", f"{linear:.5f}", f"{linear / before:.3f}"
    return f"| {' | '.join(cells)} |"


def error(trellis: Trellis, numbers: NDArray[np.float32], seeds: tuple[int, ...]) -> float:
    """Return the squared error of the nearest streams to Gaussian numbers, with `numbers [states, values]`."""
    kinds = Numbers.on(torch.device("cpu"), trellis, torch.from_numpy(numbers))
    errors = []
    for seed in seeds:
        wanted = np.random.default_rng(seed).standard_normal((12_000 // trellis.values, trellis.values), np.float32)
        found = numbers[nearest(wanted, kinds)]
        scale = (wanted * found).sum() / np.square(found).sum()
        errors.append(np.square(wanted - scale * found).mean())
    return float(np.mean(errors))


def nearest(wanted: NDArray[np.float32], numbers: Numbers) -> NDArray[np.int32]:
    """Return the states nearest to `wanted [steps, values]`, one stream."""
    rows = torch.from_numpy(wanted.reshape(1, -1).copy())
    ones, ends = torch.ones(rows.numel()), torch.tensor([[0], [-1]], dtype=torch.int32)
    block = ColumnBlock(rows, whole_weights(ones, numbers.trellis), ones, (0, len(wanted)), ends)
    return choose_columns(block, numbers)[0][0].numpy()


if __name__ == "__main__":
    main()
