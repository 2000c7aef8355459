"""Time the search for the streams of one column on a GPU and on this machine's CPUs, and check that both agree.

    python research/trellis_search.py [--device cuda] [--rows 576 4096 14336] [--columns 50] [--memory 12]

Columns of random numbers, one after the other as error feedback asks for them. The first, which compiles, does not
count.
"""

from __future__ import annotations

import argparse
import time

import torch

from llmcompress.methods.solvers.block_search import TrellisStreams, can_search
from llmcompress.weight.trellis import Trellis

RUN = 768  # rows of a stream


def main() -> None:
    """Prints a line for every number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, nargs="+", default=[576, 4096, 14336])
    parser.add_argument("--columns", type=int, default=50)
    parser.add_argument("--memory", type=int, default=12)
    parser.add_argument("--bits", type=int, default=2)
    options = parser.parse_args()
    device, trellis = torch.device(options.device), Trellis(options.bits, 1, options.memory)
    if not can_search(device):
        parser.error(f"{device} does not search for itself; it takes an NVIDIA GPU and Triton")
    print(f"{trellis}, torch {torch.__version__}, {torch.get_num_threads()} threads; milliseconds a column")
    for rows in options.rows:
        values = torch.randn(options.columns + 1, rows, generator=torch.Generator().manual_seed(0))
        here, there = (timed(values.to(place), trellis) for place in (torch.device("cpu"), device))
        same = torch.equal(here[1], there[1])
        print(f"{rows:6} rows: CPU {here[0]:8.3f}, {device} {there[0]:8.3f}, {'same' if same else 'OTHER'} codes")


def timed(values: torch.Tensor, trellis: Trellis) -> tuple[float, torch.Tensor]:
    """Milliseconds for each row of `values [columns, rows]` but the first, and all codes."""
    columns = TrellisStreams(torch.ones(values.shape[1], 1, device=values.device).half(), len(values), trellis, RUN)
    columns.choose(0, values[:1].clone())
    started = finished(values.device)
    columns.choose(1, values[1:].clone())
    seconds = finished(values.device) - started
    return 1e3 * seconds / (len(values) - 1), columns.weight(values.T).codes.cpu()


def finished(device: torch.device) -> float:
    """The time when a device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
